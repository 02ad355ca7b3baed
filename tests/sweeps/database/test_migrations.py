"""How the tables came to be what the code expects, from wherever a database is found."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from accounting import BudgetTerms, Ledger
from accounting.database.connection import connect
from accounting.database.schema import Schema
from accounting.ledger.tables import SCHEMA as LEDGER_SCHEMA
from sweeps.database.store import open_store
from sweeps.database.tables import SCHEMA, open_database, reading, writing
from sweeps.errors import DatabaseError
from sweeps.home import Home
from tests.sweeps.database.small_sweep import (
    PLAN,
    PROCESS_SECS,
    ROOMY,
    ROOT,
    TRIAL,
    a_branch,
    a_full_trial,
    charged,
    child,
    everything,
    ledger_charge,
    line_of,
    privacy_of,
)

# -- the tables, and how they came to be -----------------------------------------------------


def _differ(
    _context: object,
    _found_column: object,
    _column: object,
    found: str | None,
    _default: object,
    expected: str | None,
) -> bool | None:
    """Of an empty text in SQLite Alembic would compare the quotes; it compares all else."""
    return False if (found, expected) == ("('')", "") else None


def differences(engine: sa.Engine, *schemas: Schema) -> Sequence[Any]:
    """What the database has other than the metadata of these schemas says."""
    version_tables = {SCHEMA.version_table, LEDGER_SCHEMA.version_table}
    with reading(engine) as connection:
        options = {
            "compare_server_default": _differ,
            "include_object": lambda _object, name, *_: name not in version_tables,
        }
        context = MigrationContext.configure(connection, opts=options)
        expected = sa.MetaData()
        for schema in schemas:
            for table in schema.metadata.sorted_tables:
                table.to_metadata(expected)
        return compare_metadata(context, expected)


def test_the_revisions_make_the_tables_that_the_code_expects(engine: sa.Engine) -> None:
    assert differences(engine, SCHEMA, LEDGER_SCHEMA) == []


def test_the_newest_revision_is_the_end_of_the_line() -> None:
    script = ScriptDirectory(SCHEMA.folder, version_locations=[SCHEMA.folder])
    assert script.get_heads() == [SCHEMA.revisions[-1]]
    assert len(list(script.walk_revisions())) == len(SCHEMA.revisions)


# Of that time, too, whatever the store writes by now.
FORMER_ROWS = [
    "schema_version VALUES (1)",
    "sweeps VALUES ('s-1', 's', 'RUNNING', '{}', 'hash', 'digits', 'print', 1.5, NULL, 'parent')",
    "trials VALUES ('s-1-000', 's-1', 0, 'RUNNING', '', '{}', 'null', 100, 2.5, 10, 'child')",
    "trials VALUES ('s-1-001', 's-1', 1, 'REJECTED', 'why', '{}', NULL, 100, NULL, 0, NULL)",
    "attempts VALUES ('token', 's-1-000', 1, 0, 10, 'host:1', 2.5, NULL)",
    "reports VALUES ('s-1-000', 10, 1, 3.5, 10, 0.5, 0.75, 1.25)",
    "outbox (sweep_id, kind, payload, created_at) VALUES ('s-1', 'sweep_start', '{}', 1.5)",
]


@pytest.fixture
def former(home: Home) -> Iterator[sa.Engine]:
    """A database as it was made before there were revisions, with a sweep in it."""
    home.create()
    engine = connect(home.database_url)
    ddl = (ROOT / "tests" / "golden" / "database_before_revisions.sql").read_text()
    if engine.dialect.name == "postgresql":
        ddl = ddl.replace("message_id INTEGER", "message_id SERIAL")
    with writing(engine) as connection:
        for statement in ddl.split(";"):
            if statement.strip():
                connection.exec_driver_sql(statement)
        for row in FORMER_ROWS:
            connection.exec_driver_sql(f"INSERT INTO {row}")
    yield engine
    engine.dispose()


def rows_by_table(engine: sa.Engine) -> dict[str, list[dict[str, Any]]]:
    """All rows of this room's tables, by the names of their columns."""
    metadata = sa.MetaData()
    with reading(engine) as connection:
        metadata.reflect(connection)
        return {
            name: [dict(row) for row in connection.execute(sa.select(table)).mappings()]
            for name, table in metadata.tables.items()
            if name in SCHEMA.metadata.tables
        }


