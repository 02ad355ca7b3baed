"""The same request, made again at any time by anybody, gets the same answer and costs nothing."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from accounting import (
    BandedMatrixFactorizationMechanism,
    BudgetExceeded,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    Ledger,
    LedgerError,
    Mechanism,
    Request,
    Reservation,
)
from accounting.renyi import rdp_limit, step_rdp

ROOT = Path(__file__).parents[3]
PROCESS_SECS = 120
EPSILON, DELTA, ORDER = 4.0, 1e-5, 5.0


def trial(iterations: int = 10, noise: float = 2.0) -> Mechanism:
    return DpSgdMechanism(
        noise_multiplier=noise,
        sampling_prob=0.05,
        iterations=iterations,
        neighboring_relation="zero_out",
    )


def create(ledger: Ledger, name: str = "b", policy: Any = "open", **terms: Any) -> Any:
    if policy == "open":
        terms["rdp_order"] = ORDER
    return ledger.create_budget(
        name,
        dataset="d",
        dataset_fingerprint="f",
        epsilon=EPSILON,
        delta=DELTA,
        policy=policy,
        **terms,
    )


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    ledger = Ledger(database_url)
    yield ledger
    assert ledger.verify().ok
    ledger.close()


def answer_of(operation: Callable[[], Any]) -> Any:
    try:
        return operation()
    except BudgetExceeded as refusal:
        return vars(refusal)


TOO_MUCH = 10**7


# -- again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["open", "declared", "per_trial"])
@pytest.mark.parametrize("iterations", [10, TOO_MUCH])
def test_a_request_made_again_gets_the_same_answer(
    ledger: Ledger, policy: str, iterations: int
) -> None:
    create(ledger, policy=policy)
    first = answer_of(lambda: ledger.reserve("b", trial(iterations), request_id="r"))
    head, level = ledger.head(), ledger.status("b").level
    for other in (ledger, Ledger(ledger.engine)):
        again = answer_of(
            lambda other=other: other.reserve("b", trial(iterations), request_id="r")
        )
        assert again == first
    assert (ledger.head(), ledger.status("b").level) == (head, level)


def test_a_refusal_stays_a_refusal_and_an_admission_an_admission(ledger: Ledger) -> None:
    create(ledger)
    most = math.floor(rdp_limit(EPSILON, DELTA, ORDER) / step_rdp(trial().step, ORDER))
    first = ledger.reserve("b", trial(most), request_id="first")
    refused = answer_of(lambda: ledger.reserve("b", trial(1), request_id="second"))
    assert refused["unit"] == "rdp"
    ledger.settle("first")  # now there is room
    assert answer_of(lambda: ledger.reserve("b", trial(1), request_id="second")) == refused
    assert ledger.reserve("b", trial(1), request_id="third").state == "open"
    again = ledger.reserve("b", trial(most), request_id="first")
    assert again == dataclasses.replace(first, state="released", committed=0)
    ledger.freeze("b")
    assert ledger.reserve("b", trial(1), request_id="third").state == "open"
    with pytest.raises(LedgerError, match="was refused"):
        ledger.charge("second", 1)


@pytest.mark.parametrize(
    ("budget", "mechanism", "team"),
    [
        ("b", trial(11), ""),
        ("b", trial(10, 2.0000001), ""),
        ("b", trial(10), "team"),
        ("c", trial(10), ""),
        (
            "b",
            BandedMatrixFactorizationMechanism(
                noise_multiplier=2.0,
                sampling_prob=0.05,
                iterations=10,
                bands=1,
                neighboring_relation="zero_out",
            ),
            "",
        ),
    ],
)
def test_an_id_stands_for_one_request_alone(
    ledger: Ledger, budget: str, mechanism: Mechanism, team: str
) -> None:
    create(ledger, "b")
    create(ledger, "c")
    ledger.reserve("b", trial(10), request_id="r")
    head = ledger.head()
    with pytest.raises(LedgerError, match="was another one"):
        ledger.reserve(budget, mechanism, request_id="r", team=team)
    one = Request(request_id="n", mechanism=trial())
    with pytest.raises(LedgerError, match="same request_id"):
        ledger.reserve_together("b", [one, one])
    assert ledger.head() == head


def test_a_list_made_again_with_more_in_it_decides_on_the_rest_alone(ledger: Ledger) -> None:
    create(ledger, policy="declared")
    requests = [Request(request_id=f"r{n}", mechanism=trial(10 + n)) for n in range(700)]
    first = ledger.reserve_together("b", requests[:600])
    level = ledger.status("b").level
    assert ledger.reserve_together("b", requests[:600]) == first
    assert ledger.status("b").level == level
    assert ledger.reserve_together("b", requests)[:600] == first
    assert ledger.head().seq == 1 + 700


def test_charges_and_settlements_that_come_late_or_twice_change_nothing(ledger: Ledger) -> None:
    create(ledger)
    ledger.reserve("b", trial(10), request_id="r")
    assert ledger.charge("r", 6).charged == 6
    head = ledger.head()
    for late in (6, 3, 1, 0):
        assert ledger.charge("r", late).charged == 6
    assert ledger.head() == head
    with pytest.raises(BudgetExceeded, match="11 iterations are more than the 10"):
        ledger.charge("r", 11)
    assert ledger.reservation("r").charged == 6
    settled = ledger.settle("r")
    assert (settled.state, settled.charged) == ("closed", 6)
    head = ledger.head()
    assert ledger.settle("r") == settled
    assert ledger.charge("r", 6) == settled
    with pytest.raises(LedgerError, match="is settled"):
        ledger.charge("r", 7)
    assert ledger.head() == head


def test_budgets_shares_and_states_asked_for_again_are_as_they_were(ledger: Ledger) -> None:
    made = create(ledger)
    assert create(ledger) == made
    others: list[dict[str, Any]] = [{"one_off": True}, {"privacy_unit": "user"}]
    for terms in others:
        with pytest.raises(LedgerError, match="other terms"):
            create(ledger, **terms)
    steps: list[Callable[[], Any]] = [
        lambda: ledger.grant("b", "a", 0.5),
        lambda: ledger.freeze("b"),
        lambda: ledger.thaw("b"),
        lambda: ledger.retire("b"),
    ]
    for step in steps:
        before = ledger.head().seq
        answer = step()
        head = ledger.head()
        assert head.seq == before + 1
        assert step() == answer
        assert ledger.head() == head
    with pytest.raises(LedgerError, match="for good"):
        ledger.thaw("b")


# -- several moves in one transaction --------------------------------------------------------


def test_moves_in_one_transaction_see_each_other(ledger: Ledger) -> None:
    create(ledger)
    most = math.floor(rdp_limit(EPSILON, DELTA, ORDER) / step_rdp(trial().step, ORDER))

    def asked(name: str) -> list[Request]:
        return [Request(request_id=name, mechanism=trial(most))]

    with ledger.transaction() as transaction:
        (first,) = transaction.reserve("b", asked("first"))
        transaction.set_state("b", "frozen")
        transaction.set_state("b", "active")
        (second,) = transaction.reserve("b", asked("second"))
        transaction.settle("first")
        (third,) = transaction.reserve("b", asked("third"))
        transaction.charge("third", most)
        transaction.grant("b", "team", 0.0)
        transaction.settle("third")
        (fourth,) = transaction.reserve("b", asked("fourth"))
    states = [answer.state for answer in (first, second, third, fourth)]
    assert states == ["open", "refused", "open", "refused"]
    assert ledger.status("b").level.epsilon <= EPSILON
    assert third.verdict.spent == 0


def test_what_a_transaction_charged_counts_as_spent_within_it(ledger: Ledger) -> None:
    create(ledger)
    with ledger.transaction() as transaction:
        transaction.reserve("b", [Request(request_id="r", mechanism=trial(10))])
        transaction.charge("r", 4)
        (answer,) = transaction.reserve("b", [Request(request_id="s", mechanism=trial(10))])
    one = step_rdp(trial().step, ORDER)
    assert answer.verdict.spent == pytest.approx(4 * one, rel=1e-12)
    assert answer.verdict.reserved == pytest.approx(6 * one, rel=1e-12)


# -- in another process ----------------------------------------------------------------------

AGAIN = """
import json, sys
from accounting import BudgetExceeded, Ledger
from accounting.mechanism import mechanism_from_json
ledger = Ledger(sys.argv[1])
answers = []
for name, mechanism in json.loads(sys.argv[2]):
    try:
        answer = ledger.reserve("b", mechanism_from_json(mechanism), request_id=name)
        answers.append(answer.to_json())
    except BudgetExceeded as refusal:
        answers.append(vars(refusal))
