"""The commands about the journal, on a sound ledger and on damaged ones."""

import json
import sqlite3

import pytest

import accounting
from accounting.errors import LedgerTampered
from sweeps.database.tables import existing_ledger, open_ledger
from sweeps.home import Home
from sweeps.report.journal_view import describe_row, journal_table, row_style
from tests.sweeps.cli.test_budget import draw, mechanism, state_of


@pytest.fixture
def filled(home):
    """A ledger in which something of every kind has happened; returns its file."""
    ledger = open_ledger(Home.from_environment())
    ledger.create_budget(
        "scans",
        dataset="scans",
        dataset_fingerprint="v1",
        epsilon=8.0,
        delta=1e-5,
        policy="open",
        by="ada",
    )
    ledger.grant("scans", "vision", 0.4, by="ada")
    for number in range(3):
        ledger.reserve("scans", mechanism(), request_id=f"t-{number}", team="vision")
    with pytest.raises(accounting.BudgetExceeded):
        ledger.reserve("scans", mechanism(1.0, 0.5, 1000), request_id="dear", team="vision")
    ledger.charge("t-0", 100)
    ledger.settle("t-0")
    ledger.settle("t-1")
    ledger.freeze("scans", by="ada", reason="audit")
    with pytest.raises(accounting.BudgetExceeded):
        ledger.charge("t-2", 1)
    ledger.thaw("scans", by="ada")
    ledger.create_budget(
        "list",
        dataset="scans",
        dataset_fingerprint="v1",
        epsilon=8.0,
        delta=1e-5,
        policy="declared",
        by="ada",
    )
    ledger.reserve("list", mechanism(), request_id="d-0")
    ledger.retire("list", by="ada")
    ledger.close()
    return home / "ledger.db"


KINDS = [
    "budget_created",
    "share_granted",
    *["reserved"] * 3,
    "refused",
    "charged",
    *["settled"] * 2,
    "frozen",
    "charge_refused",
    "thawed",
    "budget_created",
    "reserved",
    "retired",
    "settled",
]


def change(path, statement, *values):
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement, values)
    connection.close()


# --- a sound ledger ------------------------------------------------------------------------


def test_every_kind_of_entry_has_its_words(command, filled):
    code, out, err = command("ledger", "show")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == len(KINDS)
    said = [line.split("  ", 3)[3] for line in lines]
    assert said[0] == "created by ada: open, epsilon 8 at delta 1e-05, for scans"
    assert said[1] == "granted 40% to vision by ada"
    assert said[2].startswith("reserved t-0 for vision: 0.13")
    assert " of rdp, " in said[2]
    assert said[2].endswith(" taken")
    assert said[5].startswith("refused dear for vision: ")
    assert "of Rényi divergence" in said[5]
    assert said[6] == "charged t-0: 100 iterations so far"
    assert said[7] == "settled t-0: closed after 100 iterations"
    assert said[8] == "settled t-1: released, nothing of it ran"
    assert said[9] == "frozen by ada: audit"
    assert said[10] == "refused to charge t-2 1 iteration: the budget is frozen"
    assert said[11] == "thawed by ada"
    assert said[13].startswith("reserved d-0: the declared list costs epsilon ")
    assert said[14] == "retired by ada"


def test_extensions_and_forks_have_their_words(command, filled):
    ledger = existing_ledger(Home.from_environment())
    ledger.extend("t-0", 150)
    with pytest.raises(accounting.BudgetExceeded):
        ledger.extend("t-0", 10**9)
    prefix = (mechanism().after(60), mechanism().after(40))
    ledger.reserve("scans", mechanism(), request_id="fork", team="vision", prefix=prefix)
    with pytest.raises(accounting.BudgetExceeded):
        ledger.extend("d-0", 10**9)
    rows = list(ledger.inspect(newest=4))
    ledger.close()
    said = [describe_row(row) for row in rows]
    assert said[0].startswith("extended t-0 to 150 iterations: ")
    assert " of rdp, " in said[0]
    assert said[0].endswith(" taken")
    assert said[1].startswith("refused to extend t-0 to 1,000,000,000 iterations: the trial needs")
    assert said[2].startswith("reserved fork for vision, going on from 100 iterations: ")
    assert said[3] == "refused to extend d-0 to 1,000,000,000 iterations: the budget is retired"
    red = [bool(row_style(row)) for row in rows]
    assert red == [False, True, False, True]
    code, out, _ = command("ledger", "show", "--last", "4")
    assert code == 0
    assert all(words[:40] in out for words in said)


def test_the_newest_entries_of_one_budget(command, filled):
    code, out, _ = command("ledger", "show", "--budget", "scans", "--last", "2", "--json")
    document = json.loads(out)
    assert code == 0
    assert [entry["kind"] for entry in document["entries"]] == ["charge_refused", "thawed"]
    assert document["problems"] == []
    _, out, _ = command("ledger", "show", "--last", "3")
    assert [line.split()[0] for line in out.splitlines()] == ["14", "15", "16"]


def test_refusals_are_red_on_a_terminal(filled):
    ledger = existing_ledger(Home.from_environment())
    rows = list(ledger.inspect())
    assert [row.entry.kind for row in rows if row.entry] == KINDS
    for width in (60, 80, 120):
        drawn = draw(journal_table(rows), width, terminal=True).splitlines()
        red = [line for line in drawn if "\x1b[31m" in line]
        assert any("refused dear" in line for line in red)
        assert not any("reserved t-0" in line for line in red)


