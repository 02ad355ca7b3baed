"""The database keeps its promises, on SQLite and on PostgreSQL alike."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import exc

from accounting import BudgetTerms, DpSgdMechanism, LedgerError
from accounting.database.connection import connect
from accounting.database.schema import Schema
from accounting.ledger.tables import SCHEMA as LEDGER_SCHEMA
from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import Attempt, NewSweep, NewTrial, Store, open_store
from sweeps.database.tables import SCHEMA, open_database, outbox, reading, writing
from sweeps.errors import (
    DatabaseError,
    FencedError,
    HomeError,
    OverspentError,
    StoreError,
)
from sweeps.home import DATABASE_VARIABLE, HOME_VARIABLE, Home
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.config_sections import MechanismConfig
from trainer.training.plan import mechanism_of

ROOT = Path(__file__).parents[3]
METRICS = {"epsilon": 0.5, "eval_accuracy": 0.75, "eval_loss": 1.25}
TRIAL = "s-1-000"
PLAN = 100
MECHANISM = DpSgdMechanism(
    noise_multiplier=2.0, sampling_prob=0.1, iterations=PLAN, neighboring_relation="zero_out"
)
PROCESS_SECS = 60


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment variables of an installation that nobody has used yet."""
    variables = {HOME_VARIABLE: str(tmp_path / "home")}
    if request.param == "sqlite":
        return variables
    return variables | {DATABASE_VARIABLE: request.getfixturevalue("postgres_database")}


@pytest.fixture
def home(environment: dict[str, str]) -> Home:
    return Home.from_environment(environment)


@pytest.fixture
def engine(store: Store) -> sa.Engine:
    return store.ledger.engine


@pytest.fixture
def empty_store(home: Home) -> Iterator[Store]:
    store = open_store(home)
    yield store
    store.ledger.close()


@pytest.fixture
def store(empty_store: Store) -> Store:
    store = empty_store
    store.create_sweep(a_sweep(), [a_trial(0), a_trial(1), a_trial(2, TrialState.REJECTED)])
    return store


def a_sweep() -> NewSweep:
    return NewSweep(
        sweep_id="s-1",
        name="s",
        spec={"privacy": {"policy": "per_trial"}},
        spec_hash="hash",
        dataset="digits:1.0.0",
        dataset_fingerprint="print",
        terms=BudgetTerms(epsilon=3.0, delta=1e-5, policy="per_trial"),
    )


def a_trial(number: int, state: TrialState = TrialState.ADMITTED) -> NewTrial:
    rejected = state is TrialState.REJECTED
    return NewTrial(
        trial_id=f"s-1-{number:03}",
        number=number,
        mechanism=None if rejected else MECHANISM,
        reason="needs 9.1, allowed is 3" if rejected else "",
        config={"learning_rate": 0.5},
        trial_config=None,
        planned_iterations=PLAN,
        planned_epsilon=float("inf") if rejected else 2.5,
    )


def charged(store: Store, trial_id: str = TRIAL) -> int:
    (row,) = [row for row in store.trials("s-1") if row.trial_id == trial_id]
    return row.charged_iterations


def state_of(store: Store, trial_id: str = TRIAL) -> str:
    (row,) = [row for row in store.trials("s-1") if row.trial_id == trial_id]
    return row.state


def kinds(store: Store) -> list[tuple[str, str | None]]:
    return [(message.kind, message.trial_id) for message in store.undelivered()]


def everything(engine: sa.Engine) -> dict[str, list[Any]]:
    """All rows of all tables."""
    metadata = sa.MetaData()
    with reading(engine) as connection:
        metadata.reflect(connection)
        return {
            table.name: sorted(map(repr, connection.execute(sa.select(table))))
            for table in metadata.sorted_tables
        }


# -- creation --------------------------------------------------------------------------------


def test_a_created_sweep_reads_back(store: Store) -> None:
    sweep = store.sweep("s-1")
    assert (sweep.name, sweep.state, sweep.dataset) == ("s", "RUNNING", "digits:1.0.0")
    assert sweep.spec == {"privacy": {"policy": "per_trial"}}
    rows = store.trials("s-1")
    assert [row.state for row in rows] == ["ADMITTED", "ADMITTED", "REJECTED"]
    assert [row.planned_epsilon for row in rows] == [2.5, 2.5, None]
    assert rows[2].reason == "needs 9.1, allowed is 3"
    assert [row.sweep_id for row in store.sweeps()] == ["s-1"]


