"""The live view: words about progress on a simulated clock, and a thread that harms nothing."""

import dataclasses
import io
import threading
from typing import Any

import pytest
from rich.console import Console

from accounting import BudgetTerms, DpSgdMechanism
from sweeps.database.admitting import NewTrial
from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import NewSweep, Store, open_store
from sweeps.home import Home
from sweeps.report import live
from sweeps.report.live import LiveView, PlainLines, Sample, panel, progress, sample, show_secs
from sweeps.report.results import CurvePoint, SweepResults, TrialSummary, read_results
from tests.sweeps.report.example_results import sweep
from trainer.mechanism.branch import Branch


def trial(
    number: int,
    state: TrialState = TrialState.ADMITTED,
    steps: int = 0,
    accuracy: float | None = None,
    reason: str = "",
) -> TrialSummary:
    curve = (CurvePoint(steps, steps, steps / 20, accuracy, 0.5),) if accuracy is not None else ()
    return TrialSummary(
        trial_id=f"t{number}",
        number=number,
        state=state,
        reason=reason,
        config={"optimizer": "adam", "learning_rate": 0.1 * (number + 1), "iterations": 100},
        planned_iterations=100,
        planned_epsilon=5.0,
        charged_iterations=steps,
        curve=curve,
        mlflow_run_id=None,
    )


def ongoing(*trials: TrialSummary, **changes: Any) -> SweepResults:
    return sweep(*trials, **{"state": SweepState.RUNNING, "ended_at": None, **changes})


MIDWAY = ongoing(
    trial(0, TrialState.COMPLETED, 100, 0.8),
    trial(1, TrialState.PRUNED, 25, 0.3, "below the best quarter"),
    trial(2, TrialState.RUNNING, 50, 0.6),
    trial(3),
    trial(4, TrialState.REJECTED, reason="epsilon 12 exceeds the budget of 8"),
)

# --- Progress ------------------------------------------------------------------------------


def test_steps_of_ended_trials_are_released_and_rejected_ones_never_counted():
    now = progress(MIDWAY, [], 0.0)
    assert now.admitted_steps == 400
    assert now.done_steps == 175
    assert now.released_steps == 75
    assert now.fraction == 250 / 400
    assert [t.number for t in now.running] == [2]
    assert now.best is not None
    assert now.best.trials == (MIDWAY.trials[0],)
    assert now.counts == {
        TrialState.ADMITTED: 1,
        TrialState.REJECTED: 1,
        TrialState.RUNNING: 1,
        TrialState.PRUNED: 1,
        TrialState.COMPLETED: 1,
    }


def test_rate_is_that_of_the_recent_window():
    # 25 steps in the last 25 seconds; what came before the window does not count.
    history = [Sample(0.0, 0), Sample(75.0, 150), Sample(90.0, 160)]
    now = progress(MIDWAY, history, 100.0)
    assert now.steps_per_sec == 1.0
    assert now.secs_left == 150.0


@pytest.mark.parametrize("history", [[], [Sample(9.5, 0)], [Sample(-100.0, 0)]])
def test_no_rate_without_a_recent_past(history):
    now = progress(MIDWAY, history, 10.0)
    assert now.steps_per_sec is None
    assert now.secs_left is None


def test_a_sweep_that_stands_still_has_no_time_left_to_tell():
    now = progress(MIDWAY, [Sample(0.0, 175)], 10.0)
    assert now.steps_per_sec == 0
    assert now.secs_left is None


def test_the_end():
    ended = ongoing(trial(0, TrialState.COMPLETED, 100, 0.8), trial(1, TrialState.FAILED, 10))
    now = progress(ended, [sample(ended, 0.0)], 10.0)
    assert now.fraction == 1
    assert now.secs_left == 0


def test_nothing_admitted_is_done():
    assert progress(ongoing(trial(0, TrialState.REJECTED)), [], 0.0).fraction == 1


def test_durations():
    shown = [show_secs(secs) for secs in (0, 59.4, 60, 3599, 7500, 400_000)]
    assert shown == ["0 s", "59 s", "1 min 00 s", "59 min 59 s", "2 h 05 min", "5 days"]


# --- Plain lines ---------------------------------------------------------------------------


def selection(state: TrialState, **changes: Any) -> TrialSummary:
    """A private selection: charged at once, and silent until its winner is out."""
    began = {TrialState.ADMITTED: 0}.get(state, 1)
    summary = dataclasses.replace(trial(0, state), planned_iterations=1, selects=True)
    return dataclasses.replace(summary, charged_iterations=began, **changes)


WINNER = (CurvePoint(100, 1, 5.0, 0.8, 0.5),)


