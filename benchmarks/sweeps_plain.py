"""The same trials by plain Ray Tune, written as its documentation shows.

    python -m benchmarks.sweeps_plain CONFIG.json FOLDER

A function that trains and reports, a grid, MLflow's callback, and no more: no ledger, no
checkpoints, nothing that could be taken up again. The training is the very same code. Prints the
seconds from `Tuner.fit` to its end.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback


def train(config: dict[str, Any], trial: dict[str, Any], data_home: str) -> None:
    """One trial."""
    from benchmarks.sweeps_watch import watch
    from trainer.config import TrialConfig
    from trainer.loop import run_trial
    from trainer.reporting import TrialReport, releasable

    watch()

    def report(made: TrialReport) -> None:
        tune.report({k: v for k, v in releasable(made).items() if isinstance(v, int | float)})

    run_trial(
        TrialConfig.from_json({**trial, **config}), data_home=Path(data_home), on_report=report
    )


def main(config_path: str, folder: str) -> None:
    """Runs the grid on the two cores that the other sweep has, too."""
    config = json.loads(Path(config_path).read_text())
    uri = f"sqlite:///{folder}/mlflow.db"
    ray.init(num_cpus=config["slots"], include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_parameters(train, trial=config["trial"], data_home=config["data_home"]),
        param_space={"learning_rate": tune.grid_search(config["learning_rates"])},
        run_config=tune.RunConfig(
            name="plain",
            storage_path=folder,
            callbacks=[MLflowLoggerCallback(tracking_uri=uri, experiment_name="plain")],
            verbose=0,
        ),
    )
    begin = time.perf_counter()
    results = tuner.fit()
    took = time.perf_counter() - begin
    if results.num_errors or len(results) != len(config["learning_rates"]):
        raise RuntimeError(f"{results.num_errors} of {len(results)} trials failed")
    sys.stdout.write(json.dumps({"secs": took}) + "\n")
    sys.stdout.flush()
    ray.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main(*sys.argv[1:])