def assert_taken_over(
    before: dict[str, list[dict[str, Any]]], after: dict[str, list[dict[str, Any]]]
) -> None:
    """Every row is there, every attempt has become a branch, and what is new is empty."""
    begun = {"start_step", "charged_step"}
    averages = ("ema_eval_accuracy", "ema_eval_loss", "polyak_eval_accuracy", "polyak_eval_loss")
    expected = {
        "sweeps": [{**row, "wish": "", "driver": "", "reason": ""} for row in before["sweeps"]],
        "trials": [
            {
                **row,
                "parent_trial_id": None,
                "parent_step": None,
                "exempt": False,
                "microbatch_size": None,
                "setting": None,
                "repeat_of": None,
                "needed_rdp": None,
            }
            for row in before["trials"]
        ],
        "attempts": [
            {
                **{name: value for name, value in row.items() if name not in begun},
                "end": None if row["ended_at"] is None else "ended",
                "charged_before": 0,
            }
            for row in before["attempts"]
        ],
        "branches": [
            {
                "trial_id": row["trial_id"],
                "number": row["number"],
                "branch_id": row["attempt_id"],
                "start_step": row["start_step"],
                "charged_step": row["charged_step"],
                "facts": None,
            }
            for row in before["attempts"]
        ],
        "reports": [
            # Of averages there was nothing to measure at first.
            {**dict.fromkeys(averages), **row, "branch": row["attempt"]}
            for row in before["reports"]
        ],
        "outbox": before["outbox"],
        "checkpoints": [],
        "rungs": [],
    }
    for row in expected["reports"]:
        del row["attempt"]
    assert after == expected


def test_a_former_database_is_adopted_with_its_rows(home: Home, former: sa.Engine) -> None:
    before = rows_by_table(former)
    engine = open_database(home)
    assert_taken_over(before, rows_by_table(engine))
    assert "schema_version" not in everything(engine)
    assert everything(engine)[SCHEMA.version_table] == [f"('{SCHEMA.revisions[-1]}',)"]
    assert differences(engine, SCHEMA) == []
    engine.dispose()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("UPDATE schema_version SET version = 2", "schema 2"),
        ("INSERT INTO schema_version VALUES (1)", "schema 1, 1"),
        ("DELETE FROM schema_version", "schema of no version"),
    ],
)
def test_any_other_former_version_is_refused_and_left_alone(
    home: Home, former: sa.Engine, change: str, found: str
) -> None:
    with writing(former) as connection:
        connection.exec_driver_sql(change)
    before = everything(former)
    with pytest.raises(DatabaseError, match=f"has {found}; this version of dp-sweeps can take"):
        open_database(home)
    assert everything(former) == before


# -- before branches -------------------------------------------------------------------------


def upgrade_to(engine: sa.Engine, revision: str) -> None:
    """Makes this room's tables as an older version of the code would have."""
    script = ScriptDirectory(SCHEMA.folder, version_locations=[SCHEMA.folder])
    with writing(engine) as connection:
        options = {
            "version_table": SCHEMA.version_table,
            "fn": lambda found, _: script._upgrade_revs(revision, found),
            "script": script,
        }
        context = MigrationContext.configure(connection, opts=options)
        context.run_migrations(op=Operations(context))


