"""What a benchmark of something that takes time, or may lose something, comes to."""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number and its limit, which is an upper one.

    Attributes:
        name: What it is.
        value: The number.
        limit: What it must not exceed.
        note: What it was made from.
    """

    name: str
    value: float
    limit: float
    note: str

    @property
    def reached(self) -> bool:
        """Whether the number keeps to its limit."""
        return self.value <= self.limit


def arguments(description: str, parts: Iterable[str]) -> argparse.Namespace:
    """What a person asks of a benchmark: ``only`` some parts, ``json``, ``save``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", action="append", choices=list(parts), help="one part; repeat")
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    return parser.parse_args()


def conclude(
    figures: Sequence[Figure],
    asked: argparse.Namespace,
    *,
    name: str,
    title: str,
    versions: Mapping[str, str],
) -> NoReturn:
    """Prints and keeps figures as was asked, and exits with 1 if a limit was missed.

    Args:
        figures: What was measured.
        asked: From `arguments`.
        name: Of the files under ``benchmarks/results``.
        title: Of the table.
        versions: What it was measured with.
    """
    where = f"{platform.processor() or platform.machine()} ({os.cpu_count()} CPUs)"
    used = ", ".join(f"{package} {version}" for package, version in versions.items())
    table = Table(title=f"{title}, {where}, {used}, Python {platform.python_version()}")
    for column in ("figure", "measured", "at most", "", "of"):
        table.add_column(column)
    for figure in figures:
        reached = "yes" if figure.reached else "NO"
        table.add_row(
            figure.name, f"{figure.value:.3g}", f"{figure.limit:g}", reached, figure.note
        )
    rows = [{**dataclasses.asdict(figure), "reached": figure.reached} for figure in figures]
    record = {"device": where, **versions, "figures": rows}
    if asked.json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        Console().print(table)
    if asked.save:
        today = datetime.date.today().isoformat()
        target = Path(__file__).parent / "results" / f"{name}-cpu-{today}"
        target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        with target.with_suffix(".md").open("w") as file:
            Console(file=file, width=160).print(table)
    sys.exit(not all(figure.reached for figure in figures))
