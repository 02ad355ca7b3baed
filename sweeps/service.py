"""The order of a sweep: check, record, run, report.

`check` decides and shows; `run` decides, records, runs and reports. Both leave nothing behind
when a specification is refused. What is printed is up to the caller (`sweeps.cli`).
"""

import dataclasses
import datetime
import json
import os
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import accounting
from cluster import (
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
from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import NewSweep, NewTrial, Store
from sweeps.database.tables import existing_ledger
from sweeps.errors import Problem, SpecError, StoreError, SweepError
from sweeps.home import HOME_VARIABLE, Home
from sweeps.report.documents import results_json
from sweeps.report.figure_html import write_html
from sweeps.report.figure_png import write_png
from sweeps.report.results import SweepResults, read_results
from sweeps.spec.reading import validate_spec
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.spec.yaml_source import load_yaml
from sweeps.user_models import USER_MODELS_VARIABLE, check_model_allowed
from trainer.data.datasets import DatasetInfo

OnDecision = Callable[[Proposal], None]


def make_plan(
    spec_path: Path,
    home: Home,
    on_spec: Callable[[SweepSpec], OnDecision | None] | None = None,
    *,
    change: Callable[[SweepSpec], SweepSpec] | None = None,
) -> Plan:
    """Reads a specification and decides on everything in it.

    Args:
        spec_path: The YAML file.
        home: Where built-in data sets are kept.
        on_spec: Called once the specification is read; what it returns is called with every
            decision, to show progress.
        change: Applied to the specification before anything is decided: `runnable`, `paid_by` or
            `by_itself`.

    Raises:
        SpecError: If the specification is not allowed; every problem names its place.
    """
    document = load_yaml(spec_path)
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


def read_spec(spec_path: Path, home: Home) -> tuple[SweepSpec, DatasetInfo]:
    """Reads a specification and finds its data set, and decides nothing.

    Raises:
        SpecError: If the specification is not allowed; every problem names its place.
    """
    document = load_yaml(spec_path)
    spec = validate_spec(document)
    try:
        check_model_allowed(spec.model.name)
        return spec, describe_dataset(spec, home.data_dir)
    except SpecError as error:
        raise document.placed(error) from error


def runnable(spec: SweepSpec) -> SweepSpec:
    """Returns a specification that can be run.

    Raises:
        SpecError: This version can only reckon what it would cost.
    """
    if spec.privacy.policy == "private_selection":
        message = (
            "private_selection cannot be run by this version: whoever watches a sweep sees trials "
            "that must stay secret. `dp-sweeps check` tells what it would cost; allowed to run: "
            "declared, which pays for showing every trial"
        )
        raise SpecError([Problem(message=message, key_path="privacy.policy")])
    return spec


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
        ),
        [_new_trial(sweep_id, proposal) for proposal in plan.proposals],
    )
    return sweep_id


def _new_trial(sweep_id: str, proposal: Proposal) -> NewTrial:
    decision = proposal.decision
    return NewTrial(
        trial_id=f"{sweep_id}-{proposal.number:04d}",
        number=proposal.number,
        mechanism=proposal.mechanism if proposal.asks_budget else None,
        reason="" if decision.admitted else decision.reason,
        config=proposal.shown,
        trial_config=proposal.config,
        planned_iterations=int(proposal.shown["iterations"]),
        planned_epsilon=decision.epsilon,
    )


@contextmanager
def cluster_for(plan: Plan, home: Home, address: str) -> Generator[ClusterSession]:
    """The Ray that a plan's trials run on.

    Raises:
        SweepError: If Ray cannot be reached or is too small for a trial, or workers of other
            machines could not reach the database.
    """
    resources = worker_resources(plan.spec)
    # Secrets stay out: whoever may use the cluster can read these.
    env_vars = worker_environment(resources, home.compilation_cache_dir)
    env_vars[HOME_VARIABLE] = str(home.path)
    env_vars[USER_MODELS_VARIABLE] = os.environ.get(USER_MODELS_VARIABLE, "")
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


