"""What a private selection remembers: durable, for its owner alone, and gone with its losers."""

import dataclasses
import math

import pytest

from sweeps.errors import HaltedError, SweepError
from sweeps.selection_folder import Progress, SelectionFolder, score


def report(accuracy, step=12, outcome="completed"):
    return {"step": step, "eval_accuracy": accuracy, "eval_loss": 1.0, "outcome": outcome}


def after(progress, *accuracies):
    """The numbers of the best after trials that end with such accuracies, one after the other."""
    best = []
    for accuracy in accuracies:
        progress = dataclasses.replace(progress, curve=(report(accuracy),)).with_ended("b" * 16)
        best.append(progress.best.number)
    return best


@pytest.fixture
def folder(tmp_path):
    folder = SelectionFolder(tmp_path / "secrets", "s-1-0000")
    with folder.held(0.0):
        yield folder


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def test_the_secret_is_drawn_once(folder, tmp_path):
    first = folder.begin()
    assert len(first.secret) == 32
    assert folder.begin() == folder.read() == first
    other = SelectionFolder(tmp_path / "others", "s-1-0000")
    with other.held(0.0):
        assert other.begin().secret != first.secret


def test_one_process_at_a_time_uses_it(folder, tmp_path):
    same = SelectionFolder(tmp_path / "secrets", "s-1-0000")
    with pytest.raises(HaltedError, match="another process uses it"), same.held(0.0):
        pass
    folder.remove()
    with same.held(0.0):
        assert same.read() is None


def test_nobody_else_may_read_it(folder, tmp_path):
    folder.begin()
    folder.write(dataclasses.replace(folder.begin(), number=2))
    place = tmp_path / "secrets" / "selections" / "s-1-0000"
    for each in (place, place.parent, place.parent.parent):
        assert each.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in place.iterdir()) == ["lock", "progress.json"]
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}
    assert folder.begin().secret.hex() not in repr(folder.begin())


def test_all_of_it_is_read_as_it_was_written(folder):
    curve = (report(0.5, 4, "running"), report(math.nan, 8, "diverged"))
    progress = dataclasses.replace(folder.begin(), curve=curve, microbatch_size=8, attempt=3)
    folder.write(progress.with_ended("b" * 16))
    found = folder.read()
    assert dataclasses.replace(found, best=None) == dataclasses.replace(
        progress, number=1, curve=(), best=None
    )
    assert (found.best.number, found.best.score) == (0, -math.inf)
    assert str(found.best.curve) == str(curve)  # NaN is not equal to itself


@pytest.mark.parametrize("damage", ["", "{}", '{"secret": "no"}', "[1]"])
def test_what_is_damaged_is_not_drawn_anew(folder, tmp_path, damage):
    folder.begin()
    path = tmp_path / "secrets" / "selections" / "s-1-0000" / "progress.json"
    path.write_text(damage)
    with pytest.raises(SweepError, match=r"has to remember, .* is damaged"):
        folder.begin()


def test_the_best_is_the_first_of_those_that_are_as_good():
    begun = Progress(secret=b"s" * 32)
    assert after(begun, 0.2, 0.5, 0.5, 0.4) == [0, 1, 1, 1]


def test_what_diverged_counts_as_worst():
    assert score(report(0.9, outcome="diverged")) == -math.inf
    assert score(report(math.nan)) == score({"outcome": "completed"}) == -math.inf
    assert after(Progress(secret=b"s" * 32), math.nan, math.nan, 0.0) == [0, 0, 2]


def test_losers_go_as_soon_as_they_have_lost(folder, tmp_path):
    progress = folder.begin()
    place = tmp_path / "secrets" / "selections" / "s-1-0000"
    for number, accuracy in enumerate([0.5, 0.4, 0.6]):
        (folder.trial(number) / "checkpoints").mkdir(parents=True)
        progress = dataclasses.replace(progress, curve=(report(accuracy),)).with_ended("b" * 16)
        folder.write(progress)
        kept = f"trial-{progress.best.number}"
        assert sorted(path.name for path in place.iterdir()) == ["lock", "progress.json", kept]


def test_nothing_is_left_of_it(folder, tmp_path):
    folder.begin()
    folder.trial(0).mkdir()
    folder.remove()
    assert files(tmp_path / "secrets") == []
    assert folder.read() is None
    folder.remove()


def test_what_a_kill_left_is_removed_later(folder, tmp_path):
    folder.begin()
    place = tmp_path / "secrets" / "selections"
    (place / "s-1-0000").rename(place / ".s-1-0000.0badcafe.removed")
    other = SelectionFolder(tmp_path / "secrets", "s-1-0001")
    with other.held(0.0):
        other.begin()
    folder.remove()
    assert [path.name for path in place.iterdir()] == ["s-1-0001"]
