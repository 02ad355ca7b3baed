"""Whatever is edited, deleted, inserted or put back behind the ledger's back is found."""

import contextlib
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from accounting import (
    BudgetExceeded,
    DatabaseError,
    DpSgdMechanism,
    Head,
    Ledger,
    LedgerTampered,
    Mechanism,
)
from accounting.ledger.tables import metadata

TABLES = {
    table.name: [column.name for column in table.columns] for table in metadata.sorted_tables
}
COLUMNS = [(table, column) for table, columns in TABLES.items() for column in columns]


def trial(iterations: int = 10) -> Mechanism:
    return DpSgdMechanism(
        noise_multiplier=2.0,
        sampling_prob=0.05,
        iterations=iterations,
        neighboring_relation="zero_out",
    )


def create(ledger: Ledger, name: str, policy: Any = "open") -> None:
    ledger.create_budget(
        name, dataset="d", dataset_fingerprint="f", epsilon=4.0, delta=1e-5, policy=policy
    )


def fill(ledger: Ledger) -> None:
    """Something in every table and of every kind."""
    create(ledger, "b")
    create(ledger, "list", "declared")
    ledger.grant("b", "team", 0.5)
    ledger.reserve("b", trial(), request_id="r", team="team")
    ledger.charge("r", 2)
    ledger.reserve("list", trial(), request_id="l")
    with contextlib.suppress(BudgetExceeded):
        ledger.reserve("list", trial(10**6), request_id="refused")
    ledger.freeze("list", by="me", reason="a look")
    ledger.thaw("list")
    ledger.freeze("b")
    for name in ("late", "never"):
        with contextlib.suppress(BudgetExceeded):
            ledger.reserve("b", trial(3), request_id=name, team="team")
    with contextlib.suppress(BudgetExceeded):
        ledger.ask_again("never")
    ledger.thaw("b")
    ledger.ask_again("late")
    ledger.reserve("b", trial(20), request_id="r2", team="team")
    ledger.settle("r2")
    ledger.extend("r2", 15)
    with contextlib.suppress(BudgetExceeded):
        ledger.extend("r", 10**9)
    ledger.reserve("b", trial(5), request_id="fork", prefix=(trial(2),), team="team")
    ledger.charge("r", 6)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "ledger.db"
    ledger = Ledger(url(path))
    fill(ledger)
    assert ledger.verify().ok
    ledger.close()
    return path


@pytest.fixture
def file(full: Path, tmp_path: Path) -> Path:
    for suffix in ("", "-witness"):
        shutil.copy(f"{full}{suffix}", tmp_path)
    return tmp_path / full.name


def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def raw(file: Path) -> Iterator[sqlite3.Connection]:
    """The forger's way in."""
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA ignore_check_constraints=ON")
    yield connection
    connection.close()


def problems_of(path: Path) -> Sequence[str]:
    """What is found, whether or not it is noticed when the ledger is opened."""
    ledger = Ledger(url(path), check=False)
    found = ledger.verify()
    if ledger.damage:
        with pytest.raises(LedgerTampered):
            create(ledger, "another")
    ledger.close()
    return found.problems


def forget_the_witness(path: Path) -> None:
    Path(f"{path}-witness").unlink()


# -- single edits ----------------------------------------------------------------------------


def other(value: Any) -> Any:
    """A value of the same type that is another one."""
    if value is None:
        return 2.5
    return value + "x" if isinstance(value, str) else value + 1000


@pytest.mark.parametrize("with_witness", [True, False])
@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_an_edit_of_any_column_of_any_row_is_found(
    file: Path, raw: sqlite3.Connection, table: str, column: str, with_witness: bool
) -> None:
    rows = raw.execute(f"SELECT rowid, {column} FROM {table} ORDER BY rowid").fetchall()
    assert rows
    if not with_witness:
        forget_the_witness(file)
    for rowid, value in rows:
        edit = f"UPDATE {table} SET {column} = ? WHERE rowid = ?"
        raw.execute(edit, [other(value), rowid])
        raw.commit()
        assert problems_of(file), f"row {rowid}"
        raw.execute(edit, [value, rowid])
        raw.commit()
    assert problems_of(file) == ()