@pytest.fixture
def second(home: Home) -> Iterator[sa.Engine]:
    """A database as revision 0002 has it, with a trial that was restarted, and one that ended."""
    home.create()
    engine = connect(home.database_url)
    upgrade_to(engine, "0002")
    full = a_full_trial(0)
    assert full.trial_config is not None
    assert full.mechanism is not None
    ledger = Ledger(engine, witness=home.ledger_witness)
    terms = BudgetTerms(epsilon=ROOMY, delta=1e-5, policy="per_trial")
    ledger.create_budget("s-1", dataset="d", dataset_fingerprint="f", **dataclasses.asdict(terms))
    for trial_id, steps in ((TRIAL, 40), ("s-1-001", 100)):
        ledger.reserve("s-1", full.mechanism, request_id=trial_id)
        ledger.charge(trial_id, steps)
    ledger.settle("s-1-001")
    config = json.dumps(full.trial_config.to_json())
    spec = json.dumps({"privacy": privacy_of()})
    values = {
        "sweeps": [f"'s-1', 's', 'RUNNING', '{spec}', 'hash', 'd', 'f', 1.5, NULL, 'parent'"],
        "trials": [
            f"'{TRIAL}', 's-1', 0, 'RUNNING', '', '{{}}', '{config}', {PLAN}, 2.5, 40, 'child'",
            f"'s-1-001', 's-1', 1, 'COMPLETED', '', '{{}}', '{config}', {PLAN}, 2.5, 100, NULL",
            "'s-1-002', 's-1', 2, 'REJECTED', 'why', '{}', NULL, 100, NULL, 0, NULL",
        ],
        "attempts": [
            f"'{'1' * 32}', '{TRIAL}', 1, 0, 30, 'host:1', 2.5, NULL",
            f"'{'2' * 32}', '{TRIAL}', 2, 20, 30, 'host:2', 3.5, NULL",
            f"'{'3' * 32}', 's-1-001', 1, 0, 100, 'host:1', 2.5, 4.5",
        ],
        "reports": [
            f"'{TRIAL}', 20, 1, 3.5, 20, 0.5, 0.75, 1.25, 0.8, 1.0, 0.9, NULL",
            f"'{TRIAL}', 30, 1, 3.6, 30, 0.6, 0.75, 1.25, NULL, NULL, NULL, NULL",
            f"'{TRIAL}', 30, 2, 3.7, 40, 0.7, 0.75, 1.25, NULL, NULL, NULL, NULL",
        ],
    }
    with writing(engine) as connection:
        for table, rows in values.items():
            for row in rows:
                connection.exec_driver_sql(f"INSERT INTO {table} VALUES ({row})")
    yield engine
    engine.dispose()


def test_attempts_of_the_second_revision_become_branches(home: Home, second: sa.Engine) -> None:
    before = rows_by_table(second)
    store = open_store(home)
    assert_taken_over(before, rows_by_table(store.ledger.engine))
    assert differences(store.ledger.engine, SCHEMA, LEDGER_SCHEMA) == []
    store.ledger.close()


def test_a_trial_of_the_second_revision_goes_on(home: Home, second: sa.Engine) -> None:
    store = open_store(home)
    given = store.attempts.assignment(TRIAL)
    assert (given.branches, given.checkpoints) == ([], ()), "nobody kept what they would need"
    attempt = store.attempts.begin(TRIAL)
    assert attempt.number == 3
    assert store.attempts.charge(attempt, a_branch(7), 10) == 50
    store.attempts.report(attempt, a_branch(7).branch_id, 10, {"eval_accuracy": 0.5})
    assert [(row.branch, row.step) for row in store.reports("s-1")] == [
        (1, 20),
        (1, 30),
        (2, 30),
        (3, 10),
    ]
    assert store.attempts.charge(attempt, a_branch(7), PLAN) == 40 + PLAN
    assert charged(store) == ledger_charge(store) == 40 + PLAN
    (decision,) = store.readmit({"s-1-001": PLAN + 20})
    assert (decision.admitted, decision.step, decision.new_iterations) == (True, PLAN, 20)
    assert store.ledger.verify().ok
    store.ledger.close()


# -- several first users ---------------------------------------------------------------------


@pytest.mark.slow
def test_two_first_users_create_one_schema(environment: dict[str, str], home: Home) -> None:
    code = (
        "import sys\nfrom sweeps.home import Home\n"
        "from sweeps.database.tables import open_database\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "open_database(Home.from_environment())"
    )
    processes = [child(environment, code) for _ in range(3)]
    assert [line_of(process) for process in processes] == ["ready"] * 3
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=PROCESS_SECS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    engine = open_database(home)
    assert everything(engine)[SCHEMA.version_table] == [f"('{SCHEMA.revisions[-1]}',)"]
    assert differences(engine, SCHEMA) == []
    engine.dispose()
