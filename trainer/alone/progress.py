"""What a person sees of a run while it lasts: one line that moves, or a line per report.

Everything shown is public or covered by the guarantee. Examples per second are expected ones, a
public number times steps per second, for how many a batch really held is private.
"""

import math
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from accounting.policies import shown_epsilon
from trainer.config import TrialConfig
from trainer.reporting import TrialReport, releasable


def shown_report(config: TrialConfig, report: TrialReport) -> dict[str, Any]:
    """The fields of a report that its owner may see, as JSON data.

    Public and DP ones; and who asked for non-private evaluation by that name gets what it found
    by that name.
    """
    fields = releasable(report)
    if config.evaluation.protection == "non_private":
        fields["non_private_eval_accuracy"] = report.non_private_eval_accuracy
        fields["non_private_eval_loss"] = report.non_private_eval_loss
    # JSON has no NaN, and a diverged trial's loss may be one.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }


def accuracies(report: dict[str, Any]) -> str:
    """The accuracies of a shown report, in words."""
    found = [
        f"{words} {report[name]:.4f}"
        for name, words in (
            ("eval_accuracy", "accuracy"),
            ("ema_eval_accuracy", "of the EMA"),
            ("polyak_eval_accuracy", "of the mean"),
            ("non_private_eval_accuracy", "NON-PRIVATE accuracy"),
        )
        if report.get(name) is not None
    ]
    return ", ".join(found)


class RunProgress:
    """A run's progress on standard error; a context manager.

    Args:
        config: The trial.
        start: Steps behind it.
        console: Where it is shown.
        moves: Whether one line is written over again and again; else each report has its own.
    """

    def __init__(self, config: TrialConfig, start: int, console: Console, *, moves: bool) -> None:
        self._config, self._start, self._console = config, start, console
        self._moves = moves
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._begun_at = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._facts = "compiling"

    def __enter__(self) -> "RunProgress":
        if self._moves:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(20))
            facts = TextColumn("{task.fields[facts]}")
            self._live = Progress(
                *columns, facts, console=self._console, transient=True, redirect_stdout=False
            )
            self._task = self._live.add_task(
                "", total=self._config.iterations, completed=self._start, facts=self._facts
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def on_step(self, step: int) -> None:
        """A `trainer.training.runners.OnStep`."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def on_report(self, report: dict[str, Any]) -> None:
        """Shows a report (`shown_report`)."""
        self._facts = self._line(report)
        if self._live is not None:
            self._live.update(self._task, completed=report["step"], facts=self._facts)
        else:
            step = f"step {report['step']}/{self._config.iterations}"
            self.note(f"{step}  {self._facts}")

    def note(self, text: str, *, style: str = "") -> None:
        """A line that stays."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _line(self, report: dict[str, Any]) -> str:
        step, now = report["step"], time.monotonic()
        # What came before the first report was mostly compiling, and tells little of the rest.
        since_step, since = self._first or (self._start, self._begun_at)
        rate = max(step - since_step, 1) / max(now - since, 1e-6)
        speed = [
            f"{rate:.3g} steps/s",
            f"{rate * self._config.expected_batch_size:,.0f} {self._config.privacy_unit}s/s",
        ]
        left = f"{_clock((self._config.iterations - step) / rate)} left"
        if self._first is None:
            self._first, speed, left = (step, now), [f"began in {now - since:.1f} s"], ""
        spent = f"epsilon {shown_epsilon(report['epsilon'])}"
        end = left if report["outcome"] == "running" else report["outcome"]
        return "  ".join(filter(None, [*speed, spent, accuracies(report), end]))


def _clock(secs: float) -> str:
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
