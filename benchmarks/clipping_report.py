"""The clipping benchmark's table, and its files below ``results``."""

import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.clipping_rows import Row

_MIB = 2**20
NOTES = (
    "Times and compilation as multiples of the same library's plain, non-private gradient of the "
    "same model in the same process; engines take turns, the ratio is the median of rounds.",
    "examples: the largest batch whose temporary memory, by XLA's own plan, is no more than "
    "that of vmap with the batch of the table.",
    "distance: relative L2 distance of the clipped sum from that of vmap (JAX, two examples) or "
    "of hooks (Opacus).",
    "Opacus has the same layers; wide residual networks without weight standardisation.",
)


def environment(peers: dict[str, str]) -> dict[str, Any]:
    """What the figures hold for."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "jax-privacy")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
            **peers,
        },
    }


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Everything that was measured."""
    data = {**about, "rows": [_complete(row) for row in rows]}
    return json.dumps(data, indent=2) + "\n"


def table(rows: Sequence[Row], style: box.Box = box.HEAVY_HEAD) -> Table:
    """One line per model and engine."""
    drawn = Table(box=style)
    for number, (title, _) in enumerate(_COLUMNS):
        words = number < 2 or title == "note"
        drawn.add_column(title, justify="left" if words else "right", no_wrap=number < 2)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is None or following.model != row.model
        cells = [_COLUMNS[number][1](row) for number in range(len(_COLUMNS))]
        drawn.add_row(*cells, end_section=last)
    return drawn


def save(rows: Sequence[Row], about: dict[str, Any], folder: Path) -> list[Path]:
    """Writes ``clipping-<device>-<date>`` as JSON and Markdown; gives their paths."""
    folder.mkdir(exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    path = folder / f"clipping-{device}-{about['date']}.json"
    path.write_text(as_json(rows, about), encoding="utf-8")
    text = path.with_suffix(".md")
    text.write_text(_markdown(rows, about), encoding="utf-8")
    return [path, text]


def _markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    written = io.StringIO()
    Console(file=written, width=400).print(table(rows, box.MARKDOWN))
    lines = [line.rstrip() for line in written.getvalue().splitlines() if line.strip()]
    head, rule, *body = lines
    body = [line for line in body if set(line) - set("|-: ")]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join(
        [
            f"# Clipped gradients on {about['device']}, {about['date']}",
            "",
            f"{about['processor']}, {about['cores']} cores; load before: {about['load_before']}.",
            f"{versions}.",
            "",
            *(f"- {note}" for note in NOTES),
            "",
            head,
            rule,
            *body,
            "",
        ]
    )


def _complete(row: Row) -> dict[str, Any]:
    data = dataclasses.asdict(row)
    if row.seconds:
        data["least_ms"] = 1e3 * min(row.seconds)
        data["median_ms"] = 1e3 * statistics.median(row.seconds)
    return data


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"model name\s*:\s*(.+)", information.read_text(encoding="utf-8"))
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}{unit}"


def _ratio(value: float | None) -> str:
    return _number(value, " x")


def _name(row: Row) -> str:
    return row.engine if row.library == "jax" else f"{row.library}: {row.engine}"


def _ms(choose: Callable[[list[float]], float]) -> Callable[[Row], str]:
    return lambda row: _number(1e3 * choose(row.seconds)) if row.seconds else ""


def _mib(value: float | None) -> str:
    return "" if value is None else _number(value / _MIB)


_COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("model, batch", lambda row: f"{row.model}, {row.batch_size}"),
    ("engine", _name),
    ("ms, least", _ms(min)),
    ("ms, median", _ms(statistics.median)),
    ("x plain", lambda row: _ratio(row.ratio)),
    ("compile, s", lambda row: _number(row.compile_seconds)),
    ("x plain", lambda row: _ratio(row.compile_ratio)),
    ("temp., MiB", lambda row: _mib(row.temporary_bytes)),
    ("x plain", lambda row: _ratio(row.temporary_ratio)),
    ("MiB/example", lambda row: _mib(row.bytes_per_example)),
    ("examples", lambda row: "" if row.examples is None else str(row.examples)),
    ("distance", lambda row: "" if row.distance is None else f"{row.distance:.0e}"),
    ("note", lambda row: row.note),
]
