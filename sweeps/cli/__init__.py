"""The command line.

`app` puts it together: `main`. `sweep_commands`, `budget_commands`, `data_commands` and
`ledger_commands` hold the commands, `options` what they share on the way in, `output` on the way
out.

Nothing that takes long to import is imported before a command needs it, so that help and tab
completion answer at once.
"""

from sweeps.cli.app import main

__all__ = ["main"]
