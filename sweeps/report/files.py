"""A sweep's report as files: the picture twice, the results and the specification."""

import json
import tempfile
from pathlib import Path

from sweeps.home import Home
from sweeps.report.documents import results_json
from sweeps.report.figure_html import write_html
from sweeps.report.figure_png import write_png
from sweeps.report.results import SweepResults


def write_report(results: SweepResults, home: Home) -> dict[str, str]:
    """Writes a sweep's report, over one that is there; all of it, or nothing.

    Returns:
        Name to absolute path: ``png``, ``html``, ``json`` (the results), ``spec``.

    Raises:
        OSError: If it cannot be written.
    """
    paths = _report_paths(home, results.sweep_id)
    report = {name: str(path) for name, path in paths.items()}
    folder = paths["png"].parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as name:
        new = {key: Path(name) / path.name for key, path in paths.items()}
        write_png(results, new["png"])
        write_html(results, new["html"])
        _write_json(new["json"], results_json(results, report=report))
        _write_json(new["spec"], results.spec)
        for key, path in new.items():
            path.replace(paths[key])
    return report


def report_files(home: Home, sweep_id: str) -> dict[str, str]:
    """The files of a sweep's report that are there, as `write_report` names them."""
    paths = _report_paths(home, sweep_id)
    return {name: str(path) for name, path in paths.items() if path.exists()}


def _report_paths(home: Home, sweep_id: str) -> dict[str, Path]:
    folder = home.sweep_dir(sweep_id) / "report"
    return {
        "png": folder / "utility_privacy.png",
        "html": folder / "utility_privacy.html",
        "json": folder / "results.json",
        "spec": folder / "spec.json",
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
