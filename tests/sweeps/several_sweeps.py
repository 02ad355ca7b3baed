"""Several specifications as sweeps, one after the other, on one Ray: it takes seconds to start.

    python -m tests.sweeps.several_sweeps SPEC ...

runs them in the home that the environment names, as ``dp-sweeps run`` does in a process of its
own for each. For each it prints a line of JSON: the file, the sweep and what went wrong, if
anything did.
"""

import json
import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

from cluster import LOCAL
from sweeps.admission import prepare_dataset
from sweeps.database.store import open_store
from sweeps.driver import drive, driving
from sweeps.errors import SweepError
from sweeps.home import Home
from sweeps.service import cluster_for, make_plan, record


def _main(paths: list[Path]) -> None:
    home = Home.from_environment()
    home.create()
    store = open_store(home)
    said = sys.stdout
    with ExitStack() as ray, redirect_stdout(sys.stderr):
        has_ray = False
        for path in paths:
            sweep_id, error = "", ""
            try:
                plan = make_plan(path, home)
                prepare_dataset(plan.spec, home.data_dir)
                if not has_ray:
                    ray.enter_context(cluster_for(plan.spec, home, LOCAL))
                    has_ray = True
                sweep_id = record(plan, store)
                with driving(sweep_id, store):
                    drive(sweep_id, store, home)
            except SweepError as refused:
                error = str(refused)
            line = {"file": path.name, "sweep_id": sweep_id, "error": error}
            said.write(json.dumps(line) + "\n")
            said.flush()


if __name__ == "__main__":
    _main([Path(argument) for argument in sys.argv[1:]])