@pytest.mark.parametrize("nonsense", [None, 0, 7.5, "", "{", "[]", "null", b"\xff", "\x00"])
@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_nonsense_in_a_column_is_found_and_stops_nobody_from_looking(
    file: Path, raw: sqlite3.Connection, table: str, column: str, nonsense: Any
) -> None:
    raw.execute("PRAGMA foreign_keys=OFF")
    rowid, value = raw.execute(f"SELECT max(rowid), {column} FROM {table}").fetchone()
    with contextlib.suppress(sqlite3.IntegrityError):
        raw.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", [nonsense, rowid])
        raw.commit()
        (kept,) = raw.execute(f"SELECT {column} FROM {table} ORDER BY rowid DESC").fetchone()
        if kept != value and not (column == "one_off" and not kept):
            assert problems_of(file)


@pytest.mark.parametrize("table", TABLES)
def test_a_deleted_row_is_found(file: Path, raw: sqlite3.Connection, table: str) -> None:
    (count,) = raw.execute(f"SELECT count(*) FROM {table}").fetchone()
    before = file.read_bytes()
    for number in range(count):
        raw.execute(f"DELETE FROM {table} WHERE rowid = (SELECT rowid FROM {table} LIMIT 1 "
                    f"OFFSET {number})")  # fmt: skip
        raw.commit()
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert problems_of(file), f"row {number}"
        raw.close()
        file.write_bytes(before)
        raw = sqlite3.connect(file)
    raw.close()


@pytest.mark.parametrize("table", TABLES)
def test_an_inserted_row_is_found(file: Path, raw: sqlite3.Connection, table: str) -> None:
    columns = TABLES[table]
    key = {
        "ledger_journal": "seq",
        "ledger_reservations": "request_id",
        "ledger_budgets": "name",
    }.get(table, "team")
    chosen = ", ".join(
        column if column != key else ("seq + 1" if key == "seq" else "'another'")
        for column in columns
    )
    raw.execute(f"INSERT INTO {table} SELECT {chosen} FROM {table} ORDER BY rowid DESC LIMIT 1")
    raw.commit()
    assert problems_of(file)


# -- a forger who hashes everything anew -----------------------------------------------------


def rehash(raw: sqlite3.Connection) -> None:
    """Makes a chain of whatever stands in the journal."""
    previous = "0" * 64
    for seq, entry in raw.execute("SELECT seq, entry FROM ledger_journal ORDER BY seq").fetchall():
        previous = hashlib.sha256((previous + entry).encode()).hexdigest()
        raw.execute("UPDATE ledger_journal SET hash = ? WHERE seq = ?", [previous, seq])
    raw.commit()


def halve_the_charge(raw: sqlite3.Connection) -> None:
    (seq, entry), *_ = raw.execute(
        "SELECT seq, entry FROM ledger_journal WHERE kind = 'charged' ORDER BY seq DESC"
    )
    data = json.loads(entry)
    data["facts"]["iterations"] = 3
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    raw.execute("UPDATE ledger_journal SET entry = ? WHERE seq = ?", [text, seq])
    raw.execute("UPDATE ledger_reservations SET charged = 3 WHERE request_id = 'r'")
    raw.execute("UPDATE ledger_tallies SET charged = 3 WHERE team = 'team'")


def cut_off_the_last_charge(raw: sqlite3.Connection) -> None:
    raw.execute("DELETE FROM ledger_journal WHERE seq = (SELECT max(seq) FROM ledger_journal)")
    raw.execute("UPDATE ledger_reservations SET charged = 2 WHERE request_id = 'r'")
    raw.execute("UPDATE ledger_tallies SET charged = 2 WHERE team = 'team'")


