"""The picture as a PNG file."""

import pytest

from sweeps.report.figure_png import write_png
from tests.sweeps.report.example_results import CASES, SCRIPT, batch, many, sweep, trial


@pytest.mark.parametrize("results", CASES.values(), ids=CASES.keys())
def test_every_sweep_can_be_drawn(results, tmp_path):
    write_png(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


def test_png_repeats(tmp_path):
    for name in ("a", "b"):
        write_png(many(12), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_png_leaves_pyplot_alone(tmp_path):
    from matplotlib import rcParams

    before = dict(rcParams)
    write_png(many(12), tmp_path / "picture.png")
    assert dict(rcParams) == before


@pytest.mark.parametrize("text", ["$\\bad{", SCRIPT], ids=["dollar", "markup"])
def test_nothing_that_a_person_wrote_is_mathematics(text, tmp_path):
    results = sweep(trial(0, config=batch(64.0, text)), name=text, dataset=text)
    write_png(results, tmp_path / "picture.png")


def test_characters_that_the_font_lacks_are_no_warning(tmp_path):
    write_png(sweep(trial(0), name="日本", dataset="日本"), tmp_path / "picture.png")
