"""Every specification in specs/ runs: as it is, but with the fewest trials that make it a sweep.

The folder says what is run, so none that is added is forgotten. `smaller` is the rule by which a
specification is cut down; its noise, its scheduler, its steps and its batches stay.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sweeps.choosing import results_of
from sweeps.database.states import SweepState, TrialState
from sweeps.verification import verify
from tests.sweeps.whole_sweep import DEADLINE_SECS, store_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# Its one configuration is trained as it is, which takes a minute.
ELSEWHERE = {"digits_tuned.yaml": ROOT / "tests" / "trainer" / "test_tuned.py"}
FILES = sorted((ROOT / "specs").glob("*.yaml"))
SPECS = [path for path in FILES if path.name not in ELSEWHERE]
MOST = 3  # with which successive halving has a best third


def smaller(spec):
    """At most `MOST` trials: so many samples of what is drawn, or values of the first grid.

    Of other grids one value each, and one sample of what would only repeat with other noise. What
    is repeated comes once less than that. One trial at a time, since a worker takes longer to
    start than to train.
    """
    grids, drawn = [], []
    for node in _domains(spec["search_space"]):
        (grids if "grid_search" in node else drawn).append(node)
    search = spec.setdefault("search", {})
    search["num_samples"] = min(search.get("num_samples", 1), MOST if drawn else 1)
    for name in {"n_startup_trials", "repeats"} & search.keys():
        search[name] = min(search[name], MOST - 1)
    for number, node in enumerate(grids):
        values = node["grid_search"]
        node["grid_search"] = values[:1] if drawn or number else values[:: -(-len(values) // MOST)]
    if selection := spec["privacy"].get("selection"):
        selection["mean"] = MOST
    spec.setdefault("resources", {})["max_concurrent_trials"] = 1
    return spec


def _domains(node):
    """The domains of a search space, however deep they lie."""
    if isinstance(node, dict):
        if any(isinstance(value, list) for value in node.values()):
            yield node
        for value in node.values():
            yield from _domains(value)
    elif isinstance(node, list):
        for value in node:
            yield from _domains(value)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """What became of each specification, by file, and the home of all."""
    folder = tmp_path_factory.mktemp("specs")
    files = []
    for path in SPECS:
        files.append(folder / path.name)
        spec = smaller(yaml.safe_load(path.read_text(encoding="utf-8")))
        files[-1].write_text(yaml.safe_dump(spec), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.sweeps.several_sweeps", *map(str, files)],
        env={**os.environ, "DP_SWEEPS_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECS * 2,
    )
    assert ran.returncode == 0, ran.stderr
    said = [json.loads(line) for line in ran.stdout.splitlines()]
    return {each["file"]: each for each in said}, folder


def test_those_that_run_elsewhere_do():
    names = {path.name for path in FILES}
    assert {"digits.yaml", *ELSEWHERE} <= names
    for name, test in ELSEWHERE.items():
        assert f'"{name}"' in test.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [path.name for path in SPECS])
def test_it_runs(swept, name):
    said, folder = swept
    found = said[name]
    assert not found["error"]
    store, home = store_of(folder)
    results = results_of(store, found["sweep_id"])
    assert results.state is SweepState.COMPLETED
    states = {trial.state for trial in results.trials}
    assert states <= {TrialState.COMPLETED, TrialState.PRUNED, TrialState.REJECTED}
    for trial in results.trials:
        if trial.state is TrialState.COMPLETED:
            assert trial.last is not None
            assert trial.last.step == trial.end_step
            assert (trial.epsilon or math.inf) <= results.privacy["target_epsilon"]
    best = results.best
    assert best is not None
    assert (best.eval_accuracy or 0) > 0.3, "three times as good as chance"
    verification = verify(store, home, found["sweep_id"], with_mlflow=False)
    assert verification.ok, verification.differences
    store.ledger.close()