@pytest.mark.parametrize("forgery", [halve_the_charge, cut_off_the_last_charge])
def test_a_forgery_without_a_flaw_is_found_by_the_witness_alone(
    file: Path, raw: sqlite3.Connection, forgery: Callable[[sqlite3.Connection], None]
) -> None:
    noted = Ledger(url(file)).head()
    forgery(raw)
    rehash(raw)
    with pytest.raises(LedgerTampered, match=r"ledger\.db-witness"):
        Ledger(url(file))
    assert len(problems_of(file)) == 1
    assert "ledger.db-witness" in problems_of(file)[0]
    forget_the_witness(file)
    ledger = Ledger(url(file))
    assert ledger.verify().ok
    found = ledger.verify(expected=noted)
    assert found.problems == (f"the journal does not hold entry {noted.seq} as it was noted",)
    ledger.close()


SAYS_ALL = ("frozen", "thawed", "charge_refused", "extension_refused")
"""Kinds whose facts no row follows from."""


@pytest.mark.slow
def test_facts_that_are_missing_or_senseless_are_problems_not_failures(
    file: Path, raw: sqlite3.Connection
) -> None:
    rows = raw.execute("SELECT seq, entry FROM ledger_journal").fetchall()
    forget_the_witness(file)
    for seq, text in rows:
        entry = json.loads(text)
        facts = entry["facts"]
        senseless: list[Any] = [[], None, "x", {}]
        senseless += [{n: v for n, v in facts.items() if n != name} for name in facts]
        senseless += [{**facts, name: bad} for name in facts for bad in (None, [1], {}, "y", 7.5)]
        for forged in senseless:
            changed = json.dumps({**entry, "facts": forged}, sort_keys=True)
            raw.execute("UPDATE ledger_journal SET entry = ? WHERE seq = ?", [changed, seq])
            rehash(raw)
            if entry["kind"] not in SAYS_ALL and not same_but_for_names(facts, forged):
                assert problems_of(file), (entry["kind"], forged)
        raw.execute("UPDATE ledger_journal SET entry = ? WHERE seq = ?", [text, seq])
    rehash(raw)
    assert problems_of(file) == ()


def same_but_for_names(facts: Any, forged: Any) -> bool:
    """Whether two entries say the same except for who did it; no row says that."""
    return isinstance(forged, dict) and {**facts, "by": ""} == {**forged, "by": ""}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"iterations": 20}, "committed is 15"),
        ({"request_id": "r", "iterations": 10}, "less than 11"),
        ({"request_id": "refused"}, "cannot be extended"),
        ({"request_id": "nobody"}, "makes no sense"),
    ],
)
def test_an_extension_that_is_not_what_was_granted_is_found(
    file: Path, raw: sqlite3.Connection, change: dict[str, Any], problem: str
) -> None:
    (seq, text), *_ = raw.execute("SELECT seq, entry FROM ledger_journal WHERE kind = 'extended'")
    entry = json.loads(text)
    entry["facts"] |= change
    changed = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    raw.execute("UPDATE ledger_journal SET entry = ? WHERE seq = ?", [changed, seq])
    rehash(raw)
    forget_the_witness(file)
    assert any(problem in found for found in problems_of(file))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"request_id": "r"}, "asks again for what was not refused"),
        ({"request_id": "refused"}, "asks again for what was not refused"),  # of another budget
        ({"request_id": "nobody"}, "makes no sense"),
        ({"spent": 1e6}, "admits"),
        ({"admitted": False}, "is not what its verdict says"),
    ],
)
def test_a_second_decision_that_is_not_what_was_decided_is_found(
    file: Path, raw: sqlite3.Connection, change: dict[str, Any], problem: str
) -> None:
    query = "SELECT seq, entry FROM ledger_journal WHERE kind = 'reserved_later'"
    ((seq, text),) = raw.execute(query).fetchall()
    entry = json.loads(text)
    facts = entry["facts"]
    (facts if "request_id" in change else facts["verdict"]).update(change)
    changed = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    raw.execute("UPDATE ledger_journal SET entry = ? WHERE seq = ?", [changed, seq])
    rehash(raw)
    forget_the_witness(file)
    assert any(f"entry {seq}: {problem}" in found for found in problems_of(file))