def test_mlflow_hears_of_the_sweep_and_of_admitted_trials_only(store: Store) -> None:
    assert kinds(store) == [
        ("sweep_start", None),
        ("trial_start", "s-1-000"),
        ("trial_start", "s-1-001"),
    ]


def test_a_sweep_is_created_whole_or_not_at_all(engine: sa.Engine, store: Store) -> None:
    before = everything(engine)
    twin = dataclasses.replace(a_sweep(), sweep_id="s-2")
    with pytest.raises(LedgerError, match=TRIAL):  # s-1 has reserved for the trial already
        store.create_sweep(twin, [a_trial(7), a_trial(0)])
    assert everything(engine) == before
    rejected = [a_trial(7, TrialState.REJECTED), a_trial(2, TrialState.REJECTED)]
    with pytest.raises(DatabaseError, match="onstraint") as caught:  # s-1 has the trial already
        store.create_sweep(twin, rejected)
    assert "INSERT" not in str(caught.value)
    assert everything(engine) == before


def test_an_unknown_sweep_is_named(store: Store) -> None:
    with pytest.raises(StoreError, match="'nope'"):
        store.sweep("nope")


# -- states ----------------------------------------------------------------------------------


def test_a_trial_runs_and_ends(store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    assert (attempt.number, state_of(store)) == (1, "RUNNING")
    store.finish_attempt(attempt, TrialState.PRUNED, "behind the others")
    row = store.trials("s-1")[0]
    assert (row.state, row.reason) == ("PRUNED", "behind the others")
    assert kinds(store)[3:] == [("trial_end", TRIAL)]
    assert store.undelivered()[-1].payload == {"state": "PRUNED", "reason": "behind the others"}


def test_an_ended_trial_may_not_run_again(store: Store) -> None:
    store.finish_attempt(store.begin_attempt(TRIAL), TrialState.COMPLETED)
    with pytest.raises(StoreError, match="COMPLETED"):
        store.begin_attempt(TRIAL)


def test_a_rejected_trial_never_runs(store: Store) -> None:
    with pytest.raises(StoreError, match="REJECTED"):
        store.begin_attempt("s-1-002")


def test_ending_twice_changes_nothing(store: Store) -> None:
    assert store.end_trial(TRIAL, TrialState.CANCELLED, "first") is True
    assert store.end_trial(TRIAL, TrialState.FAILED, "second") is False
    assert store.trials("s-1")[0].reason == "first"
    assert kinds(store).count(("trial_end", TRIAL)) == 1


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.PAUSED, TrialState.QUEUED])
def test_a_trial_ends_in_an_ended_state_only(store: Store, state: TrialState) -> None:
    attempt = store.begin_attempt(TRIAL)
    with pytest.raises(StoreError, match="cannot become"):
        store.finish_attempt(attempt, state)
    assert state_of(store) == "RUNNING"


def test_an_admitted_trial_cannot_complete_without_running(store: Store) -> None:
    with pytest.raises(StoreError, match="cannot become COMPLETED from ADMITTED"):
        store.end_trial(TRIAL, TrialState.COMPLETED)


def test_an_unknown_trial_is_named(store: Store) -> None:
    with pytest.raises(StoreError, match="'nope'"):
        store.begin_attempt("nope")
    with pytest.raises(StoreError, match="'nope'"):
        store.end_trial("nope", TrialState.FAILED)


def test_the_end_of_a_sweep_names_its_artifacts(store: Store) -> None:
    store.end_sweep("s-1", SweepState.COMPLETED, ["/a.png"])
    assert store.sweep("s-1").state == "COMPLETED"
    assert store.sweep("s-1").ended_at is not None
    last = store.undelivered()[-1]
    assert (last.kind, last.payload) == (
        "sweep_end",
        {"state": "COMPLETED", "artifacts": ["/a.png"]},
    )


# -- charges ---------------------------------------------------------------------------------


