"""What it would cost to go on with trials, or to fork one, for people and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from sweeps.database.forking import Fork
from sweeps.database.readmission import Readmission
from sweeps.report.json_numbers import legal_json
from sweeps.report.table import show_epsilon


def going_on_table(decisions: Sequence[Readmission]) -> Table:
    """One row for each trial, and the sum."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("trial", "from step", "to step", "new iterations", "ε so far", "ε in the end"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for each in decisions:
        table.add_row(
            str(each.number),
            f"{each.step:,}",
            f"{each.iterations:,}",
            f"{each.new_iterations:,}",
            show_epsilon(each.epsilon),
            "" if each.refusal else show_epsilon(each.epsilon_after),
            Text(f"refused: {each.refusal}" if each.refusal else "goes on"),
        )
    admitted = [each for each in decisions if each.admitted]
    if len(decisions) > 1:
        new = sum(each.new_iterations for each in admitted)
        table.add_row("", "", "sum", f"{new:,}", "", "", f"{len(admitted)} go on")
    return table


def going_on_json(decisions: Sequence[Readmission]) -> dict[str, Any]:
    """The same as plain JSON."""
    return {
        "trials": [
            {
                "trial_id": each.trial_id,
                "number": each.number,
                "state": each.state,
                "step": each.step,
                "iterations": each.iterations,
                "new_iterations": each.new_iterations,
                "epsilon": each.epsilon,
                "epsilon_after": each.epsilon_after,
                "admitted": each.admitted,
                "refusal": each.refusal,
            }
            for each in decisions
        ],
        "new_iterations": sum(each.new_iterations for each in decisions if each.admitted),
    }


def fork_lines(fork: Fork, *, dry_run: bool) -> list[str]:
    """What a fork costs, beside what its beginning has cost already, and what was decided."""
    decision = "would be admitted" if dry_run else f"admitted as trial {fork.number}"
    return [
        f"from      trial {fork.parent_trial_id}, its checkpoint at step {fork.parent_step:,}",
        f"to        step {fork.iterations:,}: {fork.new_iterations:,} new iterations",
        f"ε         {show_epsilon(fork.epsilon)} of its beginning, which is paid; "
        f"{show_epsilon(fork.epsilon_after)} in the end",
        f"decision  {f'refused: {fork.refusal}' if fork.refusal else decision}",
    ]


def fork_json(fork: Fork) -> dict[str, Any]:
    """The same as plain JSON."""
    return legal_json({**dataclasses.asdict(fork), "admitted": fork.admitted})