def test_what_was_added_to_a_closed_list_is_found(file: Path, raw: sqlite3.Connection) -> None:
    ledger = Ledger(url(file))
    ledger.extend("l", 11)
    ledger.reserve("list", trial(), request_id="l2")
    ledger.charge("l", 1)
    assert ledger.verify().ok
    ledger.close()
    forget_the_witness(file)
    entries = raw.execute(
        "SELECT seq, entry FROM ledger_journal ORDER BY seq DESC LIMIT 3"
    ).fetchall()
    (last, charge), others = entries[0], entries[1:]
    for seq, other in others:  # as if it had come after the charge
        for at, text in ((seq, charge), (last, other)):
            said = json.dumps({**json.loads(text), "seq": at}, sort_keys=True)
            kind = json.loads(said)["kind"]
            raw.execute(
                "UPDATE ledger_journal SET entry = ?, kind = ? WHERE seq = ?", [said, kind, at]
            )
        rehash(raw)
        problem = f"journal entry {last}: adds to a list that was closed"
        assert problem in problems_of(file)
        for at, text in entries:
            kind = json.loads(text)["kind"]
            raw.execute(
                "UPDATE ledger_journal SET entry = ?, kind = ? WHERE seq = ?", [text, kind, at]
            )
    rehash(raw)
    assert problems_of(file) == ()


def test_an_extension_over_the_limit_is_found(file: Path, raw: sqlite3.Connection) -> None:
    (seq, text), *_ = raw.execute("SELECT seq, entry FROM ledger_journal WHERE kind = 'extended'")
    entry = json.loads(text)
    entry["facts"]["verdict"]["spent"] = 10 * entry["facts"]["verdict"]["limit"]
    changed = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    raw.execute("UPDATE ledger_journal SET entry = ? WHERE seq = ?", [changed, seq])
    rehash(raw)
    forget_the_witness(file)
    assert any(f"entry {seq}: admits" in found for found in problems_of(file))


# -- older copies ----------------------------------------------------------------------------


def copy_back(copy: Path, file: Path) -> None:
    for suffix in ("-wal", "-shm"):
        Path(f"{file}{suffix}").unlink(missing_ok=True)
    shutil.copy(copy, file)


