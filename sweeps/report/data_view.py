"""Prepared data sets in words and as JSON: public facts alone.

Where a size is protected there is no number to show: `trainer.data.catalog` has left it out.
"""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from sweeps.report.table import NO_VALUE, one_line
from trainer.data.catalog import PreparedDataset

_MAX_PROBLEM = 500


def dataset_json(dataset: PreparedDataset) -> dict[str, Any]:
    """What ``dp-sweeps data show --json`` prints."""
    declared = dataset.declaration
    return {
        "name": dataset.name,
        "version": dataset.version,
        "path": str(dataset.path),
        "splits": [
            {"split": split, "num_examples": size} for split, size in dataset.splits.items()
        ],
        "formats": list(dataset.formats),
        "readable": not dataset.problem,
        "problem": dataset.problem,
        "image_shape": None if dataset.image_shape is None else list(dataset.image_shape),
        "num_classes": dataset.num_classes,
        "fingerprint": dataset.fingerprint,
        "privacy_unit": declared and declared.privacy_unit,
        "user_feature": declared and declared.user_feature,
        "size": declared and declared.size,
        "declared_num_examples": declared and declared.declared_num_examples,
    }


def datasets_json(datasets: Sequence[PreparedDataset]) -> dict[str, Any]:
    """What ``dp-sweeps data list --json`` prints."""
    return {"datasets": [dataset_json(dataset) for dataset in datasets]}


class DatasetList:
    """A line for each data set, and below the table why some cannot be read."""

    def __init__(self, datasets: Sequence[PreparedDataset]) -> None:
        self.datasets = datasets

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What rich asks for."""
        if not self.datasets:
            yield Text(
                "no data set is prepared; `dp-sweeps data prepare digits` makes a small one"
            )
            return
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for heading in ("data set", "splits", "format", "readable", "unit"):
            table.add_column(heading, overflow="fold")
        for dataset in self.datasets:
            declared = dataset.declaration
            table.add_row(
                Text(f"{dataset.name}:{dataset.version}"),
                Text(_splits(dataset)),
                Text(", ".join(dataset.formats) or NO_VALUE),
                Text("no", style="red") if dataset.problem else Text("yes"),
                Text(declared.privacy_unit if declared else NO_VALUE),
            )
        yield table
        for dataset in self.datasets:
            if dataset.problem:
                yield Text(one_line(dataset.problem, _MAX_PROBLEM), style="red")


class DatasetView:
    """All public facts about one data set, a line each."""

    def __init__(self, dataset: PreparedDataset) -> None:
        self.dataset = dataset

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What rich asks for."""
        dataset, declared = self.dataset, self.dataset.declaration
        shape = dataset.image_shape
        rows = {
            "data set": f"{dataset.name}:{dataset.version}",
            "path": str(dataset.path),
            "splits": _splits(dataset),
            "format": ", ".join(dataset.formats) or NO_VALUE,
            "image": "x".join("?" if side is None else str(side) for side in shape or ())
            or NO_VALUE,
            "classes": str(dataset.num_classes or NO_VALUE),
            "fingerprint": dataset.fingerprint or NO_VALUE,
            "unit": "not declared (`dp-sweeps data declare` does, for every sweep)",
        }
        if declared is not None:
            by = f", told by {declared.user_feature}" if declared.user_feature else ""
            number = declared.declared_num_examples
            rows["unit"] = f"{declared.privacy_unit}{by}"
            rows["size"] = declared.size + (f", reckoned with {number}" if number else "")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for heading, value in rows.items():
            grid.add_row(heading, Text(one_line(value, _MAX_PROBLEM)))
        yield grid
        if dataset.problem:
            yield Text(one_line(dataset.problem, _MAX_PROBLEM), style="red")


def _splits(dataset: PreparedDataset) -> str:
    if dataset.splits and all(size is None for size in dataset.splits.values()):
        return f"{', '.join(dataset.splits)} (sizes protected)"
    return ", ".join(f"{split} {size:,}" for split, size in dataset.splits.items()) or NO_VALUE
