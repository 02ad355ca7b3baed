"""A trial that is stopped between its reports: nothing hangs, nothing is half, nothing is lost."""

import dataclasses
import threading

import pytest

from tests.trainer.killed_trial import CONFIG, arrays, charges_of, train
from trainer.config import DataConfig
from trainer.mechanism.keys import BranchKeys
from trainer.training import devices
from trainer.weights.checkpoint_writer import checkpoints_in
from trainer.weights.checkpoints import read_manifest


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("placement", ["device", "streamed"])
@pytest.mark.parametrize("last", [2, 8], ids=["before the first report", "after a checkpoint"])
def test_on_step_may_stop_a_trial(tmp_path, monkeypatch, placement, last):
    config = dataclasses.replace(CONFIG, data=DataConfig(name="digits", placement=placement))
    folder, data_home = tmp_path / "stopped", tmp_path / "data"

    def on_step(step):
        if step >= last:
            raise Cancelled

    with pytest.raises(Cancelled):
        train(folder, data_home, config, on_step=on_step)
    # Nothing of it is at work any more.
    at_work = [thread.name for thread in threading.enumerate()]
    assert not [name for name in at_work if name.startswith("checkpoint")]
    # What was not charged was never told, and what was written is whole.
    found = checkpoints_in(folder / "checkpoints")
    assert [read_manifest(path).step for path in found] == ([4] if last == 8 else [])
    assert charges_of(folder, config).iterations == (4 if last == 8 else 0)

    # It can be gone on with, as if nobody had stopped it.
    (key,) = (folder / "secrets").iterdir()
    root = key.read_bytes()
    result = train(folder, data_home, config)
    assert charges_of(folder, config).iterations == CONFIG.iterations
    if last == 8:
        monkeypatch.setattr(devices, "BranchKeys", lambda: BranchKeys(root))
        calm = tmp_path / "calm"
        assert arrays(result.checkpoint) == arrays(train(calm, data_home, config).checkpoint)