def test_a_charge_is_monotone_and_idempotent(store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    assert [store.charge(attempt, step) for step in (10, 10, 4, 30, 0)] == [10, 10, 10, 30, 30]
    assert charged(store) == 30


def test_a_charge_beyond_the_plan_changes_nothing(engine: sa.Engine, store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    store.charge(attempt, PLAN - 1)
    before = everything(engine)
    with pytest.raises(OverspentError, match=f"more than the {PLAN} reserved"):
        store.charge(attempt, PLAN + 1)
    after = everything(engine)
    refused = set(after.pop("ledger_journal")) - set(before.pop("ledger_journal"))
    assert len(refused) == 1
    assert "charge_refused" in refused.pop()
    assert after == before
    assert store.charge(attempt, PLAN) == PLAN


def test_a_restart_is_charged_for_the_steps_it_repeats(store: Store) -> None:
    first = store.begin_attempt(TRIAL)
    store.charge(first, 40)
    second = store.begin_attempt(TRIAL, start_step=30)
    assert store.charge(second, 30) == 40
    assert store.charge(second, 45) == 55


def test_a_restart_cannot_claim_steps_that_nobody_paid(engine: sa.Engine, store: Store) -> None:
    store.charge(store.begin_attempt(TRIAL), 40)
    before = everything(engine)
    for step in (41, -1):
        with pytest.raises(StoreError, match="cannot begin at step"):
            store.begin_attempt(TRIAL, start_step=step)
    assert everything(engine) == before


def test_an_older_attempt_is_fenced(engine: sa.Engine, store: Store) -> None:
    old = store.begin_attempt(TRIAL)
    store.charge(old, 10)
    new = store.begin_attempt(TRIAL)
    before = everything(engine)
    with pytest.raises(FencedError):
        store.charge(old, 20)
    with pytest.raises(FencedError):
        store.add_report(old, 10, METRICS)
    with pytest.raises(FencedError):
        store.finish_attempt(old, TrialState.COMPLETED)
    assert everything(engine) == before
    assert store.charge(new, 20) == 30


def test_a_guessed_attempt_is_fenced(store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    with pytest.raises(FencedError):
        store.charge(dataclasses.replace(attempt, attempt_id="0" * 32), 1)
    assert charged(store) == 0


def test_the_attempt_of_an_ended_trial_is_fenced(store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    store.end_trial(TRIAL, TrialState.PRUNED)
    with pytest.raises(FencedError, match="PRUNED"):
        store.charge(attempt, 1)


# -- reports ---------------------------------------------------------------------------------


def a_banded_trial(bands: int, number: int = 0) -> NewTrial:
    facts = {"noise_multiplier": 4.0, "sampling_prob": 0.1, "iterations": PLAN}
    config = TrialConfig(
        **facts,
        data=DataConfig(name="digits"),
        model=ModelConfig(name="logistic_regression"),
        optimizer="sgd",
        learning_rate=1.0,
        l2_clip_norm=1.0,
        expected_batch_size=64.0,
        report_every_steps=10,
        target_delta=1e-5,
        mechanism=MechanismConfig(bands=bands),
    )
    return dataclasses.replace(
        a_trial(number), mechanism=mechanism_of(config), trial_config=config
    )


def ledger_charge(store: Store) -> int:
    return store.ledger.reservation(TRIAL).charged


@pytest.fixture
def banded(empty_store: Store) -> Store:
    empty_store.create_sweep(a_sweep(), [a_banded_trial(8)])
    return empty_store


def test_new_keys_never_share_a_group_of_correlated_steps(banded: Store) -> None:
    first = banded.begin_attempt(TRIAL)
    assert banded.charge(first, 13) == 13
    second = banded.begin_attempt(TRIAL)
    assert charged(banded) == ledger_charge(banded) == 16
    # Else one step more would be the 14th of 16: the second group, and no third.
    assert banded.charge(second, 1) == 17
    third = banded.begin_attempt(TRIAL, start_step=5)
    assert charged(banded) == ledger_charge(banded) == 24
    assert banded.charge(third, 13) == 32
    banded.begin_attempt(TRIAL)
    assert charged(banded) == ledger_charge(banded) == 32, "whole groups stay as they are"
    assert banded.ledger.verify().ok


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_attempts_counts_less_than_was_run(banded: Store, seed: int) -> None:
    rng = random.Random(seed)
    runs: list[int] = []  # steps of each attempt
    with contextlib.suppress(OverspentError):
        while True:
            attempt = banded.begin_attempt(TRIAL)
            runs.append(0)
            for _ in range(rng.randint(0, 3)):
                more = rng.randint(1, 7)
                banded.charge(attempt, runs[-1] + more)
                runs[-1] += more
    # A unit joins at most every eighth step of an attempt.
    assert -(-ledger_charge(banded) // 8) == sum(-(-steps // 8) for steps in runs)


def test_rounding_up_ends_where_the_plan_does(banded: Store) -> None:
    banded.charge(banded.begin_attempt(TRIAL), PLAN - 1)
    again = banded.begin_attempt(TRIAL)
    assert charged(banded) == ledger_charge(banded) == PLAN
    with pytest.raises(OverspentError):
        banded.charge(again, 1)


def test_a_frozen_budget_begins_nothing_anew_that_costs(banded: Store) -> None:
    first = banded.begin_attempt(TRIAL)
    banded.charge(first, 13)
    banded.ledger.freeze("s-1", reason="look first")
    with pytest.raises(OverspentError, match="frozen"):
        banded.begin_attempt(TRIAL)
    assert charged(banded) == ledger_charge(banded) == 13
    banded.ledger.thaw("s-1")
    assert banded.charge(first, 14) == 14, "the first attempt was not fenced"


@pytest.mark.parametrize("bands", [1, None])
def test_independent_noise_is_charged_step_by_step(empty_store: Store, bands: int | None) -> None:
    trial = a_trial(0) if bands is None else a_banded_trial(bands)
    empty_store.create_sweep(a_sweep(), [trial])
    empty_store.charge(empty_store.begin_attempt(TRIAL), 13)
    empty_store.begin_attempt(TRIAL)
    assert charged(empty_store) == ledger_charge(empty_store) == 13


def test_averages_are_reported_beside_the_last_iterate(store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    store.charge(attempt, 9)
    averages = {"ema_eval_accuracy": 0.8, "polyak_eval_loss": float("nan")}
    store.add_report(attempt, 9, METRICS | averages)
    (row,) = store.reports("s-1")
    assert (row.eval_accuracy, row.ema_eval_accuracy) == (0.75, 0.8)
    assert row.polyak_eval_loss is row.polyak_eval_accuracy is None
    told = store.undelivered()[-1].payload["metrics"]
    assert told == METRICS | averages | {"polyak_eval_loss": None}


def test_a_report_waits_for_its_charge(engine: sa.Engine, store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    store.charge(attempt, 9)
    before = everything(engine)
    with pytest.raises(StoreError, match="before it is charged"):
        store.add_report(attempt, 10, METRICS)
    assert everything(engine) == before


def test_a_report_is_kept_once_and_told_once(store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    store.charge(attempt, 10)
    for _ in range(2):
        store.add_report(attempt, 10, METRICS)
    (row,) = store.reports("s-1")
    assert (row.step, row.charged_iterations, row.eval_accuracy) == (10, 10, 0.75)
    assert kinds(store)[3:] == [("metrics", TRIAL)]
    assert store.undelivered()[-1].payload == {"step": 10, "metrics": METRICS}


def test_numbers_that_are_not_finite_become_null(store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    store.charge(attempt, 1)
    store.add_report(
        attempt,
        1,
        {"epsilon": float("inf"), "eval_accuracy": 0.5, "eval_loss": float("nan")},
    )
    (row,) = store.reports("s-1")
    assert (row.epsilon, row.eval_accuracy, row.eval_loss) == (None, 0.5, None)
    metrics = {"epsilon": None, "eval_accuracy": 0.5, "eval_loss": None}
    assert store.undelivered()[-1].payload == {"step": 1, "metrics": metrics}


# -- the outbox ------------------------------------------------------------------------------


def test_delivered_messages_are_not_given_again(store: Store) -> None:
    first, second, third = store.undelivered()
    store.mark_delivered([second.message_id])
    assert store.undelivered() == [first, third]
    assert store.undelivered(after=first.message_id) == [third]
    assert store.undelivered(limit=1) == [first]
    assert store.count_undelivered() == 2


def test_the_outbox_speaks_only_of_what_was_committed(engine: sa.Engine, store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    store.charge(attempt, 1)
    with pytest.raises(exc.SQLAlchemyError):
        store.add_report(attempt, 1, {**METRICS, "no_such_column": 1.0})
    with reading(engine) as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(outbox)) == 3
    assert store.reports("s-1") == []


def test_mlflow_run_ids_are_remembered(store: Store) -> None:
    store.set_mlflow_run_id("s-1", None, "parent")
    store.set_mlflow_run_id("s-1", TRIAL, "child")
    assert store.sweep("s-1").mlflow_run_id == "parent"
    assert [row.mlflow_run_id for row in store.trials("s-1")] == ["child", None, None]


def test_one_delivers_at_a_time(home: Home, store: Store) -> None:
    other = open_store(home)
    with store.delivery_lock() as first, other.delivery_lock() as second:
        assert (first, second) == (True, False)
    with other.delivery_lock() as held:
        assert held
    other.ledger.close()


# -- several at once -------------------------------------------------------------------------


def sum_over_attempts(engine: sa.Engine) -> int:
    query = "SELECT coalesce(sum(charged_step - start_step), 0) FROM attempts"
    with reading(engine) as connection:
        return int(connection.exec_driver_sql(query).scalar_one())


def run_together(jobs: Sequence[threading.Thread]) -> None:
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(PROCESS_SECS)
        assert not job.is_alive()


def test_one_attempt_in_many_threads_is_charged_once(engine: sa.Engine, store: Store) -> None:
    attempt = store.begin_attempt(TRIAL)
    errors: list[BaseException] = []

    def charge_all() -> None:
        try:
            for step in range(1, 31):
                assert store.charge(attempt, step) >= step
        except BaseException as error:
            errors.append(error)

    run_together([threading.Thread(target=charge_all) for _ in range(4)])
    assert errors == []
    assert charged(store) == 30 == sum_over_attempts(engine)


GREEDY = """
import sys
from sweeps.errors import FencedError, OverspentError
from sweeps.home import Home
from sweeps.database.store import open_store

store = open_store(Home.from_environment())
gained, before, spent = 0, 0, False
print("ready", flush=True)
sys.stdin.readline()
while not spent:
    try:
        attempt = store.begin_attempt("s-1-000")
        for step in range(1, 8):
            before = store.charge(attempt, step)
            gained += 1
    except FencedError:
        pass
    except OverspentError:
        spent = True
print(gained, flush=True)
"""


def child(environment: dict[str, str], code: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.slow
def test_racing_processes_never_exceed_the_plan(
    environment: dict[str, str], engine: sa.Engine, store: Store
) -> None:
    processes = [child(environment, GREEDY) for _ in range(3)]
    assert [line_of(process) for process in processes] == ["ready"] * 3
    results = [process.communicate("go\n", timeout=PROCESS_SECS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    # Each charge that returned gained one step, and is in the sum: none was lost.
    assert sum(int(result) for result in results) == PLAN
    assert charged(store) == PLAN == sum_over_attempts(engine)


VICTIM = """
import json, time
from sweeps.home import Home
from sweeps.database.store import open_store

store = open_store(Home.from_environment())
attempt = store.begin_attempt("s-1-000")
step = 0
while True:
    step += 1
    print(json.dumps([step, store.charge(attempt, step)]), flush=True)
    if step == 20:
        time.sleep(600)
"""


@pytest.mark.slow
def test_a_charge_that_returned_survives_kill_9(environment: dict[str, str], store: Store) -> None:
    process = child(environment, VICTIM)
    seen = [json.loads(line_of(process)) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PROCESS_SECS)
    assert process.returncode == -signal.SIGKILL
    assert seen[-1] == [20, 20]
    assert charged(store) == 20
    # Its successor goes on from there, and nothing it left behind is locked.
    assert store.charge(store.begin_attempt(TRIAL, start_step=20), 25) == 25


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


# -- the tables, and how they came to be -----------------------------------------------------


def differences(engine: sa.Engine, *schemas: Schema) -> Sequence[Any]:
    """What the database has other than the metadata of these schemas says."""
    version_tables = {SCHEMA.version_table, LEDGER_SCHEMA.version_table}
    with reading(engine) as connection:
        options = {
            "compare_server_default": True,
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


def test_a_former_database_is_adopted_with_its_rows(home: Home, former: sa.Engine) -> None:
    before = everything(former)
    engine = open_database(home)
    after = everything(engine)
    assert before.pop("schema_version") == ["(1,)"]
    assert after.pop(SCHEMA.version_table) == [f"('{SCHEMA.revisions[-1]}',)"]
    # Of averages there was nothing to measure then.
    before["reports"] = [row[:-1] + ", None" * 4 + ")" for row in before["reports"]]
    assert after == before
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


# -- databases that are not ours -------------------------------------------------------------


def test_a_newer_database_is_refused_and_left_alone(home: Home, engine: sa.Engine) -> None:
    with writing(engine) as connection:
        connection.exec_driver_sql("DROP TABLE reports")
        connection.exec_driver_sql(f"UPDATE {SCHEMA.version_table} SET version_num = '9999'")
    before = everything(engine)
    with pytest.raises(DatabaseError, match=rf"'9999'.* up to '{SCHEMA.revisions[-1]}'"):
        open_database(home)
    assert everything(engine) == before


def test_reopening_changes_nothing(home: Home, engine: sa.Engine, store: Store) -> None:
    before = everything(engine)
    open_database(home).dispose()
    assert everything(engine) == before


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"this is a letter to my aunt, not a database " * 100)
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match="not a database"):
        open_database(Home.from_environment({HOME_VARIABLE: str(tmp_path)}))
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match=r"DP_SWEEPS_HOME=.*file"):
        open_database(Home.from_environment({HOME_VARIABLE: str(tmp_path / "file" / "home")}))


def test_a_server_that_is_away_is_refused_without_its_password(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:secretword@127.0.0.1:1/sweeps"
    variables = {HOME_VARIABLE: str(tmp_path), DATABASE_VARIABLE: url}
    with pytest.raises(DatabaseError) as caught:
        open_database(Home.from_environment(variables))
    assert "127.0.0.1" in str(caught.value)
    assert "secretword" not in str(caught.value)


# -- the laws of charging, in any order ------------------------------------------------------


class Charging(RuleBasedStateMachine):
    """Attempts begin, charge, report and end in any order, beside a model of what they may."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        home = Home.from_environment({HOME_VARIABLE: self._directory.name})
        self.store = open_store(home)
        self.store.create_sweep(a_sweep(), [a_trial(0)])
        self.attempts: list[tuple[Attempt, list[int]]] = []  # with [start, charged step]
        self.ended = False
        self.reported: set[tuple[int, int]] = set()

    def teardown(self) -> None:
        self.store.ledger.close()
        self._directory.cleanup()

    @property
    def total(self) -> int:
        return sum(steps[1] - steps[0] for _, steps in self.attempts)

    @initialize()
    def begin_first(self) -> None:
        self.attempts.append((self.store.begin_attempt(TRIAL), [0, 0]))

    @precondition(lambda self: not self.ended)
    @rule(start=st.integers(0, PLAN))
    def begin(self, start: int) -> None:
        if start <= max(steps[1] for _, steps in self.attempts):
            self.attempts.append((self.store.begin_attempt(TRIAL, start), [start, start]))
        else:
            with pytest.raises(StoreError):
                self.store.begin_attempt(TRIAL, start)

    @rule(which=st.integers(0, 3), step=st.integers(0, PLAN + 5))
    def charge(self, which: int, step: int) -> None:
        """The newest attempt for 0, an older one for more."""
        attempt, steps = self.attempts[-1 - which % len(self.attempts)]
        gained = max(0, step - steps[1])
        if self.ended or attempt is not self.attempts[-1][0]:
            with pytest.raises(FencedError):
                self.store.charge(attempt, step)
        elif self.total + gained > PLAN:
            with pytest.raises(OverspentError):
                self.store.charge(attempt, step)
        else:
            expected = self.total + gained
            steps[1] += gained
            assert self.store.charge(attempt, step) == expected

    @rule(which=st.integers(0, 1), step=st.integers(0, PLAN))
    def report(self, which: int, step: int) -> None:
        attempt, steps = self.attempts[-1 - which % len(self.attempts)]
        if self.ended or attempt is not self.attempts[-1][0] or step > steps[1]:
            with pytest.raises(StoreError):
                self.store.add_report(attempt, step, METRICS)
        else:
            self.store.add_report(attempt, step, METRICS)
            self.reported.add((attempt.number, step))

    @precondition(lambda self: not self.ended)
    @rule(odds=st.integers(0, 9))
    def end(self, odds: int) -> None:
        if odds == 0:
            self.store.finish_attempt(self.attempts[-1][0], TrialState.COMPLETED)
            self.ended = True

    @invariant()
    def the_rows_are_the_model(self) -> None:
        (row,) = self.store.trials("s-1")
        assert row.charged_iterations == self.total <= PLAN
        reports = self.store.reports("s-1")
        assert {(report.attempt, report.step) for report in reports} == self.reported
        told = [message for message in self.store.undelivered() if message.kind == "metrics"]
        assert len(told) == len(self.reported)


@pytest.mark.slow
def test_charges_keep_their_laws_in_any_order() -> None:
    run_state_machine_as_test(
        Charging,
        settings=settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=25,
            stateful_step_count=25,
        ),
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "cannot be read as a URL; allowed are sqlite:///FILE and postgresql"),
        ("postgresql://person:secret@host:port/db", "cannot be read as a URL"),
        ("sqlite://", "in memory, which workers cannot share"),
        ("sqlite:///:memory:", "in memory, which workers cannot share"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str, message: str) -> None:
    with pytest.raises(HomeError, match=message) as caught:
        Home.from_environment({DATABASE_VARIABLE: url})
    assert "secret" not in str(caught.value)
