"""The ledger: budgets, reservations and their journal, durable and shared.

    ledger = Ledger("sqlite:////srv/ledger.db")
    ledger.create_budget("scans", dataset="scans", dataset_fingerprint="...", epsilon=8.0,
                         delta=1e-5, policy="open")
    ledger.reserve("scans", mechanism, request_id="trial-1")   # or raises BudgetExceeded
    ledger.charge("trial-1", 100)       # before anything of the first 100 steps is seen
    ledger.settle("trial-1")            # what never ran is free again
    ledger.extend("trial-1", 500)       # taken up again, if there is room for the rest
    ledger.ask_again("trial-2")         # refused before; by now others have given back

Every decision is one transaction under one lock, so two writers cannot both take the last of a
budget. Every method may be called again with the same arguments, after a crash for instance: it
gives the same answer and charges nothing twice. Several processes may have the same ledger open;
one `Ledger` may be used from several threads.
"""

import contextlib
import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import get_args

import sqlalchemy as sa

from accounting import _validate
from accounting.account import Account, Claim
from accounting.database.connection import connect, reading, writing
from accounting.database.schema import upgrade
from accounting.errors import (
    AccountingError,
    BudgetExceeded,
    InvalidPrivacyParameter,
    LedgerError,
    LedgerTampered,
)
from accounting.ledger import journal as journal_module
from accounting.ledger.group_commit import GroupCommit
from accounting.ledger.journal import Entry, Head, Inspected
from accounting.ledger.lookup import (
    budget_row,
    find_reservation,
    load_account,
    read_shares,
)
from accounting.ledger.records import Budget, Request, Reservation, ReservationState, budget_of
from accounting.ledger.status import BudgetStatus, read_status
from accounting.ledger.tables import SCHEMA, budgets, reservations
from accounting.ledger.transaction import LedgerTransaction, check_call
from accounting.ledger.verification import Verification, verify
from accounting.ledger.witness import Witness
from accounting.mechanism import Mechanism, NeighboringRelation, PrivacyUnit
from accounting.policies import Policy
from accounting.renyi import step_rdp
from accounting.terms import BudgetTerms, Spending

_HASH = re.compile(r"[0-9a-f]{64}")
_LEDGER_LOCK = 0x6470_7379  # any number that is ours alone


