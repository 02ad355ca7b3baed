"""A process that is killed, wherever it was, leaves a ledger that is sound and goes on.

Points are counted: each statement that begins a transaction or writes, each commit and each note
of the witness, just before and just after. (Between reads nothing changes.) A child goes through
a fixed script and kills itself at one point; then the next child, at the next point, until one
comes through. All of them are forked by a process of this file's own, which has no threads.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from accounting import (
    BudgetExceeded,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    Ledger,
    LedgerError,
    Mechanism,
    Request,
)
from accounting.database.connection import connect, writing
from accounting.ledger.tables import metadata
from accounting.ledger.witness import Witness

ROOT = Path(__file__).parents[3]
EVERYTHING = ["statement", "commit", "witness"]
NOWHERE = -1


def trial(iterations: int) -> Mechanism:
    return DpSgdMechanism(
        noise_multiplier=2.0,
        sampling_prob=0.05,
        iterations=iterations,
        neighboring_relation="zero_out",
    )


def create(ledger: Ledger, name: str, policy: Any, epsilon: float) -> Any:
    return ledger.create_budget(
        name, dataset="d", dataset_fingerprint="f", epsilon=epsilon, delta=1e-5, policy=policy
    )


SCRIPT: list[Callable[[Ledger], Any]] = [
    lambda ledger: create(ledger, "open", "open", 4.0),
    lambda ledger: create(ledger, "list", "declared", 4.0),
    lambda ledger: ledger.grant("open", "a", 0.75),
    lambda ledger: ledger.reserve("open", trial(100), request_id="r1", team="a"),
    lambda ledger: ledger.reserve("open", trial(10**6), request_id="r2", team="a"),
    lambda ledger: ledger.charge("r1", 10),
    lambda ledger: ledger.charge("r1", 60),
    lambda ledger: ledger.reserve_together(
        "list", [Request(request_id=f"l{number}", mechanism=trial(20)) for number in range(3)]
    ),
    lambda ledger: ledger.settle("l2"),
    lambda ledger: ledger.charge("l0", 5),
    lambda ledger: ledger.reserve("list", trial(1), request_id="l3"),
    lambda ledger: ledger.settle("l1"),
    lambda ledger: ledger.freeze("open", by="me", reason="a look"),
    lambda ledger: ledger.charge("r1", 70),
    lambda ledger: ledger.reserve("open", trial(20), request_id="r3", team="a"),
    lambda ledger: ledger.thaw("open"),
    lambda ledger: ledger.charge("r1", 70),
    lambda ledger: ledger.settle("r1"),
    lambda ledger: ledger.ask_again("r2"),
    lambda ledger: ledger.ask_again("r3"),
    lambda ledger: ledger.extend("r1", 120),
    lambda ledger: ledger.extend("r1", 10**6),
    lambda ledger: ledger.charge("r1", 110),
    lambda ledger: ledger.extend("l1", 15),
    lambda ledger: ledger.extend("l1", 21),
    lambda ledger: ledger.reserve(
        "open", trial(10), request_id="fork", prefix=(trial(110),), team="a"
    ),
    lambda ledger: ledger.reserve("open", trial(30), request_id="r4", team="a"),
    lambda ledger: ledger.retire("open"),
]
FOR_NOW = {11, 12, 13, 15, 17}
"""Freezing and thawing, and what is refused between; settling what is extended later: asked again
later, they are done again."""


def answer_of(operation: Callable[[Ledger], Any], ledger: Ledger) -> str:
    try:
        answer = operation(ledger)
    except BudgetExceeded as refusal:
        return repr(vars(refusal))
    except (LedgerError, InvalidPrivacyParameter) as error:
        return repr(error)
    if hasattr(answer, "created_at"):
        answer = dataclasses.replace(answer, created_at=0.0)
    return repr(answer)


# -- dying -----------------------------------------------------------------------------------


class Points:
    """Counts points, and kills this process at one of them."""

    def __init__(self, fatal: int, kinds: list[str]) -> None:
        self.fatal, self.kinds, self.passed = fatal, kinds, 0

    def reached(self, kind: str) -> None:
        if kind not in self.kinds:
            return
        if self.passed == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1

    @contextlib.contextmanager
    def around(self, kind: str) -> Iterator[None]:
        self.reached(kind)
        yield
        self.reached(kind)

    def watch(self, engine: sa.Engine) -> None:
        saw, commit = Witness.saw, engine.dialect.do_commit

        def noting(witness: Witness, head: Any) -> None:
            with self.around("witness"):
                saw(witness, head)

        def committing(connection: Any) -> None:
            with self.around("commit"):
                commit(connection)

        vars(engine.dialect)["do_commit"] = committing
        Witness.saw = noting  # pyright: ignore[reportAttributeAccessIssue]
        for moment in ("before_cursor_execute", "after_cursor_execute"):
            event.listen(engine, moment, self.at_statement)

    def at_statement(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith(("SELECT", "PRAGMA")):
            self.reached("statement")


def child(url: str, witness: Path, points: Points, pipe: int) -> None:
    """Goes through the script, and says after each step what the ledger answered."""
    engine = connect(url)
    ledger = Ledger(engine, witness=witness)
    points.watch(engine)
    for operation in SCRIPT:
        answer = answer_of(operation, ledger)
        after = taken(ledger) if points.fatal == NOWHERE else None
        os.write(pipe, (json.dumps([answer, after]) + "\n").encode())
    ledger.close()


def taken(ledger: Ledger) -> dict[str, list[float]]:
    """Spent, and spent or reserved, of every budget."""
    levels = {budget.name: ledger.status(budget.name).level for budget in ledger.budgets()}
    return {name: [level.spent, level.spent + level.reserved] for name, level in levels.items()}


def run_child(url: str, witness: Path, fatal: int, kinds: list[str]) -> tuple[bool, list[Any]]:
    """Whether the child was killed, and what it had been told by then."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        try:
            child(url, witness, Points(fatal, kinds), writer)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as told:
        lines = told.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0, [json.loads(line) for line in lines]