print(json.dumps(answers))
ledger.close()
"""


@pytest.mark.slow
def test_another_process_gets_the_same_answers_to_the_last_bit(ledger: Ledger) -> None:
    create(ledger)
    asked = [("r", trial(10)), ("s", trial(TOO_MUCH)), ("t", trial(3, noise=0.1 + 0.2))]
    answers: list[Any] = []
    for name, mechanism in asked:
        answer = answer_of(lambda n=name, m=mechanism: ledger.reserve("b", m, request_id=n))
        answers.append(answer.to_json() if isinstance(answer, Reservation) else answer)
    head = ledger.head()
    url = ledger.engine.url.render_as_string(hide_password=False)
    given = json.dumps([(name, mechanism.to_json()) for name, mechanism in asked])
    told = subprocess.run(
        [sys.executable, "-c", AGAIN, url, given],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
        timeout=PROCESS_SECS,
    )
    assert json.loads(told.stdout) == answers
    assert ledger.head() == head


# -- against a model -------------------------------------------------------------------------


class Model(RuleBasedStateMachine):
    """A ledger beside a dictionary that says what it should hold."""

    requests = Bundle("requests")

    @initialize(epsilon=st.floats(3, 9))
    def begin(self, epsilon: float) -> None:
        self.ledger = Ledger("sqlite://")
        self.ledger.create_budget(
            "b",
            dataset="d",
            dataset_fingerprint="f",
            epsilon=epsilon,
            delta=DELTA,
            policy="open",
            rdp_order=ORDER,
        )
        self.limit = rdp_limit(epsilon, DELTA, ORDER)
        self.held: dict[str, list[Any]] = {}  # mechanism, charged, state
        self.answers: dict[str, Any] = {}
        self.frozen = False

    def cost(self, mechanism: Mechanism, iterations: int) -> float:
        return iterations * step_rdp(mechanism.step, ORDER)

    def sums(self) -> tuple[float, float]:
        spent = reserved = 0.0
        for mechanism, charged, state in self.held.values():
            spent += self.cost(mechanism, charged)
            if state == "open":
                reserved += self.cost(mechanism, mechanism.iterations - charged)
        return spent, reserved

    @rule(target=requests, part=st.floats(0.01, 0.7), noise=st.sampled_from([1.0, 2.0]))
    def reserve(self, part: float, noise: float) -> Any:
        mechanism = trial(1, noise)
        iterations = max(1, round(part * self.limit / step_rdp(mechanism.step, ORDER)))
        mechanism = mechanism.after(iterations)
        name = f"r{len(self.answers)}"
        fits = sum(self.sums()) + self.cost(mechanism, iterations) <= self.limit
        self.answers[name] = answer_of(
            lambda: self.ledger.reserve("b", mechanism, request_id=name)
        )
        admitted = isinstance(self.answers[name], Reservation)
        assert admitted == (fits and not self.frozen)
        self.held[name] = [mechanism, 0, "open" if admitted else "refused"]
        return name

    @rule(name=requests)
    def again(self, name: str) -> None:
        first, (mechanism, charged, state) = self.answers[name], self.held[name]
        asked = first.request.mechanism if isinstance(first, Reservation) else mechanism
        answer = answer_of(lambda: self.ledger.reserve("b", asked, request_id=name))
        if isinstance(first, Reservation):
            assert answer.request == first.request
            assert (answer.mechanism, answer.charged, answer.state) == (mechanism, charged, state)
        else:
            assert answer == first

    @rule(name=requests)
    def ask_again(self, name: str) -> None:
        mechanism, charged, state = self.held[name]
        fits = sum(self.sums()) + self.cost(mechanism, mechanism.iterations) <= self.limit
        answer = answer_of(lambda: self.ledger.ask_again(name))
        if state != "refused":
            assert (answer.mechanism, answer.charged, answer.state) == (mechanism, charged, state)
            return
        assert isinstance(answer, Reservation) == (fits and not self.frozen)
        self.answers[name] = answer
        if isinstance(answer, Reservation):
            self.held[name][2] = "open"

    @rule(name=requests, part=st.floats(0, 1.2))
    def charge(self, name: str, part: float) -> None:
        mechanism, charged, state = self.held[name]
        iterations = round(part * mechanism.iterations)
        try:
            answer = self.ledger.charge(name, iterations)
        except BudgetExceeded:
            assert state == "open"
            assert self.frozen or iterations > mechanism.iterations
        except LedgerError:
            assert state == "refused" or (state != "open" and iterations > charged)
        else:
            assert state != "refused"
            assert iterations <= charged or not self.frozen
            self.held[name][1] = max(charged, iterations)
            assert answer.charged == self.held[name][1]

    @rule(name=requests)
    def settle(self, name: str) -> None:
        _, charged, state = self.held[name]
        if state == "open":
            self.held[name][2] = "closed" if charged else "released"
        assert self.ledger.settle(name).state == self.held[name][2]

    @rule(name=requests, part=st.floats(0.1, 2))
    def extend(self, name: str, part: float) -> None:
        mechanism, charged, state = self.held[name]
        iterations = max(1, round(part * mechanism.iterations))
        covered = state == "open" and iterations <= mechanism.iterations
        counts = mechanism.iterations if state == "open" else charged
        fits = sum(self.sums()) + self.cost(mechanism, iterations - counts) <= self.limit
        try:
            answer = self.ledger.extend(name, iterations)
        except BudgetExceeded:
            assert not covered
            assert self.frozen or not fits
        except InvalidPrivacyParameter:
            assert iterations < charged
        except LedgerError:
            assert state == "refused"
        else:
            assert covered or (fits and not self.frozen)
            self.held[name] = [answer.mechanism, charged, answer.state]
            assert answer.state == "open"
            assert answer.reserved == max(iterations, mechanism.iterations * covered)

    @rule()
    def freeze_or_thaw(self) -> None:
        self.frozen = not self.frozen
        (self.ledger.freeze if self.frozen else self.ledger.thaw)("b")

    @invariant()
    def sums_agree(self) -> None:
        if not hasattr(self, "held"):
            return
        level = self.ledger.status("b").level
        assert (level.spent, level.reserved) == pytest.approx(self.sums(), rel=1e-9, abs=1e-12)

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            found = self.ledger.verify()
            assert found.ok, found.problems
            self.ledger.close()


test_a_ledger_is_what_a_dictionary_says = pytest.mark.slow(Model.TestCase)
Model.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
