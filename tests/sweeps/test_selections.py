"""A whole private selection on Ray, killed twice, and then looked for traces of what it hid."""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import pytest

import accounting
from sweeps.home import Home
from sweeps.search.selection_draws import SelectionDraws
from sweeps.spec.reading import parse_spec
from sweeps.verification import verify
from tests.sweeps.selections import UNITS, paid_for, text_of
from tests.sweeps.test_selection_run import readable
from tests.sweeps.whole_sweep import (
    DEADLINE_SECS,
    attempts_at,
    rows_of,
    running,
    store_of_when_there,
    wait_for,
    worker_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Of fewer than four trials once in 10^4.
LAW = "{distribution: negative_binomial, mean: 14, shape: 100}"
SOURCE = text_of(LAW, every=20, optimizer="sgd", iterations="100", expected_batch_size="128")


class Watch:
    """What is in `secrets/` while a selection runs, which nobody but a test looks at."""

    def __init__(self, home):
        self.home, self.over = home, threading.Event()
        self.progress = {}
        self.secrets, self.losses = set(), {}
        self.thread = threading.Thread(target=self._watch)

    def _watch(self):
        while not self.over.wait(0.01):
            for path in self.home.secrets_dir.glob("selections/*/progress.json"):
                with contextlib.suppress(OSError, ValueError):  # it is gone
                    self.progress = json.loads(path.read_text())
                    self.secrets.add(self.progress["secret"])
                    losses = self.losses.setdefault(self.progress["number"], set())
                    losses |= {report["eval_loss"] for report in self.progress["curve"]}

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def wait_for_more(self):
        """Until a later trial than the one of now has reported."""
        before = self.progress.get("number", 0)
        wait_for(lambda: self.progress.get("number", 0) > before and self.progress["curve"])


@pytest.fixture
def ray_dir():
    directory = tempfile.mkdtemp(dir="/tmp", prefix="r")  # a Unix socket's path must be short
    yield Path(directory)
    shutil.rmtree(directory, ignore_errors=True)


def spent(store):
    return store.ledger.status(store.sweeps()[0].sweep_id).level.epsilon_spent


def test_a_selection_that_is_killed_shows_its_winner_and_nothing_else(tmp_path, ray_dir):
    spec = parse_spec(SOURCE)
    document = spec.model_dump(mode="json")
    environment = {"RAY_TMPDIR": str(ray_dir)}
    with Watch(Home.from_environment({"DP_SWEEPS_HOME": str(tmp_path / "home")})) as watch:
        with running(tmp_path, document, **environment) as process:
            store, home = store_of_when_there(tmp_path)
            watch.wait_for_more()
            (row,) = rows_of(store)
            price = spent(store)
            os.kill(worker_of(store, row.trial_id), signal.SIGKILL)
            wait_for(lambda: len(attempts_at(store, row.trial_id)) == 2)
            watch.wait_for_more()
            (meanwhile,) = rows_of(store)
            os.killpg(process.pid, signal.SIGKILL)
        with running(tmp_path, None, **environment) as process:
            out, err = process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 0, err

    # All of it was paid from the start, and nothing was seen before the end.
    selection = paid_for(spec)
    assert spent(store) == price == accounting.selection_epsilon([selection], delta=1e-5)
    assert (meanwhile.state, meanwhile.charged_iterations) == ("RUNNING", 1)
    assert (meanwhile.config, meanwhile.trial_config) == (row.config, None)

    # One secret, whoever was killed, and of what it draws the best alone.
    (secret,) = watch.secrets
    draws = SelectionDraws(bytes.fromhex(secret), spec, selection, UNITS)
    trials = [draws.trial(number).shown for number in range(draws.count)]
    shown = json.loads(out)
    (trial,) = shown["trials"]
    winner = trials.index(trial["config"])
    assert (trial["state"], trial["epsilon"], trial["step"]) == ("COMPLETED", price, 100)
    assert [point["step"] for point in trial["curve"]] == [20, 40, 60, 80, 100]
    assert max(watch.losses) >= 2, "several have run"
    assert watch.progress["best"] is not None

    # Nothing of the others is anywhere: tables, MLflow, logs, checkpoints, Ray's own files.
    store.ledger.close()
    rates = [one["learning_rate"] for number, one in enumerate(trials) if number != winner]
    losses = {loss for number, seen in watch.losses.items() if number != winner for loss in seen}
    assert len(rates) == draws.count - 1
    for place in (home, Home.from_environment({"DP_SWEEPS_HOME": str(ray_dir)})):
        assert readable(place, *rates, *losses) == []
    assert not [rate for rate in rates if repr(rate)[:10] in out + err]
    found = readable(home, trial["config"]["learning_rate"])
    assert {"ledger.db", "mlflow.db", "results.json"} <= {name for name, _, _ in found}
    assert not list(home.secrets_dir.rglob("*"))
    for cache in (home.compilation_cache_dir, home.path / "clipping"):
        assert not list(cache.rglob("*"))
    # Three attempts, one line each.
    log = home.trial_log(shown["sweep_id"], trial["trial_id"]).read_text().splitlines()
    assert [line.split(": ")[-1].split(" on ")[0] for line in log] == [
        f"attempt {number}" for number in (1, 2, 3)
    ]
    store, home = store_of_when_there(tmp_path)
    verified = verify(store, home, shown["sweep_id"])
    assert (verified.ok, verified.mlflow_checked, verified.differences) == (True, True, ())
