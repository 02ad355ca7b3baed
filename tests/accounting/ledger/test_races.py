"""Many writers at once: one order of events, nothing is taken twice, nobody waits forever.

Processes and threads get ready, and start together when a pipe is closed.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from accounting import (
    AccountingError,
    BudgetExceeded,
    DatabaseError,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    Ledger,
    LedgerError,
    Mechanism,
    epsilon,
)
from accounting.ledger.witness import Witness
from accounting.renyi import epsilon_of_rdp, step_rdp

ROOT = Path(__file__).parents[3]
SECS = 120
"""After that a thread is taken to wait forever."""

ORDER = 8.0


def trial(iterations: int = 10) -> Mechanism:
    return DpSgdMechanism(
        noise_multiplier=2.0,
        sampling_prob=0.05,
        iterations=iterations,
        neighboring_relation="zero_out",
    )


def create(ledger: Ledger, policy: Any, trials: float, name: str = "b") -> None:
    """A budget that holds so many trials."""
    terms: dict[str, Any] = {}
    if policy == "open":
        rdp = trials * trial().iterations * step_rdp(trial().step, ORDER)
        total, terms["rdp_order"] = epsilon_of_rdp(rdp, 1e-5, ORDER), ORDER
    else:
        total = epsilon(trial(round(10 * trials)), delta=1e-5)
    ledger.create_budget(
        name,
        dataset="d",
        dataset_fingerprint="f",
        epsilon=total,
        delta=1e-5,
        policy=policy,
        **terms,
    )


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    ledger = Ledger(database_url)
    yield ledger
    ledger.close()


def in_threads(count: int, job: Callable[[int], Any]) -> list[Any]:
    """What each of several threads answers, or the error that it met."""
    answers: list[Any] = [None] * count
    start = threading.Barrier(count)

    def work(number: int) -> None:
        start.wait(SECS)
        try:
            answers[number] = job(number)
        except Exception as error:
            answers[number] = error

    threads = [threading.Thread(target=work, args=[n], daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECS)
        assert not thread.is_alive()
    return answers


def in_processes(count: int, ledger: Ledger, job: Callable[[Ledger, int], Any]) -> list[Any]:
    """What each of several processes answers to a function of this file, with its own ledger."""
    url = ledger.engine.url.render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, url, str(count), job.__name__],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fork(count: int, url: str, job: Callable[[Ledger, int], Any]) -> list[Any]:
    """Forks several processes; called where there are no threads yet."""
    ready_end, ready = os.pipe()
    start, start_end = os.pipe()
    children: list[tuple[int, int]] = []
    for number in range(count):
        answer_end, answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(start_end)
                ledger = Ledger(url)
                os.write(ready, b"r")
                os.read(start, 1)  # returns when the parent closes its end
                os.write(answer, json.dumps(job(ledger, number)).encode())
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(answer)
        children.append((pid, answer_end))
    os.close(ready)
    os.close(start)
    for _ in range(count):
        assert os.read(ready_end, 1) == b"r"
    os.close(start_end)
    answers: list[Any] = []
    for pid, answer_end in children:
        with os.fdopen(answer_end) as told:
            answers.append(told.read())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(ready_end)
    return [json.loads(answer) for answer in answers]


def reserve(ledger: Ledger, request_id: str) -> str:
    try:
        return ledger.reserve("b", trial(), request_id=request_id).state
    except BudgetExceeded:
        return "refused"


# -- processes -------------------------------------------------------------------------------


def eight_requests(ledger: Ledger, number: int) -> list[Any]:
    return in_threads(8, lambda thread: reserve(ledger, f"{number}-{thread}"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["open", "declared"])
def test_of_64_writers_one_gets_the_last_place(ledger: Ledger, policy: str) -> None:
    create(ledger, policy, trials=2.5)
    ledger.reserve("b", trial(), request_id="first")
    answers = [a for eight in in_processes(8, ledger, eight_requests) for a in eight]
    assert sorted(answers) == ["open"] + ["refused"] * 63
    counts = ledger.status("b").counts
    assert (counts["open"], counts["refused"]) == (2, 63)
    assert ledger.verify().ok
    assert ledger.head().seq == 1 + 1 + 64


def one_request(ledger: Ledger, _number: int) -> list[Any]:
    return in_threads(8, lambda _thread: reserve(ledger, "the-one"))


@pytest.mark.slow
def test_the_same_request_from_everywhere_is_one_request(ledger: Ledger) -> None:
    create(ledger, "open", trials=1.5)
    assert in_processes(4, ledger, one_request) == [["open"] * 8] * 4
    assert ledger.head().seq == 1 + 1
    assert ledger.verify().ok


def charges(ledger: Ledger, number: int) -> list[int]:
    return [ledger.charge("r", iterations).charged for iterations in range(number + 1, 18, 4)]


@pytest.mark.slow
def test_charges_from_several_processes_add_up_to_the_highest(ledger: Ledger) -> None:
    create(ledger, "open", trials=2.5)
    ledger.reserve("b", trial(20), request_id="r")
    for marks in in_processes(4, ledger, charges):
        assert marks == sorted(marks)  # it never falls
    assert ledger.reservation("r").charged == 17
    noted = [e.facts["iterations"] for e, _ in ledger.entries() if e.kind == "charged"]
    assert noted == sorted(set(noted))  # each charge is paid once
    one = step_rdp(trial().step, ORDER)
    assert ledger.status("b").level.spent == pytest.approx(17 * one, rel=1e-9)
    assert ledger.verify().ok


def extensions(ledger: Ledger, _number: int) -> list[Any]:
    return in_threads(8, lambda _thread: ledger.extend("r", 30).to_json())


@pytest.mark.slow
def test_the_same_extension_from_everywhere_is_one_extension(ledger: Ledger) -> None:
    create(ledger, "open", trials=3.5)
    ledger.reserve("b", trial(), request_id="r")
    ledger.charge("r", 4)
    ledger.settle("r")
    answers = [a for eight in in_processes(4, ledger, extensions) for a in eight]
    assert answers == [ledger.reservation("r").to_json()] * 32
    assert [entry.kind for entry, _ in ledger.entries()].count("extended") == 1
    level = ledger.status("b").level
    one = step_rdp(trial().step, ORDER)
    assert (level.spent, level.reserved) == pytest.approx((4 * one, 26 * one), rel=1e-9)
    assert ledger.verify().ok


def eight_extensions(ledger: Ledger, number: int) -> list[Any]:
    def extend(thread: int) -> str:
        try:
            return ledger.extend(f"r{(8 * number + thread) % 16}", 20).state
        except BudgetExceeded:
            return "refused"

    return in_threads(8, extend)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["open", "declared"])
def test_of_many_that_would_grow_one_gets_the_last_place(ledger: Ledger, policy: str) -> None:
    create(ledger, policy, trials=17.5)
    for number in range(16):
        ledger.reserve("b", trial(), request_id=f"r{number}")
    answers = [a for eight in in_processes(4, ledger, eight_extensions) for a in eight]
    grown = [n for n in range(16) if ledger.reservation(f"r{n}").reserved == 20]
    assert len(grown) == 1
    # Each was asked for twice, and the second time it covers so many already.
    assert sorted(answers) == ["open"] * 2 + ["refused"] * 30
    assert ledger.verify().ok


def eight_askings(ledger: Ledger, number: int) -> list[Any]:
    def ask_again(thread: int) -> str:
        try:
            return ledger.ask_again(f"r{(8 * number + thread) % 16}").state
        except BudgetExceeded:
            return "refused"

    return in_threads(8, ask_again)


@pytest.mark.slow
def test_of_many_that_ask_again_so_many_are_admitted_as_fit(ledger: Ledger) -> None:
    create(ledger, "open", trials=5.5)
    ledger.reserve("b", trial(50), request_id="filler")
    assert {reserve(ledger, f"r{number}") for number in range(16)} == {"refused"}
    ledger.charge("filler", 20)
    ledger.settle("filler")  # 35 steps are free: three trials
    answers = [a for eight in in_processes(4, ledger, eight_askings) for a in eight]
    admitted = [n for n in range(16) if ledger.reservation(f"r{n}").state == "open"]
    assert len(admitted) == 3
    assert 3 <= answers.count("open") <= 6, "each was asked for twice"
    level = ledger.status("b").level
    one = step_rdp(trial().step, ORDER)
    assert (level.spent, level.reserved) == pytest.approx((20 * one, 30 * one), rel=1e-9)
    kinds = [entry.kind for entry, _ in ledger.entries()]
    assert (kinds.count("refused"), kinds.count("reserved_later")) == (16, 3)
    assert ledger.verify().ok


def turn(ledger: Ledger, number: int, thread: int, own: str) -> int:
    budget = "bc"[number % 2]
    moves: list[Callable[[], Any]] = [
        lambda: ledger.reserve(budget, trial(), request_id=own),
        lambda: ledger.charge(own, 3),
        lambda: ledger.freeze("c") if thread == 0 else ledger.status("c"),
        lambda: ledger.thaw("c") if thread == 0 else ledger.status("b"),
        lambda: ledger.charge(own, 5),
        lambda: ledger.settle(own),
        lambda: ledger.extend(own, 12),
        lambda: ledger.verify().ok or 1 / 0,
    ]
    for move in moves[number % 3 :] + moves[: number % 3]:
        with contextlib.suppress(BudgetExceeded, LedgerError):
            move()
    return len(moves)


def mixture(ledger: Ledger, number: int) -> int:
    def some(thread: int) -> int:
        return sum(turn(ledger, number, thread, f"{number}-{thread}-{n}") for n in range(4))

    return sum(in_threads(3, some))


@pytest.mark.slow
def test_a_mix_of_everything_comes_to_an_end_and_adds_up(ledger: Ledger) -> None:
    for name in ("b", "c"):
        create(ledger, "open", trials=30, name=name)
    assert in_processes(4, ledger, mixture) == [3 * 4 * 8] * 4
    assert ledger.verify().ok
    one = step_rdp(trial().step, ORDER)
    for name in ("b", "c"):
        everything = [ledger.reservation(i) for i in ledger.reservation_ids(name)]
        spent = sum(r.charged for r in everything)
        held = sum(r.reserved - r.charged for r in everything if r.state == "open")
        level = ledger.status(name).level
        assert level.spent == pytest.approx(spent * one, rel=1e-9)
        assert level.reserved == pytest.approx(held * one, rel=1e-9)


# -- threads, in one transaction -------------------------------------------------------------


class Counted(list[Any]):
    """A queue that knows how many have come."""

    def __init__(self) -> None:
        super().__init__()
        self.came = 0

    def append(self, one: Any) -> None:
        super().append(one)
        self.came += 1


def gathered(ledger: Ledger, jobs: list[Callable[[], Any]]) -> tuple[list[Any], int]:
    """The answers to requests that all wait for one transaction, and the commits it took."""
    queue = vars(ledger)["_group"]._queue = Counted()
    commits: list[object] = []
    held = threading.Event()

    def job(number: int) -> Any:
        if number < len(jobs):
            assert held.wait(SECS)
            return jobs[number]()
        with ledger.transaction():
            event.listen(ledger.engine, "commit", lambda connection: commits.append(connection))
            held.set()
            deadline = time.monotonic() + SECS
            while queue.came < len(jobs):
                assert time.monotonic() < deadline
                time.sleep(0)
        return None

    return in_threads(len(jobs) + 1, job)[:-1], len(commits)


def test_a_bad_request_leaves_the_others_in_its_transaction_alone(ledger: Ledger) -> None:
    create(ledger, "open", trials=20)
    ledger.reserve("b", trial(), request_id="old")
    jobs: list[Callable[[], Any]] = [
        *(lambda n=n: ledger.charge("old", n) for n in range(1, 9)),
        lambda: ledger.charge("old", 11),
        lambda: ledger.charge("unknown", 1),
        lambda: ledger.charge("old", 1.5),  # pyright: ignore[reportArgumentType]
        lambda: ledger.settle("unknown"),
    ]
    answers, commits = gathered(ledger, jobs)
    assert [answer.charged >= n for n, answer in enumerate(answers[:8], 1)] == [True] * 8
    assert [type(answer) for answer in answers[8:]] == [
        BudgetExceeded,
        LedgerError,
        InvalidPrivacyParameter,
        LedgerError,
    ]
    assert commits <= 3  # of the one that held them up, of who came first, of all the others
    assert ledger.reservation("old").charged == 8
    assert ledger.verify().ok


def test_where_a_transaction_fails_nothing_in_it_happened(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(ledger, "open", trials=20)
    before = ledger.head()
    do_commit = ledger.engine.dialect.do_commit
    broken = threading.Event()

    def failing(connection: Any) -> None:
        if broken.is_set():
            raise ledger.engine.dialect.loaded_dbapi.OperationalError("the disk is full")
        do_commit(connection)

    monkeypatch.setattr(ledger.engine.dialect, "do_commit", failing)
    for number in range(3):  # what they look up beforehand is no part of it
        with contextlib.suppress(AccountingError):
            ledger.reserve("b", trial(999_999), request_id=f"known-{number}")
    known = ledger.head()
    assert known.seq == before.seq + 3
    ledger.reserve("b", trial(), request_id="r")
    noted = ledger.head()
    broken.set()
    answers = in_threads(6, lambda n: ledger.charge("r", n + 1))
    broken.clear()
    assert {type(answer) for answer in answers} == {DatabaseError}
    assert len(set(map(id, answers))) == 6
    assert ledger.head() == noted
    assert ledger.reservation("r").charged == 0
    assert ledger.charge("r", 6).charged == 6
    assert ledger.verify().ok


# -- the witness -----------------------------------------------------------------------------


def test_who_opens_or_verifies_while_another_writes_sees_no_forgery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    writer = Ledger(url)
    create(writer, "open", trials=100)
    numbers = iter(range(100))
    read = Witness.read

    def interrupted(witness: Witness) -> Any:
        # At the worst moment: after whoever looks has begun, before he reads the witness.
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr(Witness, "read", read)
            writer.reserve("b", trial(1), request_id=f"r{next(numbers)}")
        return read(witness)

    monkeypatch.setattr(Witness, "read", interrupted)
    reader = Ledger(url)
    found = reader.verify()
    assert found.problems == ()
    assert next(numbers) >= 3
    reader.close()
    writer.close()


if __name__ == "__main__":
    _, url, count, name = sys.argv
    print(json.dumps(fork(int(count), url, globals()[name])))  # noqa: T201
