"""The order of a sweep: check, record, run, report.

`check` decides and shows; `run` decides, records, runs and reports. Both leave nothing behind
when a specification is refused. What is printed is up to the caller (`sweeps.cli`).
"""

import dataclasses
import datetime
import json
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from cluster import ClusterSession, WorkerResources, connect, worker_environment
from sweeps.admission import Plan, Proposal, describe_dataset, propose
from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import NewSweep, NewTrial, Store
from sweeps.errors import SpecError, StoreError, SweepError
from sweeps.home import HOME_VARIABLE, Home
from sweeps.report.documents import results_json
from sweeps.report.figure_html import write_html
from sweeps.report.figure_png import write_png
from sweeps.report.results import SweepResults, read_results
from sweeps.spec.reading import validate_spec
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.spec.yaml_source import load_yaml

OnDecision = Callable[[Proposal], None]


def make_plan(
    spec_path: Path, home: Home, on_spec: Callable[[SweepSpec], OnDecision | None] | None = None
) -> Plan:
    """Reads a specification and decides on everything in it.

    Args:
        spec_path: The YAML file.
        home: Where built-in data sets are kept.
        on_spec: Called once the specification is read; what it returns is called with every
            decision, to show progress.

    Raises:
        SpecError: If the specification is not allowed; every problem names its place.
    """
    document = load_yaml(spec_path)
    spec = validate_spec(document)
    on_decision = on_spec(spec) if on_spec is not None else None
    try:
        dataset = describe_dataset(spec, home.data_dir)
        proposals = propose(spec, dataset, on_decision)
    except SpecError as error:
        raise document.placed(error) from error
    return Plan(spec=spec, dataset=dataset, proposals=proposals)


def record(plan: Plan, store: Store) -> str:
    """Puts a plan into the database and returns the new sweep's id."""
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
        ),
        [_new_trial(sweep_id, proposal) for proposal in plan.proposals],
    )
    return sweep_id


def _new_trial(sweep_id: str, proposal: Proposal) -> NewTrial:
    decision = proposal.decision
    return NewTrial(
        trial_id=f"{sweep_id}-{proposal.number:04d}",
        number=proposal.number,
        state=TrialState.ADMITTED if decision.admitted else TrialState.REJECTED,
        reason="" if decision.admitted else decision.reason,
        config=proposal.shown,
        trial_config=proposal.config if decision.admitted else None,
        planned_iterations=int(proposal.shown["iterations"]),
        planned_epsilon=decision.epsilon,
    )


@contextmanager
def cluster_for(plan: Plan, home: Home, address: str) -> Generator[ClusterSession]:
    """The Ray that a plan's trials run on.

    Raises:
        ClusterError: If Ray cannot be reached or is too small for a trial.
        SweepError: If workers of other machines could not reach the database.
    """
    resources = worker_resources(plan.spec)
    # Secrets stay out: whoever may use the cluster can read these.
    env_vars = worker_environment(resources, home.compilation_cache_dir)
    env_vars[HOME_VARIABLE] = str(home.path)
    with connect(address, env_vars=env_vars) as session:
        resources.check_fits(session.nodes)
        if len(session.nodes) > 1 and home.uses_sqlite:
            raise SweepError(
                f"the cluster at {address} has {len(session.nodes)} nodes and the ledger is a "
                "SQLite file of this machine, which the others cannot reach; set "
                "DP_SWEEPS_DATABASE_URL to a PostgreSQL URL, here and on every node"
            )
        yield session


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