# -- going on --------------------------------------------------------------------------------


def check(url: str, witness: Path, told: list[Any], undisturbed: list[Any]) -> None:
    """Opens what a killed child left, and goes on with what it had no answer to."""
    engine = connect(url)
    ledger = Ledger(engine, witness=witness)  # nothing is taken for a forgery
    found = ledger.verify()
    assert found.ok, found.problems
    assert [answer for answer, _ in told] == [answer for answer, _ in undisturbed[: len(told)]]
    # What was acknowledged is there, and at most one step more, whole.
    before = taken(ledger)
    assert before in [after for _, after in [("", {}), *undisturbed][len(told) : len(told) + 2]]
    for index in range(len(told)):
        if index not in FOR_NOW:
            answer_of(SCRIPT[index], ledger)
    assert taken(ledger) == before  # duplicates that come late take nothing
    for index in range(len(told), len(SCRIPT)):
        assert answer_of(SCRIPT[index], ledger) == undisturbed[index][0]
    assert taken(ledger) == undisturbed[-1][1]
    assert ledger.verify().ok
    ledger.close()


def clear(engine: sa.Engine, witness: Path) -> None:
    """Empties the ledger, and waits for whatever a server still does for a killed child."""
    witness.unlink(missing_ok=True)
    with writing(engine) as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    engine.dispose()  # a child must not share the parent's connections


def killed_everywhere(url: str, witness: Path, kinds: list[str]) -> int:
    """Kills a child at each point in turn; how many there were."""
    engine = connect(url)
    Ledger(engine, witness=witness).close()
    clear(engine, witness)
    was_killed, undisturbed = run_child(url, witness, NOWHERE, [])
    assert not was_killed
    assert len(undisturbed) == len(SCRIPT)
    for point in itertools.count():
        clear(engine, witness)
        was_killed, told = run_child(url, witness, point, kinds)
        if not was_killed:
            assert len(told) == len(SCRIPT)
            return point
        check(url, witness, told, undisturbed)
    raise AssertionError


def points_survived(url: str, witness: Path, kinds: list[str]) -> int:
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, url, witness, *kinds],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_killed_at_any_point_nothing_is_lost_and_all_goes_on(tmp_path: Path) -> None:
    url, witness = f"sqlite:///{tmp_path / 'ledger.db'}", tmp_path / "ledger.db-witness"
    # Around each of at least 23 commits and notes, and of many more statements.
    assert points_survived(url, witness, EVERYTHING) > 2 * 23 * 4


@pytest.mark.slow
@pytest.mark.postgres
def test_killed_at_any_commit_on_a_server(postgres_database: str, tmp_path: Path) -> None:
    assert points_survived(postgres_database, tmp_path / "witness", ["commit"]) > 2 * 23


if __name__ == "__main__":
    print(killed_everywhere(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))  # noqa: T201