class Ledger:
    """A durable ledger in a database.

    Args:
        database: A URL (see `accounting.database.connection.connect`), or an engine from there.
        witness: File that remembers the journal's end outside the database, so that a rollback
            is noticed. None: beside a SQLite file; no witness for other databases.
        check: Whether a damaged ledger is an error at once. False is for looking at one: it opens,
            says so in `damage`, and refuses to write.

    Raises:
        DatabaseError: The database cannot be reached, or belongs to a newer version.
        LedgerTampered: The journal's end is not what was written. Nothing is done then.
    """

    def __init__(
        self,
        database: str | sa.URL | sa.Engine,
        *,
        witness: Path | None = None,
        check: bool = True,
    ) -> None:
        self._engine = database if isinstance(database, sa.Engine) else connect(database)
        upgrade(self._engine, SCHEMA)
        self._witness = _witness(self._engine, witness)
        self._terms: dict[str, BudgetTerms] = {}
        self._group = GroupCommit(self.transaction)
        self._damage = ""
        try:
            with reading(self._engine) as connection:
                if self._witness is not None:  # before this sees any moment of the journal
                    self._witness.check(connection)
                journal_module.check_end(connection)
        except LedgerTampered as error:
            if check:
                raise
            self._damage = str(error)

    @property
    def damage(self) -> str:
        """What was wrong with the journal's end when the ledger was opened; empty if nothing."""
        return self._damage

    @property
    def engine(self) -> sa.Engine:
        """The database, for rows of other rooms."""
        return self._engine

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()

    # -- transactions -------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Generator[LedgerTransaction]:
        """One transaction under the ledger's lock, durable when the block has ended.

        Raises:
            DatabaseError: The database failed, and nothing was changed; or all of it is durable,
                and the witness could not be told.
            LedgerTampered: The ledger is damaged and was opened to be looked at, or was put back
                to an older copy since.
        """
        if self._damage:
            raise LedgerTampered(self._damage)
        with writing(self._engine) as connection:
            if self._engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LEDGER_LOCK)))
            transaction = LedgerTransaction(connection)
            yield transaction
            head = transaction.flush()
            if head is not None and self._witness is not None:
                self._witness.check(connection, transaction.journal.before)
        if head is not None and self._witness is not None:
            self._witness.saw(head)

    # -- budgets ------------------------------------------------------------------------------

    def create_budget(
        self,
        name: str,
        *,
        dataset: str,
        dataset_fingerprint: str,
        epsilon: float,
        delta: float,
        policy: Policy,
        neighboring_relation: NeighboringRelation = "zero_out",
        privacy_unit: PrivacyUnit = "example",
        rdp_order: float | None = None,
        one_off: bool = False,
        by: str = "",
    ) -> Budget:
        """Makes a budget for a protected data set.

        Args:
            name: Unique; letters, digits and a little punctuation.
            dataset: What the data set is called.
            dataset_fingerprint: What tells it from others of that name.
            epsilon: Finite, > 0.
            delta: In [1e-10, 1).
            policy: What the promise covers; see `accounting.policies`.
            neighboring_relation: See `Mechanism`.
            privacy_unit: See `Mechanism`.
            rdp_order: The order of the filter under `open`, > 1; None takes a good one.
            one_off: Whether it is made for one sweep alone.
            by: Who made it, for the journal.

        Returns:
            The budget; the one that is there already, if its terms are the same.

        Raises:
            InvalidPrivacyParameter: A field is of the wrong type or out of range.
            LedgerError: There is a budget of that name with other terms.
        """
        terms = BudgetTerms(
            epsilon=epsilon,
            delta=delta,
            policy=policy,
            neighboring_relation=neighboring_relation,
            privacy_unit=privacy_unit,
            rdp_order=rdp_order,
        )
        with self.transaction() as transaction:
            return transaction.create_budget(
                name,
                dataset=dataset,
                dataset_fingerprint=dataset_fingerprint,
                terms=terms,
                one_off=one_off,
                by=by,
                any_order=rdp_order is None,
            )

    def grant(self, name: str, team: str, share: float, *, by: str = "") -> Budget:
        """Gives a team a share of a budget, in the place of the one that it has.

        From the first grant on, only teams with a share may reserve, each within its own.

        Args:
            name: The budget.
            team: Whom to give it.
            share: In [0, 1]; kept in millionths. All shares together are at most 1.
            by: Who granted it, for the journal.

        Raises:
            InvalidPrivacyParameter: The share is more than the others leave, less than the team
                has taken, or the budget cannot be divided.
            LedgerError: There is no such budget.
        """
        with self.transaction() as transaction:
            return transaction.grant(name, team, share, by=by)

    def freeze(self, name: str, *, by: str = "", reason: str = "") -> Budget:
        """Stops a budget: nothing is reserved, and nothing more is charged, until it is thawed.

        Running trials end at their next charge.
        """
        with self.transaction() as transaction:
            return transaction.set_state(name, "frozen", by=by, reason=reason)

    def thaw(self, name: str, *, by: str = "", reason: str = "") -> Budget:
        """Lets a frozen budget go on.

        Raises:
            LedgerError: It is retired, which is for good.
        """
        with self.transaction() as transaction:
            return transaction.set_state(name, "active", by=by, reason=reason)

    def retire(self, name: str, *, by: str = "", reason: str = "") -> Budget:
        """Ends a budget for good and settles what is open."""
        with self.transaction() as transaction:
            return transaction.set_state(name, "retired", by=by, reason=reason)

    def budget(self, name: str) -> Budget:
        """Returns a budget.

        Raises:
            LedgerError: There is no such budget.
        """
        with reading(self._engine) as connection:
            return budget_of(budget_row(connection, name), read_shares(connection, name))

    def budgets(self) -> list[Budget]:
        """Returns all budgets, newest first."""
        with reading(self._engine) as connection:
            rows = connection.execute(
                sa.select(budgets).order_by(budgets.c.created_at.desc(), budgets.c.name)
            ).all()
            return [budget_of(row, read_shares(connection, row.name)) for row in rows]

    def status(self, name: str) -> BudgetStatus:
        """Returns how much of a budget is spent, reserved and free.

        Raises:
            LedgerError: There is no such budget.
        """
        with reading(self._engine) as connection:
            return read_status(connection, name)

    def account(self, name: str) -> Account:
        """Returns a copy in memory, to try out what would be decided.

        Raises:
            LedgerError: There is no such budget.
        """
        with reading(self._engine) as connection:
            return load_account(connection, name)

    # -- reservations -------------------------------------------------------------------------

    def reserve(
        self,
        budget: str,
        mechanism: Spending,
        *,
        request_id: str,
        prefix: tuple[Mechanism, ...] = (),
        team: str = "",
        dataset_fingerprint: str | None = None,
    ) -> Reservation:
        """Reserves what a trial may spend, or refuses.

        Args:
            budget: Name of the budget.
            mechanism: What would run: a `Mechanism`; a `Selection` under `private_selection`.
            request_id: The caller's name for it, unique in the ledger. Repeated with the same
                request it gives the same answer.
            prefix: What was spent before on the parameters that the trial starts from; see
                `Request`.
            team: Who pays, where the budget is divided.
            dataset_fingerprint: What would be trained on; None does not check.

        Returns:
            The reservation, in whatever state it is by now.

        Raises:
            BudgetExceeded: It does not fit; the journal says why, and so does a repetition,
                unless it is asked again (`ask_again`) in between.
            InvalidPrivacyParameter: The request makes no sense, or does not suit the budget.
            LedgerError: There is no such budget, or the id stands for another request.
        """
        (answer,) = self.reserve_together(
            budget,
            [Request(request_id=request_id, mechanism=mechanism, prefix=prefix)],
            team=team,
            dataset_fingerprint=dataset_fingerprint,
        )
        if answer.state == "refused":
            raise answer.refusal
        return answer

    def reserve_together(
        self,
        budget: str,
        requests: Sequence[Request],
        *,
        team: str = "",
        dataset_fingerprint: str | None = None,
    ) -> list[Reservation]:
        """Decides on several requests in one transaction.

        Under `declared` and `private_selection` they are one list, admitted or refused as a
        whole; under the other policies each is decided in turn.

        Returns:
            One answer for each request; a refusal is a reservation in the state "refused".

        Raises:
            InvalidPrivacyParameter: A request makes no sense, or does not suit the budget.
            LedgerError: There is no such budget, or an id stands for another request.
        """
        check_call(budget, requests, team, dataset_fingerprint)
        self._reckon_beforehand(budget, [request.claim for request in requests], team)
        return self._group.run(
            lambda transaction: transaction.reserve(
                budget, requests, team=team, dataset_fingerprint=dataset_fingerprint
            ),
            [request.request_id for request in requests],
        )

    def _reckon_beforehand(self, budget: str, claims: Sequence[Claim], team: str) -> None:
        """Computes outside the lock what the decision will look up, so that nobody waits.

        What it finds is not used: between here and there somebody else may reserve.
        """
        terms = self._terms.get(budget)  # They never change.
        account = None if terms is not None and terms.policy == "open" else self.account(budget)
        if account is not None:
            terms = self._terms[budget] = account.terms
        assert terms is not None
        for claim in claims:
            terms.check_suits(claim.spending, claim.prefix)
        if terms.policy != "open":
            assert account is not None
            account.decide(claims, team)
            return
        mechanisms = [c.spending for c in claims if isinstance(c.spending, Mechanism)]
        with contextlib.suppress(AccountingError):  # The decision will meet it again.
            for step in {mechanism.step for mechanism in mechanisms}:
                step_rdp(step, terms.order)

    def ask_again(self, request_id: str) -> Reservation:
        """Decides anew on a request that was refused, under `open`: others may have given back.

        The refusal stays in the journal, and beside it whatever is decided now. To repeat a
        request (`reserve`) is not to ask again: it gets the answer that there is.

        Args:
            request_id: Of a request that was made before.

        Returns:
            The reservation: open now, or as it is, where it was admitted before.

        Raises:
            BudgetExceeded: It does not fit now, either, or the budget is frozen or retired.
            LedgerError: There is no such request, or it was refused under another policy: alone
                it is too dear for good, and a list is refused as a whole.
        """
        name = _validate.name("request_id", request_id)
        with contextlib.suppress(InvalidPrivacyParameter, LedgerError):
            found = self.reservation(name)
            if found.may_be_asked_again:
                self._reckon_beforehand(found.budget, [found.request.claim], found.team)
        answer = self._group.run(lambda transaction: transaction.ask_again(name), [name])
        if answer.state == "refused":
            raise answer.refusal
        return answer

    def extend(self, request_id: str, iterations: int) -> Reservation:
        """Has a reservation cover so many iterations, and opens it again if it was settled.

        For a trial that was stopped and is taken up again, that is to run longer than it was
        meant to, or that has to repeat steps after a crash and pays for them. `per_trial` decides
        on all iterations, the other policies on those that do not count already. Nothing is
        added to a list that has begun: under `declared` a stopped trial may go on, for free, up
        to what was declared, and a private selection cannot be extended.

        Args:
            request_id: Of a reservation of a mechanism, in any state but "refused".
            iterations: How many may run in all, those that were charged included.

        Returns:
            The reservation: open, of `iterations` iterations; unchanged, where it is open and
            covers so many.

        Raises:
            BudgetExceeded: It does not fit, the policy does not allow it, or the budget is frozen
                or retired. The journal says why; the reservation stays as it was.
            InvalidPrivacyParameter: `iterations` is not an integer from 1 to 1e12, or less than
                what is charged.
            LedgerError: There is no such reservation, or it was refused.
        """
        name = _validate.name("request_id", request_id)
        self._reckon_extension(name, iterations)
        answer = self._group.run(lambda transaction: transaction.extend(name, iterations), [name])
        if isinstance(answer, BudgetExceeded):
            raise answer
        return answer

    def _reckon_extension(self, request_id: str, iterations: int) -> None:
        """As `_reckon_beforehand`; whatever is wrong, the decision will meet again."""
        with contextlib.suppress(InvalidPrivacyParameter, LedgerError):
            found = self.reservation(request_id)
            claim = found.claim(iterations)
            if found.state != "refused" and claim.spending != found.mechanism:
                self._reckon_beforehand(found.budget, [claim], found.team)

    def charge(self, request_id: str, iterations: int) -> Reservation:
        """Makes it durable that so many iterations have run. Nothing of them may be seen before.

        Args:
            request_id: Of a reservation.
            iterations: How many have run in all; an earlier number changes nothing. Of a
                selection 1: it has begun.

        Returns:
            The reservation, whose `charged` is the high-water mark.

        Raises:
            BudgetExceeded: More than was reserved, or the budget is frozen or retired. Nothing
                is charged then, and nothing may be released.
            InvalidPrivacyParameter: `iterations` is not an integer from 0 to 1e12.
            LedgerError: There is no such reservation, or it is settled.
        """
        name = _validate.name("request_id", request_id)
        answer = self._group.run(lambda transaction: transaction.charge(name, iterations), [name])
        if isinstance(answer, BudgetExceeded):
            raise answer
        return answer

    def settle(self, request_id: str) -> Reservation:
        """Closes a reservation; what never ran is given back where the policy allows it.

        Raises:
            LedgerError: There is no such reservation.
        """
        name = _validate.name("request_id", request_id)
        return self._group.run(lambda transaction: transaction.settle(name), [name])

    def reservation(self, request_id: str) -> Reservation:
        """Returns a reservation.

        Raises:
            LedgerError: There is none of that name.
        """
        with reading(self._engine) as connection:
            found = find_reservation(connection, _validate.name("request_id", request_id))
        if found is None:
            raise LedgerError(f"request {request_id!r}: not in the ledger")
        return found

    def reservation_ids(self, budget: str, *, state: str | None = None) -> list[str]:
        """Returns the names of a budget's reservations, in order; of one state, or all."""
        _validate.name("budget", budget)
        query = sa.select(reservations.c.request_id).where(reservations.c.budget == budget)
        if state is not None:
            _validate.one_of("state", state, get_args(ReservationState))
            query = query.where(reservations.c.state == state)
        with reading(self._engine) as connection:
            return list(connection.scalars(query.order_by(reservations.c.request_id)))

    # -- the journal --------------------------------------------------------------------------

    def entries(
        self, budget: str | None = None, *, newest: int | None = None
    ) -> Generator[tuple[Entry, Head]]:
        """Yields the journal's entries, oldest first, with the head after each.

        Args:
            budget: Of one budget alone.
            newest: So many of the newest; None for all, each checked against the one before.

        Raises:
            LedgerTampered: An entry is not what was written.
        """
        _check_reading(budget, newest)
        with reading(self._engine) as connection:
            yield from journal_module.read(connection, budget=budget, newest=newest)

    def inspect(
        self, budget: str | None = None, *, newest: int | None = None
    ) -> Generator[Inspected]:
        """Yields the journal's rows as they stand, oldest first, damaged ones too.

        Args:
            budget: Of one budget alone.
            newest: So many of the newest; None for all.
        """
        _check_reading(budget, newest)
        with reading(self._engine) as connection:
            yield from journal_module.inspect(connection, budget=budget, newest=newest)

    def head(self) -> Head:
        """Returns the journal's end."""
        with reading(self._engine) as connection:
            return journal_module.read_head(connection)

    def verify(self, *, expected: Head | None = None) -> Verification:
        """Works out every row from the journal and compares; finds any edit, deletion, rollback.

        Args:
            expected: An end of the journal that was noted elsewhere, and must still be in it.
        """
        _check_head(expected)
        with reading(self._engine) as connection:
            return verify(connection, witness=self._witness, expected=expected)


def _check_reading(budget: object, newest: object) -> None:
    if budget is not None:
        _validate.name("budget", budget)
    if newest is not None:
        _validate.steps("newest", newest)


def _check_head(expected: object) -> None:
    if expected is None:
        return
    if not isinstance(expected, Head) or not _HASH.fullmatch(str(expected.hash)):
        raise InvalidPrivacyParameter("expected", expected, "a Head of the journal")
    _validate.steps("expected.seq", expected.seq)


def _witness(engine: sa.Engine, path: Path | None) -> Witness | None:
    if path is not None:
        return Witness(path)
    if engine.dialect.name == "sqlite" and engine.url.database not in (None, "", ":memory:"):
        return Witness(Path(f"{engine.url.database}-witness"))
    return None