def test_an_older_copy_is_not_opened(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    shutil.copy(file, copy)
    ledger = Ledger(url(file))
    ledger.charge("r", 8)
    noted = ledger.head()
    ledger.close()
    copy_back(copy, file)
    with pytest.raises(LedgerTampered, match=r"older copy.*remove the file") as caught:
        Ledger(url(file))
    assert f"{file}-witness" in str(caught.value)
    looked_at = Ledger(url(file), check=False)
    assert looked_at.damage == str(caught.value)
    assert looked_at.reservation("r").charged == 6
    with pytest.raises(LedgerTampered):
        looked_at.charge("r", 9)
    looked_at.close()
    forget_the_witness(file)  # as the message says
    ledger = Ledger(url(file))
    assert ledger.verify().ok
    assert not ledger.verify(expected=noted).ok
    ledger.close()


def test_an_older_copy_beneath_an_open_ledger_takes_no_writes(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    shutil.copy(file, copy)
    ledger = Ledger(url(file))
    ledger.charge("r", 8)
    ledger.engine.dispose()  # as after a pause, in which somebody restores a backup
    copy_back(copy, file)
    for _ in range(3):
        with pytest.raises(LedgerTampered, match="older copy"):
            create(ledger, "another")
    assert not ledger.verify().ok
    ledger.close()


def test_the_witness_sees_whatever_a_transaction_wrote(file: Path) -> None:
    ledger = Ledger(url(file))
    with ledger.transaction() as transaction:
        transaction.charge("r", 7)
        transaction.charge("r", 7)  # nothing more, and what was pending may be written by now
        transaction.set_state("b", "active")
    assert ledger.verify().witness == ledger.head()
    ledger.close()


@pytest.mark.parametrize("damage", [b"x", b"0" * 512, b"1:" + b"a" * 64 + b" 0123456789abcdef\n"])
def test_a_damaged_witness_is_named(file: Path, damage: bytes) -> None:
    Path(f"{file}-witness").write_bytes(damage)
    with pytest.raises(LedgerTampered, match=r"ledger\.db-witness is damaged.*remove the file"):
        Ledger(url(file))
    assert "damaged" in problems_of(file)[0]


def test_half_a_witness_is_enough(file: Path) -> None:
    witness = Path(f"{file}-witness")
    whole = witness.read_bytes()
    ledger = Ledger(url(file))
    for start in (0, 256):
        torn = whole[:start] + b"\0" * 256 + whole[start + 256 :]
        witness.write_bytes(torn)
        assert ledger.verify().ok
    for mark in (7, 8, 9):
        ledger.charge("r", mark)
        assert ledger.verify().witness == ledger.head()
    ledger.close()


def test_a_missing_witness_is_made_anew(file: Path) -> None:
    forget_the_witness(file)
    ledger = Ledger(url(file))
    assert ledger.verify().witness is None
    ledger.charge("r", 7)
    assert ledger.verify().witness == ledger.head()
    ledger.close()


def test_a_witness_out_of_reach_is_an_error_of_the_database(file: Path) -> None:
    forget_the_witness(file)
    ledger = Ledger(url(file))
    Path(f"{file}-witness").mkdir()
    with pytest.raises(DatabaseError, match=r"ledger\.db-witness cannot be"):
        ledger.charge("r", 7)
    assert not ledger.verify().ok
    ledger.close()
    with pytest.raises(DatabaseError, match=r"ledger\.db-witness cannot be read"):
        Ledger(url(file))


def test_heads_that_were_noted_are_found_again(file: Path) -> None:
    ledger = Ledger(url(file))
    for _, head in list(ledger.entries()):
        assert ledger.verify(expected=head).ok
        assert not ledger.verify(expected=Head(head.seq, "0" * 64)).ok
    assert not ledger.verify(expected=Head(10_000, "0" * 64)).ok
    ledger.close()


def test_opening_looks_at_the_end_of_the_chain(file: Path, raw: sqlite3.Connection) -> None:
    forget_the_witness(file)
    raw.execute("UPDATE ledger_journal SET entry = replace(entry, '6', '5') WHERE seq = "
                "(SELECT max(seq) FROM ledger_journal)")  # fmt: skip
    raw.commit()
    with pytest.raises(LedgerTampered, match="was changed"):
        Ledger(url(file))


# -- PostgreSQL ------------------------------------------------------------------------------


@pytest.mark.postgres
@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE ledger_tallies SET charged = charged - 1 WHERE charged > 0",
        "UPDATE ledger_budgets SET epsilon = epsilon * 2",
        "DELETE FROM ledger_shares",
        "UPDATE ledger_journal SET kind = 'thawed' WHERE kind = 'frozen'",
    ],
)
def test_edits_on_a_server_are_found(postgres_database: str, tmp_path: Path, edit: str) -> None:
    ledger = Ledger(postgres_database, witness=tmp_path / "witness")
    fill(ledger)
    assert ledger.verify().ok
    with ledger.engine.begin() as connection:
        assert connection.exec_driver_sql(edit).rowcount > 0
    assert not ledger.verify().ok
    ledger.close()