def test_of_a_private_selection_nothing_is_told_before_its_winner():
    running = ongoing(selection(TrialState.RUNNING, config={"optimizer": "adam"}))
    opening, later, ended = told(
        (running, 0.0),
        (running, 60.0),
        (ongoing(selection(TrialState.COMPLETED, curve=WINNER)), 120.0),
    )
    assert opening[2:] == [
        "trial 0 started: a private selection: how far it is stays secret, ε up to 5"
    ]
    assert later == ["1 running"]
    assert ended[0] == "trial 0 completed: 80.00% at ε = 5"
    file = io.StringIO()
    now = progress(running, [sample(running, 0.0)], 30.0)
    Console(file=file, width=90).print(panel(running, now, 30.0))
    shown = file.getvalue()
    assert "how far it is stays secret" in shown
    assert "30 s so far" in shown
    assert "steps" not in shown
    assert "1/1" not in shown


def told(*frames: tuple[SweepResults, float]) -> list[list[str]]:
    plain = PlainLines()
    return [plain.lines(results, progress(results, [], at), at) for results, at in frames]


def test_lines_tell_each_start_and_end_once():
    rejected = trial(3, TrialState.REJECTED, reason="epsilon 12 exceeds the budget of 8")
    opening, started, ended, same = told(
        (ongoing(trial(0), trial(1), trial(2), rejected), 0.0),
        (ongoing(trial(0, TrialState.RUNNING, 10), trial(1), trial(2), rejected), 1.0),
        (
            ongoing(
                trial(0, TrialState.COMPLETED, 100, 0.8),
                trial(1, TrialState.PRUNED, 25, 0.3, "too slow"),
                trial(2, TrialState.FAILED, 0, None, "lost\x1b[31m"),
                rejected,
            ),
            2.0,
        ),
        (
            ongoing(
                trial(0, TrialState.COMPLETED, 100, 0.8),
                trial(1, TrialState.PRUNED, 25, 0.3, "too slow"),
                trial(2, TrialState.FAILED, 0, None, "lost\x1b[31m"),
                rejected,
            ),
            3.0,
        ),
    )
    assert opening == [
        "digits: policy per_trial, budget ε = 8, δ = 1e-05",
        "4 trials: 3 admitted, 1 rejected",
        "rejected trial 3: epsilon 12 exceeds the budget of 8",
    ]
    assert started == ["trial 0 started: learning_rate=0.1; 100 steps, ε up to 5"]
    assert ended == [
        "trial 0 completed: 80.00% at ε = 5 (100/100 steps)",
        "trial 1 started: learning_rate=0.2; 100 steps, ε up to 5",
        "trial 1 pruned: 30.00% at ε = 1.25 (25/100 steps): too slow",
        "trial 2 failed (0/100 steps): lost [31m",
    ]
    assert same == []


def test_a_view_that_comes_late_does_not_tell_old_ends():
    (opening,) = told((MIDWAY, 0.0))
    assert [line for line in opening if line.startswith("trial")] == [
        "trial 2 started: learning_rate=0.3; 100 steps, ε up to 5"
    ]


def test_a_pause_and_what_follows():
    *_, paused, resumed = told(
        (ongoing(trial(0, TrialState.RUNNING, 10)), 0.0),
        (ongoing(trial(0, TrialState.PAUSED, 10)), 1.0),
        (ongoing(trial(0, TrialState.RUNNING, 10)), 2.0),
    )
    assert paused == ["trial 0 paused"]
    assert resumed == ["trial 0 resumed: 100 steps, ε up to 5"]


def test_progress_is_told_at_most_every_ten_seconds_and_only_if_it_is_news():
    frames = [(ongoing(trial(0, TrialState.RUNNING, step)), float(step)) for step in range(0, 31)]
    lines = told(*frames, (frames[-1][0], 41.0))
    news = {at: [line for line in said if "steps (" in line] for at, said in enumerate(lines)}
    assert {at for at, said in news.items() if said} == {10, 20, 30}
    assert news[20] == ["20/100 steps (20%); 1 running"]


def test_progress_line_names_rate_time_and_best():
    plain = PlainLines()
    plain.lines(MIDWAY, progress(MIDWAY, [], 0.0), 0.0)
    (line,) = plain.lines(MIDWAY, progress(MIDWAY, [Sample(75.0, 150)], 100.0), 100.0)
    assert line == (
        "175/325 steps (62%); 1 steps/s, about 2 min 30 s left; 1 admitted, 1 rejected, "
        "1 running, 1 pruned, 1 completed; best 80.00% at ε = 5 (trial 0)"
    )


# --- The panel -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 140])
def test_panel_shows_what_matters(width):
    file = io.StringIO()
    now = progress(MIDWAY, [Sample(75.0, 150)], 100.0)
    Console(file=file, width=width).print(panel(MIDWAY, now, 100.0))
    text = " ".join(file.getvalue().split())
    for words in ("1 running", "1 pruned", "80.00% at ε = 5", "50/100", "60.00%", "1 steps/s"):
        assert words in text
    assert max(len(line) for line in file.getvalue().splitlines()) <= width


