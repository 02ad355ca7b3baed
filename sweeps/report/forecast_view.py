"""What a sweep will take of machines, in words under its plan."""

from collections.abc import Callable

from rich.filesize import decimal
from rich.text import Text

from sweeps.forecast.reckoning import Forecast, Range
from sweeps.report.live import show_secs
from sweeps.report.table import show_value


def forecast_lines(forecast: Forecast) -> list[Text]:
    """Hours of accelerators, wall time and disk, and where that comes from."""
    hours, wall = forecast.accelerator_hours, forecast.wall_secs
    if hours is None or wall is None:
        return [Text(f"How long it takes is {forecast.origin}.")] if forecast.trials else []
    concurrent, width = forecast.concurrent, forecast.trials_per_worker
    words = (
        f"Takes {_show(hours, show_value)} accelerator-hours and {_show(wall, _duration)}, "
        f"{concurrent} {'trial' if width == 1 else 'worker'}{'s' * (concurrent > 1)} at a time"
    )
    if width > 1:
        words += f" with up to {width} trials each"
    if forecast.is_most:
        words += "; less where trials are pruned or a rule of stop holds before"
    lines = [Text(f"{words} ({forecast.origin}).")]
    if forecast.unknown_trials:
        lines.append(
            Text(
                f"Of that nothing is known of {show_value(forecast.unknown_trials)} of "
                f"{show_value(forecast.trials)} trials, which are left out; --calibrate "
                "measures them."
            )
        )
    if forecast.checkpoint_bytes is not None and forecast.most_checkpoint_bytes is not None:
        kept, most = decimal(forecast.checkpoint_bytes), decimal(forecast.most_checkpoint_bytes)
        lines.append(Text(f"Checkpoints take {kept} on disk in the end, {most} meanwhile."))
    return lines


def _show(found: Range, show: Callable[[float], str]) -> str:
    about, least, most = show(found.about), show(found.least), show(found.most)
    return f"about {about}" if least == about == most else f"about {about} ({least} to {most})"


def _duration(secs: float) -> str:
    return show_secs(max(secs, 1.0))