def test_a_sound_ledger_verifies(command, filled):
    code, out, _ = command("ledger", "verify", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ok"] is True
    assert found["entries"] == len(KINDS)
    assert found["problems"] == []
    assert found["witness"] == found["head"]
    code, out, _ = command("ledger", "verify", "--head", found["head"])
    assert code == 0
    assert f"head     {found['head']}" in out
    assert "note this line elsewhere" in out


def test_the_export_is_the_journal(command, filled, tmp_path):
    code, out, _ = command("ledger", "export")
    entries = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [entry["kind"] for entry in entries] == KINDS
    assert set(entries[0]) == {"seq", "at", "kind", "budget", "facts", "hash"}
    _, verified, _ = command("ledger", "verify", "--json")
    assert json.loads(verified)["head"] == f"{entries[-1]['seq']}:{entries[-1]['hash']}"
    path = tmp_path / "journal.jsonl"
    code, said, _ = command("ledger", "export", "--output", path)
    assert (code, said) == (0, "")
    assert path.read_text() == out
    code, _, err = command("ledger", "export", "--output", path, "--budget", "list")
    assert code == 2
    assert "--force" in err
    assert path.read_text() == out
    code, _, _ = command("ledger", "export", "--output", path, "--budget", "list", "--force")
    assert code == 0
    assert {json.loads(line)["budget"] for line in path.read_text().splitlines()} == {"list"}
    assert {file.name for file in tmp_path.iterdir()} == {"home", "journal.jsonl"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "--budget", "no-such"],
        ["show", "--last", "0"],
        ["export", "--budget", "no-such"],
        ["export", "--output", "/nowhere/at/all"],
        ["verify", "--head", "17"],
        ["verify", "--head", "1:" + "g" * 64],
    ],
)
def test_bad_input_is_refused(command, home, filled, arguments):
    before = state_of(home)
    code, out, err = command("ledger", *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert state_of(home) == before


@pytest.mark.parametrize("verb", ["show", "verify", "export"])
def test_looking_at_no_ledger_creates_none(command, home, verb):
    code, _, err = command("ledger", verb)
    assert code == 1
    assert "no ledger" in err
    assert not home.exists()


# --- damaged ones --------------------------------------------------------------------------


def test_a_row_that_was_changed_is_found(command, filled):
    change(filled, "UPDATE ledger_reservations SET charged = 1 WHERE request_id = 't-0'")
    change(filled, "UPDATE ledger_budgets SET epsilon = 80 WHERE name = 'scans'")
    code, out, _ = command("ledger", "verify")
    assert code == 1
    lines = out.splitlines()
    assert any("reservations t-0: charged is 1; the journal says 100" in line for line in lines)
    assert any("budgets scans: epsilon is 80.0" in line for line in lines)
    code, out, _ = command("ledger", "verify", "--json")
    assert code == 1
    assert len(json.loads(out)["problems"]) == 2


def test_an_end_that_was_noted_elsewhere_is_missing(command, filled):
    code, out, _ = command("ledger", "verify", "--head", "3:" + "0" * 64)
    assert code == 1
    assert "does not hold entry 3 as it was noted" in out


DAMAGE = {
    "an entry in the middle": "UPDATE ledger_journal SET entry = replace(entry, '100', '1') "
    "WHERE seq = 7",
    "the last entry": "UPDATE ledger_journal SET entry = replace(entry, 'd-0', 'd-1') "
    "WHERE seq = 16",
    "an entry that is no JSON": "UPDATE ledger_journal SET entry = 'gone' WHERE seq = 16",
    "an entry that says nothing": "UPDATE ledger_journal SET entry = '[]' WHERE seq = 7",
    "an entry that is missing": "DELETE FROM ledger_journal WHERE seq = 7",
    "an end that is cut off": "DELETE FROM ledger_journal WHERE seq > 13",
    "all of it": "DELETE FROM ledger_journal",
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_ledger_can_be_looked_at(command, filled, tmp_path, case):
    change(filled, DAMAGE[case])
    code, out, err = command("ledger", "verify")
    assert (code, err) == (1, "")
    assert "problem" in out
    code, out, err = command("ledger", "show", "--json")
    document = json.loads(out)
    left = sqlite3.connect(filled).execute("SELECT count(*) FROM ledger_journal").fetchone()[0]
    assert code == 1
    assert document["problems"]
    assert len(document["entries"]) == left
    code, out, err = command("ledger", "show")
    assert code == 1
    assert "not what was written" in err
    assert len(out.splitlines()) == left
    path = tmp_path / "journal.jsonl"
    code, _, err = command("ledger", "export", "--output", path)
    assert code == 1
    assert "not what was written" in err
    assert len(path.read_text().splitlines()) == left


def test_nothing_is_decided_on_a_damaged_ledger(command, filled):
    change(filled, DAMAGE["an end that is cut off"])
    for arguments in (["budget", "list"], ["budget", "freeze", "scans"], ["list"]):
        code, out, err = command(*arguments)
        assert (code, out) == (1, "")
        assert "dp-sweeps ledger verify" in err
        assert len(err.splitlines()) == 1
    ledger = existing_ledger(Home.from_environment(), check=False)
    assert ledger.damage
    with pytest.raises(LedgerTampered):
        ledger.freeze("scans")
    with pytest.raises(LedgerTampered):
        existing_ledger(Home.from_environment())


def test_entries_that_make_no_sense_are_shown_as_they_stand(filled):
    change(
        filled,
        "UPDATE ledger_journal SET entry = ? WHERE seq = 3",
        json.dumps({"seq": 3, "at": "then", "kind": "reserved", "budget": "scans", "facts": 7}),
    )
    ledger = existing_ledger(Home.from_environment(), check=False)
    row = list(ledger.inspect())[2]
    assert row.problem
    assert describe_row(row).startswith("reserved: {")
    assert "DAMAGED" in draw(journal_table([row]))
