import os
import pickle

import numpy as np
import pytest

from trainer.errors import SecretError
from trainer.mechanism.keys import BranchKeys


def test_branches_share_nothing():
    first, second = BranchKeys(), BranchKeys()
    assert not np.array_equal(first.noise_keys([1])[0], second.noise_keys([1])[0])
    assert first.sampling_rng(1).random() != second.sampling_rng(1).random()


def test_every_step_has_keys_of_its_own():
    keys = BranchKeys()
    noise = {keys.noise_keys([step])[0].tobytes() for step in range(1, 1001)}
    draws = {keys.sampling_rng(step).random() for step in range(1, 1001)}
    assert len(noise) == len(draws) == 1000


def test_noise_and_sampling_are_derived_apart():
    keys = BranchKeys(bytes(32))
    assert keys._derive(b"noise", 1) != keys._derive(b"sampling", 1)


def test_user_seeds_do_not_reach_the_keys():
    np.random.seed(0)  # noqa: NPY002  # the global generator is what must have no effect
    first = BranchKeys().noise_keys([1])[0]
    np.random.seed(0)  # noqa: NPY002
    assert not np.array_equal(first, BranchKeys().noise_keys([1])[0])


def test_secrets_are_not_shown_and_not_pickled():
    keys = BranchKeys(b"S" * 32)
    assert "S" * 4 not in repr(keys)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(keys)


def test_a_root_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    keys = BranchKeys()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(SecretError, match="no key can be kept"):
            keys.save(tmp_path)
    assert BranchKeys.load(tmp_path, keys.branch_id) is None
    keys.save(tmp_path)
    found = BranchKeys.load(tmp_path, keys.branch_id)
    assert found is not None
    assert np.array_equal(found.noise_keys([1])[0], keys.noise_keys([1])[0])
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_root_must_be_256_bits():
    with pytest.raises(ValueError, match="allowed is 32"):
        BranchKeys(b"short")