def worker_resources(spec: SweepSpec) -> WorkerResources:
    """What one trial of a spec takes."""
    return WorkerResources(cpus=spec.resources.cpus_per_trial, gpus=spec.resources.gpus_per_trial)


def execute(plan: Plan, sweep_id: str, store: Store, home: Home) -> SweepState:
    """Runs a recorded plan on the connected Ray, until every trial has ended.

    Args:
        plan: It admits at least one trial.
        sweep_id: From `record`.
        store: The driver's own.
        home: State, the same for the workers.

    Returns:
        CANCELLED if the person interrupted it, FAILED if every trial failed, else COMPLETED.
    """
    admitted = [row for row in store.trials(sweep_id) if row.state == TrialState.ADMITTED]
    state = SweepState.COMPLETED
    if not admitted:  # somebody else took what was left of the budget since the plan was made
        return state
    try:
        from sweeps.tune import run_trials  # Ray Tune takes seconds to import

        run_trials(
            plan.spec,
            sweep_id=sweep_id,
            trial_ids=[row.trial_id for row in admitted],
            max_iterations=max(row.planned_iterations for row in admitted),
            store=store,
            home=home,
            resources=worker_resources(plan.spec).as_ray(),
        )
    except KeyboardInterrupt:
        state = SweepState.CANCELLED
        _end_all(store, sweep_id, TrialState.CANCELLED, "the sweep was interrupted")
    except BaseException as error:
        _end_all(store, sweep_id, TrialState.FAILED, f"the sweep failed: {error}")
        store.end_sweep(sweep_id, SweepState.FAILED)
        raise
    else:
        _end_all(store, sweep_id, TrialState.FAILED, "Ray Tune ended without running it")
        if read_results(store, sweep_id).count(TrialState.FAILED) == len(admitted):
            state = SweepState.FAILED
    return state


def _end_all(store: Store, sweep_id: str, state: TrialState, reason: str) -> None:
    for trial in store.trials(sweep_id):
        if not TrialState(trial.state).is_finished:
            store.end_trial(trial.trial_id, state, reason)


def finish(sweep_id: str, state: SweepState, store: Store, home: Home) -> dict[str, str]:
    """Writes a sweep's report, ends the sweep, and leaves both for MLflow in the outbox.

    Returns:
        Name to absolute path: ``png``, ``html``, ``json`` (the results), ``spec``.
    """
    paths = _report_paths(home, sweep_id)
    report = {name: str(path) for name, path in paths.items()}
    paths["png"].parent.mkdir(parents=True, exist_ok=True)
    results = dataclasses.replace(read_results(store, sweep_id), state=state)
    write_png(results, paths["png"])
    write_html(results, paths["html"])
    _write_json(paths["json"], results_json(results, report=report))
    _write_json(paths["spec"], results.spec)
    store.end_sweep(sweep_id, state, list(report.values()))
    return report


def report_files(home: Home, sweep_id: str) -> dict[str, str]:
    """The files of a sweep's report that are there, as `finish` names them."""
    paths = _report_paths(home, sweep_id)
    return {name: str(path) for name, path in paths.items() if path.exists()}


def _report_paths(home: Home, sweep_id: str) -> dict[str, Path]:
    folder = home.sweep_dir(sweep_id) / "report"
    return {
        "png": folder / "utility_privacy.png",
        "html": folder / "utility_privacy.html",
        "json": folder / "results.json",
        "spec": folder / "spec.json",
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def results_of(store: Store, sweep_id: str | None) -> SweepResults:
    """A sweep's results; the newest sweep's for None.

    Raises:
        StoreError: If there is no such sweep, or none at all.
    """
    if sweep_id is None:
        newest = store.sweeps()
        if not newest:
            raise StoreError("the ledger holds no sweep yet; start one with `dp-sweeps run`")
        sweep_id = str(newest[0].sweep_id)
    return read_results(store, sweep_id)
