"""From a specification to a recorded sweep, and to the Ray that it runs on.

Nothing is left behind when a specification is refused. What is printed is up to the caller
(`sweeps.cli`); `sweeps.driver` runs what is recorded.
"""

import dataclasses
import datetime
import math
import os
import secrets
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import accounting
from cluster import (
    LOCAL,
    ClusterError,
    ClusterSession,
    WorkerResources,
    connect,
    worker_environment,
)
from sweeps.admission import (
    Plan,
    Proposal,
    check_budget,
    decide,
    describe_dataset,
    terms_of,
)
from sweeps.checkpoint_places import CheckpointPlaces
from sweeps.database.admitting import NewTrial
from sweeps.database.selecting import WHOLE
from sweeps.database.store import NewSweep, Store
from sweeps.database.tables import existing_ledger
from sweeps.errors import Problem, SpecError, StoreError, SweepError
from sweeps.home import (
    CHECKPOINTS_VARIABLE,
    EXPERIMENT_VARIABLE,
    HOME_VARIABLE,
    MLFLOW_VARIABLE,
    Home,
)
from sweeps.spec.domains import CALIBRATED, Domain
from sweeps.spec.reading import validate_spec
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.spec.yaml_source import YamlDocument, document_of, load_yaml
from sweeps.user_models import USER_MODELS_VARIABLE, check_model_allowed
from trainer.data.datasets import DatasetInfo

OnDecision = Callable[[Proposal], None]
SpecSource = Path | Mapping[str, Any]
"""A specification: a YAML file, or what one would say."""


def make_plan(
    source: SpecSource,
    home: Home,
    on_spec: Callable[[SweepSpec], OnDecision | None] | None = None,
    *,
    change: Callable[[SweepSpec], SweepSpec] | None = None,
) -> Plan:
    """Reads a specification and decides on everything in it.

    Args:
        source: The specification.
        home: Where built-in data sets are kept.
        on_spec: Called once the specification is read; what it returns is called with every
            decision, to show progress.
        change: Applied to the specification before anything is decided: `paid_by` or `by_itself`.

    Raises:
        SpecError: If the specification is not allowed; every problem names its place.
    """
    document = load_document(source)
    spec = validate_spec(document)
    try:
        check_model_allowed(spec.model.name)
        spec = spec if change is None else change(spec)
        on_decision = on_spec(spec) if on_spec is not None else None
        dataset = describe_dataset(spec, home.data_dir)
        account = _account(spec, dataset, home)
        return decide(spec, dataset, account, on_decision)
    except SpecError as error:
        raise document.placed(error) from error


def read_spec(source: SpecSource, home: Home) -> tuple[SweepSpec, DatasetInfo]:
    """Reads a specification and finds its data set, and decides nothing.

    Raises:
        SpecError: If the specification is not allowed; every problem names its place.
    """
    document = load_document(source)
    spec = validate_spec(document)
    try:
        check_model_allowed(spec.model.name)
        return spec, describe_dataset(spec, home.data_dir)
    except SpecError as error:
        raise document.placed(error) from error


def load_document(source: SpecSource) -> YamlDocument:
    """What a specification says, and where if that is a file.

    Raises:
        SpecError: It cannot be read.
    """
    return load_yaml(source) if isinstance(source, Path) else document_of(source)


def paid_by(budget: str, team: str | None) -> Callable[[SweepSpec], SweepSpec]:
    """Gives a change of specifications: as if they named this budget, and this team if any."""

    def change(spec: SweepSpec) -> SweepSpec:
        named: dict[str, str] = {"budget": budget}
        if team is not None:
            named["team"] = team
        privacy = spec.privacy.model_copy(update=named)
        return spec.model_copy(update={"privacy": privacy})

    return change


def by_itself(spec: SweepSpec) -> SweepSpec:
    """A specification as if it named no budget."""
    privacy = spec.privacy.model_copy(update={"budget": None, "team": None})
    return spec.model_copy(update={"privacy": privacy})


def _account(spec: SweepSpec, dataset: DatasetInfo, home: Home) -> accounting.Account:
    """What is taken so far from the budget that a specification draws on.

    Raises:
        SpecError: If it names a budget that is not there, or that says something else.
    """
    name = spec.privacy.budget
    if name is None:
        try:
            return accounting.Account(terms_of(spec))
        except accounting.InvalidPrivacyParameter as error:
            problem = Problem(message=str(error), key_path="privacy.target_epsilon")
            raise SpecError([problem]) from error
    try:
        ledger = existing_ledger(home)
        check_budget(spec, dataset, ledger.budget(name))
        return ledger.account(name)
    except (StoreError, accounting.LedgerError) as error:
        raise SpecError([Problem(message=str(error), key_path="privacy.budget")]) from error