def test_panel_counts_the_running_trials_that_it_leaves_out():
    results = ongoing(*(trial(n, TrialState.RUNNING, 1) for n in range(20)))
    file = io.StringIO()
    Console(file=file, width=80).print(panel(results, progress(results, [], 0.0), 0.0))
    assert "and 12 more" in file.getvalue()


def test_panel_before_the_first_report():
    results = ongoing(trial(0))
    Console(file=io.StringIO()).print(panel(results, progress(results, [], 0.0), 0.0))


# --- The thread ----------------------------------------------------------------------------


@pytest.fixture
def store():
    store = open_store(Home.from_environment())
    store.create_sweep(
        NewSweep(
            sweep_id="s",
            name="[red]digits",
            spec=sweep().spec,
            spec_hash="0",
            dataset="digits:1.0.0",
            dataset_fingerprint="0",
            terms=BudgetTerms(epsilon=8.0, delta=1e-5, policy="per_trial"),
        ),
        [
            NewTrial(
                trial_id="s-0",
                number=0,
                mechanism=DpSgdMechanism(
                    noise_multiplier=4.0,
                    sampling_prob=0.01,
                    iterations=100,
                    neighboring_relation="zero_out",
                ),
                reason="",
                config={"optimizer": "adam"},
                trial_config=None,
                planned_iterations=100,
                planned_epsilon=5.0,
            )
        ],
    )
    yield store
    store.ledger.close()


@pytest.fixture
def frames(monkeypatch):
    """Reads are announced, follow each other at once, and one may be told to fail."""

    class Frames:
        def __init__(self) -> None:
            self.fail = False
            self.seen = threading.Semaphore(0)

        def read(self, store: Store, sweep_id: str) -> SweepResults:
            try:
                if self.fail:
                    raise OSError("the disk is gone")
                return read_results(store, sweep_id)
            finally:
                self.seen.release()

        def wait(self) -> None:
            # The second read from here on began after whatever the caller did before; with the
            # third, it has been shown.
            while self.seen.acquire(blocking=False):
                pass
            for _ in range(3):
                assert self.seen.acquire(timeout=30)

    frames = Frames()
    monkeypatch.setattr(live, "read_results", frames.read)
    monkeypatch.setattr(live, "_FRAME_SECS", 0.0)
    return frames


def test_where_there_is_no_terminal_it_writes_lines_without_codes(store, frames):
    file = io.StringIO()
    with LiveView(store, "s", Console(file=file, width=20)):
        frames.wait()
        attempt = store.attempts.begin("s-0")
        frames.wait()
        branch = Branch("0123456789abcdef", 0)
        store.attempts.charge(attempt, branch, 100)
        metrics = {"epsilon": 5.0, "eval_accuracy": 0.75, "eval_loss": 0.5}
        store.attempts.report(attempt, branch.branch_id, 100, metrics, end=TrialState.COMPLETED)
    assert file.getvalue().splitlines() == [
        "[red]digits: policy per_trial, budget ε = 8, δ = 1e-05",
        "1 trial: 1 admitted",
        "trial 0 started: 100 steps, ε up to 5",
        "trial 0 completed: 75.00% at ε = 5 (100/100 steps)",
    ]


def test_on_a_terminal_it_draws_and_wipes(store, frames):
    file = io.StringIO()
    with LiveView(store, "s", Console(file=file, width=80, force_terminal=True)):
        frames.wait()
    assert "[red]digits: policy per_trial" in file.getvalue()
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


def test_a_read_that_fails_leaves_out_a_frame(store, frames):
    file = io.StringIO()
    frames.fail = True
    with LiveView(store, "s", Console(file=file, width=80)):
        frames.wait()
        assert file.getvalue() == ""
        frames.fail = False
    assert "1 trial: 1 admitted" in file.getvalue()


def test_a_console_that_is_gone_does_not_reach_the_sweep(store, frames):
    file = io.StringIO()
    file.close()
    with LiveView(store, "s", Console(file=file, width=80)):
        frames.wait()


def test_the_end_wakes_it_at_once(store, monkeypatch):
    monkeypatch.setattr(live, "_FRAME_SECS", 3600.0)
    with LiveView(store, "s", Console(file=io.StringIO())):
        pass
    assert "live-view" not in [thread.name for thread in threading.enumerate()]


def test_an_error_of_the_block_goes_through(store):
    with (
        pytest.raises(KeyboardInterrupt),
        LiveView(store, "s", Console(file=io.StringIO())),
    ):
        raise KeyboardInterrupt
