"""The command line of the product, whose workers say what they do.

    python -c "from benchmarks.sweeps_worker import main; main()" run SPEC

Not to be started as a module: workers would not find what is called ``__main__``.
"""

from typing import Any

from benchmarks.sweeps_watch import watch
from sweeps import cli, tune


class WatchedWorker(tune._Worker):
    """The product's own, watched from its first trial on."""

    def setup(self, config: dict[str, Any]) -> None:
        """As the product's own."""
        watch()
        super().setup(config)


def main() -> None:
    """As `dp-sweeps`."""
    tune._Worker = WatchedWorker
    cli.main()
