"""``python -m sweeps.cli`` is ``dp-sweeps``."""

from sweeps.cli import main

main()