def record(plan: Plan, store: Store) -> str:
    """Puts a plan into the database and returns the new sweep's id.

    The budget decides again, for good: what it allowed when the plan was made may have been
    taken by somebody else since.
    """
    now = datetime.datetime.now(datetime.UTC)
    sweep_id = f"{plan.spec.name}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    store.create_sweep(
        NewSweep(
            sweep_id=sweep_id,
            name=plan.spec.name,
            spec=plan.spec.model_dump(mode="json"),
            spec_hash=plan.spec.spec_hash(),
            dataset=f"{plan.dataset.name}:{plan.dataset.version}",
            dataset_fingerprint=plan.dataset.fingerprint,
            terms=terms_of(plan.spec),
            budget=plan.spec.privacy.budget,
            team=plan.spec.privacy.team or "",
            repeats=plan.spec.search.repeats,
        ),
        _new_trials(sweep_id, plan),
    )
    return sweep_id


def _new_trials(sweep_id: str, plan: Plan) -> list[NewTrial]:
    """A plan's proposals as rows; a private selection is one, whatever it may draw."""
    if plan.spec.privacy.policy == "private_selection":
        return [_new_selection(sweep_id, plan)]
    return [new_trial(sweep_id, proposal) for proposal in plan.proposals]


def _new_selection(sweep_id: str, plan: Plan) -> NewTrial:
    """The one row of a private selection, which shows what is the same in all of its trials."""
    selection, reason, epsilon = plan.selection, "", math.inf
    if selection is None:
        reason = f"no candidate may be drawn: {plan.proposals[0].decision.reason}"
    else:
        with suppress(accounting.AccountingError):  # the budget then refuses it, too
            delta = plan.spec.privacy.target_delta
            epsilon = accounting.selection_epsilon([selection], delta=delta)
    shown = {
        name: domain.values[0]
        for name, domain in plan.spec.search_space.domains()
        if isinstance(domain, Domain)
        and domain.kind == "constant"
        and domain.values[0] != CALIBRATED
    }
    return NewTrial(
        trial_id=f"{sweep_id}-0000",
        number=0,
        mechanism=selection,
        reason=reason,
        config=shown,
        trial_config=None,
        planned_iterations=WHOLE,
        planned_epsilon=epsilon,
    )


def new_trial(sweep_id: str, proposal: Proposal) -> NewTrial:
    """A proposal as a row of a sweep, for the budget to decide on."""
    decision, number = proposal.decision, proposal.number
    first = f"{sweep_id}-{number - proposal.repeat:04d}"
    return NewTrial(
        trial_id=f"{sweep_id}-{number:04d}",
        number=number,
        repeat_of=first if proposal.repeat else None,
        mechanism=proposal.mechanism if proposal.asks_budget else None,
        reason="" if decision.admitted else decision.reason,
        setting=dataclasses.asdict(proposal.setting),
        config=proposal.shown,
        trial_config=proposal.config,
        planned_iterations=int(proposal.shown["iterations"]),
        planned_epsilon=decision.epsilon,
    )


@contextmanager
def cluster_for(spec: SweepSpec, home: Home, address: str) -> Generator[ClusterSession]:
    """The Ray that a sweep's trials run on.

    Raises:
        SweepError: If Ray cannot be reached or is too small for a trial, workers of other
            machines could not reach the database, or checkpoints have no place.
    """
    CheckpointPlaces(home).check()
    resources = worker_resources(spec)
    # Secrets stay out: whoever may use the cluster can read these.
    env_vars = worker_environment(resources, home.compilation_cache_dir)
    env_vars[HOME_VARIABLE] = str(home.path)
    env_vars[CHECKPOINTS_VARIABLE] = home.checkpoints_url
    env_vars[USER_MODELS_VARIABLE] = os.environ.get(USER_MODELS_VARIABLE, "")
    if address != LOCAL:  # the driver runs there, too
        env_vars |= mlflow_environment(home)
    try:
        with connect(address, env_vars=env_vars) as session:
            resources.check_fits(session.nodes)
            if len(session.nodes) > 1 and home.uses_sqlite:
                raise SweepError(
                    f"the cluster at {address} has {len(session.nodes)} nodes and the ledger is a "
                    "SQLite file of this machine, which the others cannot reach; set "
                    "DP_SWEEPS_DATABASE_URL to a PostgreSQL URL, here and on every node"
                )
            yield session
    except ClusterError as error:
        raise SweepError(str(error)) from error


def mlflow_environment(home: Home) -> dict[str, str]:
    """What a driver elsewhere has to know in order to deliver where this process would.

    Raises:
        SweepError: If it holds a password: whoever may use the cluster could read it.
    """
    if "@" in urlsplit(home.mlflow_uri).netloc:
        raise SweepError(
            f"{MLFLOW_VARIABLE} names a user or holds a password, which everybody on the cluster "
            "could read; allowed is a URL without, and MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD where Ray was started"
        )
    told = {MLFLOW_VARIABLE: home.mlflow_uri}
    if experiment := os.environ.get(EXPERIMENT_VARIABLE):
        told[EXPERIMENT_VARIABLE] = experiment
    return told


def worker_resources(spec: SweepSpec) -> WorkerResources:
    """What one trial of a spec takes."""
    return WorkerResources(cpus=spec.resources.cpus_per_trial, gpus=spec.resources.gpus_per_trial)
