"""Everything that changes the ledger, within one transaction that holds the ledger's lock.

    with ledger.transaction() as transaction:
        transaction.reserve("budget", [Request(...)])     # decided, journaled, not yet durable
        transaction.connection.execute(...)               # rows of other rooms, in the same commit

A refusal is an answer here, not an error, because it has to be committed with the rest.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from accounting import _validate
from accounting.account import WHOLE, Account, Tally, Verdict
from accounting.errors import (
    BudgetExceeded,
    InvalidPrivacyParameter,
    LedgerError,
    LedgerTampered,
)
from accounting.ledger.journal import Head, Writer, canonical_json
from accounting.ledger.lookup import (
    account_of,
    budget_row,
    find_reservation,
    find_reservations,
    read_shares,
)
from accounting.ledger.records import (
    Budget,
    Request,
    Reservation,
    budget_of,
    refusal_of,
    request_to_json,
)
from accounting.ledger.tables import budgets, reservations, shares, tallies
from accounting.mechanism import Mechanism, step_key
from accounting.terms import LIST_POLICIES, BudgetState, BudgetTerms, Spending

# Built once: building a statement takes as long as running it.
_NEW_RESERVATION = reservations.insert()
_CHANGED_RESERVATION = (
    reservations.update()
    .where(reservations.c.request_id == sa.bindparam("id"))
    .values(
        state=sa.bindparam("to_state"),
        charged=sa.bindparam("to_charged"),
        committed=sa.bindparam("to_committed"),
    )
)
_DECIDED_RESERVATION = _CHANGED_RESERVATION.values(
    reserved=sa.bindparam("to_reserved"), verdict=sa.bindparam("to_verdict")
)
_COUNTED = (
    tallies.update()
    .where(
        tallies.c.budget == sa.bindparam("name"),
        tallies.c.team == sa.bindparam("payer"),
        tallies.c.step_key == sa.bindparam("key"),
    )
    .values(
        committed=tallies.c.committed + sa.bindparam("more_committed"),
        charged=tallies.c.charged + sa.bindparam("more_charged"),
    )
)
_NEW_TALLY = tallies.insert()


class LedgerTransaction:
    """One transaction. Made by `Ledger.transaction`; not to be used after its block.

    Attributes:
        connection: For rows of other rooms that must be written in the same commit.
    """

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection
        self.journal = Writer(connection)
        # What is decided in this transaction and written at its end, or before it is read.
        self._accounts: dict[str, tuple[sa.Row[Any], Account]] = {}
        self._new: dict[str, Reservation] = {}
        self._found: dict[str, Reservation | None] = {}
        self._counts: dict[tuple[str, str, str], list[int]] = {}

    def flush(self) -> Head | None:
        """Writes everything; returns the journal's new end, None where nothing changed."""
        if self._new:
            rows = [_row_of(reservation) for reservation in self._new.values()]
            self.connection.execute(_NEW_RESERVATION, rows[0] if len(rows) == 1 else rows)
            self._found.update(self._new)
            self._new = {}
        for (name, team, key), (committed, charged) in self._counts.items():
            self._write_count(name, team, key, committed, charged)
        self._counts = {}
        return self.journal.flush()

    def look_up(self, request_ids: Sequence[str]) -> None:
        """Reads reservations that will be asked for, all at once."""
        known = {*self._found, *self._new}
        unknown = [name for name in dict.fromkeys(request_ids) if name not in known]
        if len(unknown) == 1:
            self._find(unknown[0])
            return
        self._found.update(dict.fromkeys(unknown))
        for reservation in find_reservations(self.connection, unknown):
            self._found[reservation.request_id] = reservation

    def _find(self, request_id: str) -> Reservation | None:
        if request_id in self._new:
            return self._new[request_id]
        if request_id not in self._found:
            self._found[request_id] = find_reservation(self.connection, request_id)
        return self._found[request_id]

    def _account(self, name: str) -> tuple[sa.Row[Any], Account]:
        if name not in self._accounts:
            self.flush()  # What is pending counts, too.
            row = budget_row(self.connection, name)
            if row.last_seq is None:
                raise LedgerTampered(f"budget {name!r} is there, and the journal is empty")
            self.journal.begin(Head(row.last_seq, row.last_hash))
            self._accounts[name] = row, account_of(self.connection, row)
        return self._accounts[name]

    def create_budget(
        self,
        name: str,
        *,
        dataset: str,
        dataset_fingerprint: str,
        terms: BudgetTerms,
        one_off: bool = False,
        by: str = "",
        any_order: bool = False,
    ) -> Budget:
        """See `Ledger.create_budget`; `any_order`: a budget of another order is the same, too."""
        if not isinstance(one_off, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidPrivacyParameter("one_off", one_off, "True or False")
        row = {
            "name": _validate.name("name", name),
            "dataset": _validate.text("dataset", dataset),
            "dataset_fingerprint": _validate.text("dataset_fingerprint", dataset_fingerprint),
            **dataclasses.asdict(terms),
            "one_off": one_off,
        }
        found = self.connection.execute(
            sa.select(budgets).where(budgets.c.name == name)
        ).one_or_none()
        if found is not None:
            compared = row.keys() - ({"rdp_order"} if any_order else set())
            if any(getattr(found, field) != row[field] for field in compared):
                raise LedgerError(f"budget {name!r}: exists already, with other terms")
            return budget_of(found, read_shares(self.connection, name))
        now = time.time()
        self.journal.append(
            "budget_created", name, {**row, "created_at": now, "by": _validate.text("by", by)}
        )
        self.connection.execute(budgets.insert().values(**row, state="active", created_at=now))
        return budget_of(budget_row(self.connection, name), {})

    def grant(self, name: str, team: str, share: float, *, by: str = "") -> Budget:
        """See `Ledger.grant`."""
        _validate.name("budget", name)
        _validate.name("team", team)
        millionths = round(_validate.share("share", share) * WHOLE)
        _, account = self._account(name)
        account.check_share(team, millionths)
        if account.shares.get(team) != millionths:
            facts = {"team": team, "millionths": millionths, "by": _validate.text("by", by)}
            self.journal.append("share_granted", name, facts)
            key = (shares.c.budget == name) & (shares.c.team == team)
            self.connection.execute(shares.delete().where(key))
            self.connection.execute(
                shares.insert().values(budget=name, team=team, millionths=millionths)
            )
        return self._budget(name)

    def set_state(
        self, name: str, state: BudgetState, *, by: str = "", reason: str = ""
    ) -> Budget:
        """See `Ledger.freeze`, `Ledger.thaw` and `Ledger.retire`."""
        row = budget_row(self.connection, name)
        facts = {"by": _validate.text("by", by), "reason": _validate.text("reason", reason)}
        if row.state == state:
            return self._budget(name)
        if row.state == "retired":
            raise LedgerError(f"budget {name!r}: is retired, which is for good")
        kind = {"active": "thawed", "frozen": "frozen", "retired": "retired"}[state]
        self.journal.append(kind, name, facts)
        if state == "retired":
            still_open = sa.select(reservations.c.request_id).where(
                reservations.c.budget == name, reservations.c.state == "open"
            )
            for request_id in self.connection.scalars(still_open).all():
                self.settle(request_id)
        self.connection.execute(budgets.update().where(budgets.c.name == name).values(state=state))
        return self._budget(name)

    def _budget(self, name: str) -> Budget:
        self._accounts.pop(name, None)
        return budget_of(budget_row(self.connection, name), read_shares(self.connection, name))

    def reserve(
        self,
        name: str,
        requests: Sequence[Request],
        *,
        team: str = "",
        dataset_fingerprint: str | None = None,
        together: int = 1,
    ) -> list[Reservation]:
        """See `Ledger.reserve_together`; refusals are among the answers.

        Args:
            name: The budget.
            requests: In order.
            team: Who pays.
            dataset_fingerprint: What the data set has to be.
            together: As `Account.decide` takes it.
        """
        check_call(name, requests, team, dataset_fingerprint)
        known = self._known(name, requests, team)
        new = [request for request in requests if request.request_id not in known]
        if new:
            row, account = self._account(name)
            _check_requests(account.terms, row, new, dataset_fingerprint)
            verdicts = account.decide([request.claim for request in new], team, together=together)
            for request, verdict in zip(new, verdicts, strict=True):
                reservation = self._record(name, team, request, verdict)
                known[request.request_id] = self._new[request.request_id] = reservation
                if verdict.admitted:
                    account.commit(request.mechanism, team)
        return [known[request.request_id] for request in requests]

    def _known(self, name: str, requests: Sequence[Request], team: str) -> dict[str, Reservation]:
        """Requests that were answered before, each checked to be the same."""
        asked = [request.request_id for request in requests]
        if len(set(asked)) < len(asked):
            raise LedgerError("two requests made together have the same request_id")
        if len(asked) > 1:
            self.look_up(asked)
        answers = {request_id: self._find(request_id) for request_id in asked}
        known = {name: answer for name, answer in answers.items() if answer is not None}
        for request in requests:
            before = known.get(request.request_id)
            if before is not None and (before.budget, before.team, before.request) != (
                name,
                team,
                request,
            ):
                raise LedgerError(
                    f"request {request.request_id!r}: was made before and was another one"
                )
        return known

    def _record(self, name: str, team: str, request: Request, verdict: Verdict) -> Reservation:
        size = request.size if verdict.admitted else 0
        reservation = Reservation(
            request=request,
            budget=name,
            team=team,
            state="open" if verdict.admitted else "refused",
            reserved=size,
            charged=0,
            committed=size,
            verdict=verdict,
        )
        facts = {
            "request_id": request.request_id,
            "team": team,
            "request": request_to_json(request.mechanism, request.prefix),
            "verdict": verdict.to_json(),
        }
        self.journal.append("reserved" if verdict.admitted else "refused", name, facts)
        if verdict.admitted and isinstance(request.mechanism, Mechanism):
            key = step_key(request.mechanism.step)
            self._count(name, team, key, request.mechanism.repetitions, 0)
        return reservation

    def ask_again(self, request_id: str) -> Reservation:
        """See `Ledger.ask_again`; a refusal is the answer."""
        before = self._reservation(request_id)
        if before.state != "refused":
            return before
        _, account = self._account(before.budget)
        if account.terms.policy != "open":
            raise LedgerError(
                f"request {request_id!r}: is not asked again; allowed under the policy 'open', "
                f"and this is {account.terms.policy!r}"
            )
        claim = before.request.claim
        (verdict,) = account.decide([claim], before.team)
        size = before.request.size if verdict.admitted else 0
        facts = {"request_id": request_id, "verdict": verdict.to_json()}
        kind = "reserved_later" if verdict.admitted else "refused_again"
        self.journal.append(kind, before.budget, facts)
        after = dataclasses.replace(
            before,
            state="open" if verdict.admitted else "refused",
            reserved=size,
            committed=size,
            verdict=verdict,
        )
        self._change(
            after,
            _DECIDED_RESERVATION,
            to_reserved=size,
            to_verdict=canonical_json(verdict.to_json()),
        )
        if verdict.admitted:
            assert isinstance(before.mechanism, Mechanism)  # `open` takes nothing else
            self._count(before.budget, before.team, step_key(before.mechanism.step), claim.more, 0)
            account.commit(claim, before.team)
        return after

    def extend(self, request_id: str, iterations: int) -> Reservation | BudgetExceeded:
        """See `Ledger.extend`; a refusal is the answer."""
        iterations = _validate.count("iterations", iterations)
        before = self._reservation(request_id)
        if before.state == "refused":
            raise LedgerError(
                f"request {request_id!r}: was refused, so there is nothing to extend; reserve "
                "under another request_id"
            )
        if iterations < before.charged:
            raise InvalidPrivacyParameter(
                "iterations", iterations, f"at least the {before.charged} charged"
            )
        facts: dict[str, Any] = {"request_id": request_id, "iterations": iterations}
        if not isinstance(before.mechanism, Mechanism):
            _, account = self._account(before.budget)
            verdict = account.refusal("a private selection is one draw, to which nothing is added")
            return self._refuse_extension(before, facts, verdict)
        if before.state == "open" and iterations <= before.reserved:
            return before
        _, account = self._account(before.budget)
        claim = before.claim(iterations)
        (verdict,) = account.decide([claim], before.team)
        if not verdict.admitted:
            return self._refuse_extension(before, facts, verdict)
        self.journal.append("extended", before.budget, {**facts, "verdict": verdict.to_json()})
        after = dataclasses.replace(
            before,
            state="open",
            reserved=iterations,
            committed=max(before.committed, iterations),
            verdict=verdict,
        )
        self._change(
            after,
            _DECIDED_RESERVATION,
            to_reserved=iterations,
            to_verdict=canonical_json(verdict.to_json()),
        )
        self._count(before.budget, before.team, step_key(before.mechanism.step), claim.more, 0)
        account.commit(claim, before.team)
        return after

    def _refuse_extension(
        self, before: Reservation, facts: dict[str, Any], verdict: Verdict
    ) -> BudgetExceeded:
        facts = {**facts, "verdict": verdict.to_json()}
        self.journal.append("extension_refused", before.budget, facts)
        return refusal_of(verdict)

    def charge(self, request_id: str, iterations: int) -> Reservation | BudgetExceeded:
        """See `Ledger.charge`; a refusal is the answer."""
        iterations = _validate.steps("iterations", iterations)
        before = self._reservation(request_id)
        if before.state == "refused":
            raise LedgerError(f"request {request_id!r}: was refused, so nothing may run")
        if iterations <= before.charged:
            return before
        if before.state != "open":
            raise LedgerError(f"request {request_id!r}: is settled; nothing more may run")
        row, account = self._account(before.budget)
        state = row.state
        if state != "active" or iterations > before.reserved:
            reason = (
                f"the budget is {state}"
                if state != "active"
                else f"{iterations} iterations are more than the {before.reserved} reserved"
            )
            refusal = BudgetExceeded(
                f"request {request_id!r}: {reason}",
                requested=iterations - before.charged,
                spent=before.charged,
                reserved=before.reserved - before.charged,
                limit=before.reserved,
                unit="iterations",
            )
            facts = {"request_id": request_id, "iterations": iterations, "reason": reason}
            self.journal.append("charge_refused", before.budget, facts)
            return refusal
        facts = {"request_id": request_id, "iterations": iterations}
        self.journal.append("charged", before.budget, facts)
        after = dataclasses.replace(before, charged=iterations)
        self._change(after)
        tally = account.tallies.setdefault(before.team, Tally())
        tally.begun = True
        if isinstance(before.mechanism, Mechanism):
            repetitions_after = before.mechanism.repetitions_after
            gained = repetitions_after(iterations) - repetitions_after(before.charged)
            key = step_key(before.mechanism.step)
            self._count(before.budget, before.team, key, 0, gained)
            tally.charged[before.mechanism.step] += gained
        return after

    def settle(self, request_id: str) -> Reservation:
        """See `Ledger.settle`."""
        before = self._reservation(request_id)
        if before.state != "open":
            return before
        _, account = self._account(before.budget)
        listed = account.terms.policy in LIST_POLICIES
        # A list that was begun is closed: what of it never ran still counts.
        keeps = listed and account.tally(before.team).begun
        released = before.charged == 0 and not keeps
        after = dataclasses.replace(
            before,
            state="released" if released else "closed",
            committed=before.committed if keeps else before.charged,
        )
        facts = {"request_id": request_id, "charged": before.charged, "state": after.state}
        self.journal.append("settled", before.budget, facts)
        self._change(after)
        if isinstance(before.mechanism, Mechanism) and not keeps:
            repetitions_after = before.mechanism.repetitions_after
            unused = repetitions_after(before.committed) - repetitions_after(before.charged)
            key = step_key(before.mechanism.step)
            self._count(before.budget, before.team, key, -unused, 0)
        self._accounts.pop(before.budget)
        return after

    def _reservation(self, request_id: str) -> Reservation:
        found = self._find(_validate.name("request_id", request_id))
        if found is None:
            raise LedgerError(f"request {request_id!r}: not in the ledger")
        return found

    def _change(
        self, after: Reservation, statement: sa.Update = _CHANGED_RESERVATION, **more: object
    ) -> None:
        name = after.request_id
        if name in self._new:
            self.flush()
        values = {
            "id": name,
            "to_state": after.state,
            "to_charged": after.charged,
            "to_committed": after.committed,
            **more,
        }
        self.connection.execute(statement, values)
        self._found[name] = after

    def _count(self, name: str, team: str, key: str, committed: int, charged: int) -> None:
        counts = self._counts.setdefault((name, team, key), [0, 0])
        counts[0] += committed
        counts[1] += charged

    def _write_count(self, name: str, team: str, key: str, committed: int, charged: int) -> None:
        changes = {
            "name": name,
            "payer": team,
            "key": key,
            "more_committed": committed,
            "more_charged": charged,
        }
        if self.connection.execute(_COUNTED, changes).rowcount == 0:
            first = {"committed": committed, "charged": charged}
            self.connection.execute(
                _NEW_TALLY, {"budget": name, "team": team, "step_key": key, **first}
            )


@functools.lru_cache(maxsize=4096)
def _request_text(mechanism: Spending, prefix: tuple[Mechanism, ...]) -> str:
    return canonical_json(request_to_json(mechanism, prefix))


def _row_of(reservation: Reservation) -> dict[str, Any]:
    return {
        "request_id": reservation.request_id,
        "budget": reservation.budget,
        "team": reservation.team,
        "state": reservation.state,
        "request": _request_text(reservation.request.mechanism, reservation.request.prefix),
        "verdict": canonical_json(reservation.verdict.to_json()),
        "reserved": reservation.reserved,
        "charged": reservation.charged,
        "committed": reservation.committed,
    }


def check_call(name: object, requests: object, team: object, fingerprint: object) -> None:
    """Checks the arguments of `LedgerTransaction.reserve`.

    Raises:
        InvalidPrivacyParameter: One is of the wrong type or cannot be a name.
    """
    _validate.name("budget", name)
    if not isinstance(team, str) or team:
        _validate.name("team", team)
    if fingerprint is not None:
        _validate.text("dataset_fingerprint", fingerprint)
    listed: list[object] = [*requests] if isinstance(requests, (list, tuple)) else [requests]
    for request in listed:
        if not isinstance(request, Request):
            raise InvalidPrivacyParameter("requests", request, "a list of Request")


def _check_requests(
    terms: BudgetTerms,
    row: sa.Row[Any],
    requests: Sequence[Request],
    dataset_fingerprint: str | None,
) -> None:
    for request in requests:
        terms.check_suits(request.mechanism, request.prefix)
    own = row.dataset_fingerprint
    if dataset_fingerprint is not None and own != dataset_fingerprint:
        raise InvalidPrivacyParameter(
            "dataset_fingerprint", dataset_fingerprint, f"{own!r}, as of the budget"
        )
