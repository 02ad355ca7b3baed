"""The client: one installation's sweeps and budgets."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pandas has partial annotations.

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import pandas as pd

from accounting import Budget, BudgetStatus, Ledger
from cluster import LOCAL
from sweeps.admission import Plan, prepare_dataset
from sweeps.budgets import room_for_paid_kinds, room_for_spec
from sweeps.choosing import sweep_id_of
from sweeps.client.documents import Check, Results
from sweeps.client.sweep import Sweep
from sweeps.database.store import Store
from sweeps.database.tables import existing_ledger, open_ledger
from sweeps.errors import CommandError
from sweeps.forecast.reckoning import forecast
from sweeps.home import HOME_VARIABLE, Home, who
from sweeps.new_budget import BudgetOptions, create_budget
from sweeps.report.room import Room
from sweeps.service import SpecSource, make_plan, paid_by, record
from sweeps.tracking.mlflow_writer import MlflowWriter

Spec = str | os.PathLike[str] | Mapping[str, Any]
"""A specification: the path of a YAML file, or what one would say as a mapping."""


class Client:
    """Sweeps and budgets of one installation, as the command line has them.

    Methods raise what the command line would print: `sweeps.errors.SpecError` for a specification
    that is not allowed, another `sweeps.errors.SweepError`, or `accounting.AccountingError` of a
    budget. Looking at what is not there creates nothing.

    Args:
        home: The folder for state; None for ``DP_SWEEPS_HOME``, else ``~/.dp-sweeps``. The other
            variables of the environment count as they do for the command line.

    Raises:
        HomeError: A variable cannot be read.
    """

    def __init__(self, home: str | os.PathLike[str] | None = None) -> None:
        environment = dict(os.environ)
        if home is not None:
            environment[HOME_VARIABLE] = os.fspath(home)
        self._home = Home.from_environment(environment)
        self._ledger: Ledger | None = None

    # -- sweeps -------------------------------------------------------------------------------

    def check(
        self,
        spec: Spec,
        *,
        budget: str | None = None,
        team: str | None = None,
        calibrate: bool = False,
    ) -> Check:
        """What every configuration would cost, and which are admitted. Writes nothing.

        Args:
            spec: The specification.
            budget: Who pays instead of whom it names.
            team: Whose share of that budget.
            calibrate: Whether time and disk are foreseen from a few steps on random data, here
                and now, instead of from earlier trials.
        """
        plan = self._plan(spec, budget, team)
        return Check(plan=plan, forecast=forecast(plan, self._home, calibrated=calibrate))

    def submit(
        self,
        spec: Spec,
        *,
        budget: str | None = None,
        team: str | None = None,
        address: str = LOCAL,
    ) -> Sweep:
        """Admits a sweep and has it run; does not wait.

        Args:
            spec: The specification.
            budget: Who pays instead of whom it names.
            team: Whose share of that budget.
            address: Of Ray; ``local`` starts one on this machine, for this sweep alone.

        Returns:
            The sweep. It goes on also if this process ends.
        """
        plan = self._plan(spec, budget, team)
        self._home.create()
        prepare_dataset(plan.spec, self._home.data_dir)
        if self._ledger is None:
            self._ledger = open_ledger(self._home)
        sweep = self.sweep(record(plan, self._store))
        sweep.drive(address)
        return sweep

    def run(
        self,
        spec: Spec,
        *,
        budget: str | None = None,
        team: str | None = None,
        address: str = LOCAL,
        progress: bool = True,
    ) -> Results:
        """As `submit`, and waits for its end. An interrupt pauses the sweep.

        Args:
            spec: The specification.
            budget: Who pays instead of whom it names.
            team: Whose share of that budget.
            address: Of Ray.
            progress: Whether a line on standard error says how far it is.
        """
        sweep = self.submit(spec, budget=budget, team=team, address=address)
        try:
            return sweep.wait(progress=progress)
        except KeyboardInterrupt:
            sweep.pause()  # `sweep(...).resume()` goes on
            raise

    def sweeps(self) -> pd.DataFrame:
        """The sweeps in the ledger, newest first."""
        rows = [
            {
                "sweep_id": row.sweep_id,
                "name": row.name,
                "state": row.state,
                "dataset": row.dataset,
                "created_at": pd.Timestamp(row.created_at, unit="s", tz="UTC"),
                "mlflow_run_id": row.mlflow_run_id,
            }
            for row in self._store.sweeps()
        ]
        columns = ["sweep_id", "name", "state", "dataset", "created_at", "mlflow_run_id"]
        return pd.DataFrame(rows, columns=columns)

    def sweep(self, sweep_id: str | None = None) -> Sweep:
        """A sweep, the newest for None: to look at, wait for, pause, resume, fork."""
        return Sweep(sweep_id_of(self._store, sweep_id), self._store, self._home)

    def results(self, sweep_id: str | None = None) -> Results:
        """What a sweep has to show, the newest for None."""
        return self.sweep(sweep_id).results()

    def sync(self) -> int:
        """Delivers to MLflow what an outage held back; gives how many messages those were."""
        return MlflowWriter(self._store, self._home).deliver()

    # -- budgets ------------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The ledger: `grant`, `freeze`, `thaw`, `retire`, `entries`, `verify` and the rest.

        Raises:
            StoreError: There is none yet.
        """
        return self._store.ledger

    def budgets(self, *, every: bool = False) -> pd.DataFrame:
        """The budgets, newest first.

        Args:
            every: Whether also those that were made for one sweep alone.
        """
        rows = [
            {
                "name": budget.name,
                "dataset": budget.dataset,
                "policy": budget.terms.policy,
                "epsilon": budget.terms.epsilon,
                "delta": budget.terms.delta,
                "state": budget.state,
                "one_off": budget.one_off,
            }
            for budget in self.ledger.budgets()
            if every or not budget.one_off
        ]
        columns = ["name", "dataset", "policy", "epsilon", "delta", "state", "one_off"]
        return pd.DataFrame(rows, columns=columns)

    def budget(self, name: str) -> BudgetStatus:
        """What of a budget is spent, reserved and free, in all and by team."""
        return self.ledger.status(name)

    def room(self, name: str, spec: Spec | None = None, *, team: str | None = None) -> Room | None:
        """What would still fit into a budget.

        Args:
            name: The budget.
            spec: Of what; None for the kinds of trials that it has paid for.
            team: Whose share pays.

        Returns:
            None where there is nothing to go by.
        """
        if spec is None:
            return room_for_paid_kinds(self.ledger, name, team=team)
        return room_for_spec(self.ledger, name, _source(spec), self._home, team=team)

    def create_budget(
        self,
        name: str,
        *,
        spec: Spec | None = None,
        typical: Spec | None = None,
        **terms: Any,
    ) -> Budget:
        """Makes a budget that sweeps can share; a Python warning says who else protects the data.

        Args:
            name: What it is to be called.
            spec: Data set and terms, where nothing else is said of them.
            typical: Under ``open``, the specification whose trials are to fit best.
            **terms: Fields of `sweeps.new_budget.BudgetOptions`: ``dataset``, ``policy``,
                ``epsilon``, ``delta``, ``neighboring_relation``, ``privacy_unit``, ``rdp_order``,
                ``fingerprint``, ``data_dir``, ``train_split``, ``eval_split``.

        Returns:
            The budget; the one that is there already, if its terms are the same.
        """
        options = BudgetOptions(
            name=name,
            spec=None if spec is None else _source(spec),
            typical=None if typical is None else _source(typical),
            **terms,
        )

        def tell(text: str) -> None:
            warnings.warn(text, stacklevel=2)

        return create_budget(options, self._home, by=who(), tell=tell)

    # -- this process -------------------------------------------------------------------------

    def close(self) -> None:
        """Lets go of the database; sweeps under way go on."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _store(self) -> Store:
        if self._ledger is None:
            self._ledger = existing_ledger(self._home)
        return Store(self._ledger)

    def _plan(self, spec: Spec, budget: str | None, team: str | None) -> Plan:
        if team is not None and budget is None:
            raise CommandError(f"team={team!r}: allowed with budget, whose share it is")
        change = None if budget is None else paid_by(budget, team)
        return make_plan(_source(spec), self._home, change=change)


def _source(spec: Spec) -> SpecSource:
    return spec if isinstance(spec, Mapping) else Path(spec)
