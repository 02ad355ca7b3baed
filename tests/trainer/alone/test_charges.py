"""A run's own ledger: nothing that was charged is ever forgotten, whatever happens to the file."""

import dataclasses
import json
import math
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.small_trial import CONFIG
from trainer.alone import charges as module
from trainer.alone.charges import FileCharges, charged_terms
from trainer.errors import ChargesError
from trainer.mechanism.branch import Branch

TERMS = charged_terms(CONFIG)
BRANCHES = [Branch(f"{number:016x}", 3 * number) for number in range(3)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "charges.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("charges")


CHARGES = st.lists(
    st.tuples(st.sampled_from(BRANCHES), st.integers(0, 50), st.integers(0, 9)), max_size=12
)


@settings(max_examples=40)
@given(CHARGES, st.booleans())
def test_the_total_is_the_furthest_of_every_branch(folder, steps, reopen):
    path = folder / "charges.json"
    path.unlink(missing_ok=True)
    charges = FileCharges(path, TERMS, create=True)
    furthest, counted = {}, {}
    for branch, more, counts in steps:
        step = branch.start_step + more
        furthest[branch] = max(furthest.get(branch, 0), step)
        counted[branch] = max(counted.get(branch, 0), counts)
        total = sum(step - branch.start_step for branch, step in furthest.items())
        assert charges.charge(branch, step) == total
        assert charges.charge_counts(branch, step, counts) == sum(counted.values())
        if reopen:
            charges = FileCharges(path, TERMS, create=False)
        assert (charges.iterations, charges.counts) == (total, sum(counted.values()))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 6))
def test_no_branch_shares_a_group_of_bands_with_another(folder, lengths, bands):
    path = folder / "charges.json"
    path.unlink(missing_ok=True)
    mechanism = dataclasses.replace(CONFIG.mechanism, bands=bands)
    terms = charged_terms(dataclasses.replace(CONFIG, mechanism=mechanism, iterations=100))
    charges = FileCharges(path, terms, create=True)
    for number, length in enumerate(lengths):
        charges.charge(Branch(f"{number:016x}", 0), length)
    # What is composed: each branch by itself (Choquette-Choo et al. 2023, theorem 4).
    assert math.ceil(charges.iterations / bands) == sum(math.ceil(n / bands) for n in lengths)


def test_a_charge_is_on_the_disk_before_it_returns(path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, real=real, name=name: (done.append(name), real(*args))[1]
        )
    charges = FileCharges(path, TERMS, create=True)
    done.clear()
    charges.charge(BRANCHES[0], 5)
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the directory
    done.clear()
    charges.charge(BRANCHES[0], 4)
    assert done == []  # it is charged already


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_charge_that_cannot_be_kept_stops_the_trial_and_leaves_the_file(
    path, monkeypatch, fails
):
    charges = FileCharges(path, TERMS, create=True)
    charges.charge(BRANCHES[0], 5)
    with monkeypatch.context() as broken:

        def fail(*_):
            raise OSError("disk full")

        broken.setattr(os, fails, fail)
        with pytest.raises(ChargesError, match="disk full"):
            charges.charge(BRANCHES[0], 9)
    assert charges.iterations == 5
    assert FileCharges(path, TERMS, create=False).iterations == 5


def test_no_damage_goes_unseen(path):
    charges = FileCharges(path, TERMS, create=True)
    charges.charge(BRANCHES[0], 5)
    charges.charge(BRANCHES[1], 9)
    whole = path.read_bytes()
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        position = chance.randrange(len(damaged))
        if chance.random() < 0.5:
            del damaged[position:]
        else:
            damaged[position] = chance.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            same = json.loads(damaged) == json.loads(whole)
        except ValueError:
            same = False
        if not same:
            with pytest.raises(ChargesError, match=str(path)):
                FileCharges(path, TERMS, create=False)


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: body["branches"][BRANCHES[0].branch_id].update(step=1),
        lambda body: body["branches"].clear(),
        lambda body: body["mechanism"].update(noise_multiplier=99.0),
        lambda body: body.update(format=1),
        lambda body: body.pop("sha256"),
        lambda body: body.update(branches=[]),
    ],
)
def test_an_edit_is_refused(path, edit):
    FileCharges(path, TERMS, create=True).charge(BRANCHES[0], 5)
    body = json.loads(path.read_text())
    edit(body)
    path.write_text(json.dumps(body))
    with pytest.raises(ChargesError, match=r"charges\.json: is damaged or was edited"):
        FileCharges(path, TERMS, create=False)


def test_a_missing_file_and_one_too_many(path):
    with pytest.raises(ChargesError, match="is missing"):
        FileCharges(path, TERMS, create=False)
    FileCharges(path, TERMS, create=True)
    with pytest.raises(ChargesError, match="is there already"):
        FileCharges(path, TERMS, create=True)


def test_other_terms_are_refused_by_name(path):
    FileCharges(path, TERMS, create=True)
    other = {**TERMS, "mechanism": {**TERMS["mechanism"], "noise_multiplier": 3.0}}
    with pytest.raises(ChargesError, match=r"mechanism\.noise_multiplier=1\.0, now 3\.0"):
        FileCharges(path, other, create=False)


def test_what_a_branch_began_with_does_not_change(path):
    charges = FileCharges(path, TERMS, create=True)
    charges.charge(BRANCHES[1], 9)
    with pytest.raises(ChargesError, match="begin at step 3, not 0"):
        charges.charge(dataclasses.replace(BRANCHES[1], start_step=0), 9)


@pytest.mark.parametrize(("branch_id", "step"), [(BRANCHES[1].branch_id, 10), ("f" * 16, 1)])
def test_an_older_copy_is_seen_by_the_checkpoint(path, branch_id, step):
    charges = FileCharges(path, TERMS, create=True)
    charges.charge(BRANCHES[1], 9)
    charges.check_covers(BRANCHES[1].branch_id, 9)
    with pytest.raises(ChargesError, match=f"knows nothing of step {step}"):
        charges.check_covers(branch_id, step)
    with pytest.raises(ChargesError, match="knows nothing"):
        charges.check_covers(None, 1)


def test_a_file_that_knows_less_of_its_branches_is_read(path):
    FileCharges(path, TERMS, create=True).charge(BRANCHES[1], 9)
    body = json.loads(path.read_text())
    del body["sha256"]
    body["format"] = 1
    entry = body["branches"][BRANCHES[1].branch_id]
    body["branches"][BRANCHES[1].branch_id] = {
        name: entry[name] for name in ("start_step", "step", "counts")
    }
    path.write_text(json.dumps({**body, "sha256": module._digest(body)}))
    charges = FileCharges(path, TERMS, create=False)
    assert (charges.branches, charges.iterations) == ([BRANCHES[1]], 6)
    assert charges.charge(BRANCHES[0], 4) == 6 + 4


def test_what_is_known_of_a_branch_is_kept_with_its_charge(path):
    branch = dataclasses.replace(
        BRANCHES[2], origin="o", program="p", engine="vmap", microbatch_size=8
    )
    FileCharges(path, TERMS, create=True).charge(branch, 9)
    charges = FileCharges(path, TERMS, create=False)
    assert charges.branches == [branch]
    with pytest.raises(ChargesError, match="compute other steps"):
        charges.charge(dataclasses.replace(branch, program="q"), 12)
    assert charges.iterations == 3
