"""Results of sweeps that never ran, for the tests of the picture."""

import dataclasses
from typing import Any

from hypothesis import strategies as st

from sweeps.database.states import SweepState, TrialState
from sweeps.report.results import CurvePoint, SweepResults, TrialSummary

SCRIPT = "<script>alert(1)</script>"
BUDGET = 8.0


def trial(
    number: int,
    state: TrialState = TrialState.COMPLETED,
    points: tuple[tuple[float | None, float | None], ...] = ((2.0, 0.5), (4.0, 0.8)),
    **changes: Any,
) -> TrialSummary:
    """A trial whose k-th report stands at step 10 k with (epsilon, accuracy)."""
    if state is TrialState.REJECTED:
        points = ()
    summary = TrialSummary(
        trial_id=f"t{number}",
        number=number,
        state=state,
        reason="",
        config={
            "optimizer": "adam",
            "learning_rate": 0.5,
            "expected_batch_size": 64.0,
            "iterations": 100,
            "noise_multiplier": 1.25,
            "l2_clip_norm": 1.0,
        },
        planned_iterations=100,
        planned_epsilon=12.0 if state is TrialState.REJECTED else 7.5,
        charged_iterations=10 * len(points),
        curve=tuple(
            CurvePoint(10 * k, 10 * k, epsilon, accuracy, 0.1)
            for k, (epsilon, accuracy) in enumerate(points, start=1)
        ),
        mlflow_run_id=None,
    )
    return dataclasses.replace(summary, **changes)


def sweep(*trials: TrialSummary, **changes: Any) -> SweepResults:
    """A completed sweep of these trials."""
    results = SweepResults(
        sweep_id="s",
        name="digits",
        state=SweepState.COMPLETED,
        spec={
            "privacy": {
                "policy": "per_trial",
                "target_epsilon": BUDGET,
                "target_delta": 1e-5,
                "accountant": "pld",
                "neighboring_relation": "zero_out",
            }
        },
        spec_hash="0",
        dataset="digits:1.0.0",
        created_at=0.0,
        ended_at=1.0,
        mlflow_run_id=None,
        trials=trials,
    )
    return dataclasses.replace(results, **changes)


def batch(size: float, optimizer: str = "adam") -> dict[str, Any]:
    """A trial's configuration with another batch size and optimizer."""
    return trial(0).config | {"expected_batch_size": size, "optimizer": optimizer}


def many(count: int) -> SweepResults:
    """A sweep of trials with everything that they can differ in; every fourth is rejected."""
    optimizers = ("sgd", "momentum", "adam", "adamw", "nesterov", "lamb")
    states = (TrialState.COMPLETED, TrialState.PRUNED, TrialState.DIVERGED, TrialState.REJECTED)
    return sweep(
        *(
            trial(
                number,
                states[number % 4],
                ((1 + number / count, 0.3), (3 + number / count, 0.6 + 0.3 * number / count)),
                config=batch(32.0 + number, optimizers[number % 6]),
            )
            for number in range(count)
        )
    )


CASES = {
    "one": sweep(trial(0)),
    "twelve": many(12),
    "three hundred": many(300),
    "none yet": sweep(trial(0, TrialState.ADMITTED, ()), state=SweepState.RUNNING),
    "running": sweep(trial(0, TrialState.RUNNING), state=SweepState.RUNNING),
    "all rejected": sweep(
        trial(0, TrialState.REJECTED),
        trial(1, TrialState.REJECTED, planned_epsilon=900.0),
        trial(2, TrialState.REJECTED, planned_epsilon=None),
    ),
    "no epsilon": sweep(trial(0, points=((None, 0.5), (None, 0.8)), planned_epsilon=None)),
    "some epsilons": sweep(trial(0, points=((1.0, 0.5), (None, 0.8))), trial(1)),
    "diverged at once": sweep(trial(0, TrialState.DIVERGED, ((1.0, None),))),
    "tiny epsilons": sweep(trial(0, points=((1e-6, 0.1), (0.5, 0.2), (7.0, 0.9)))),
    "zero epsilon": sweep(trial(0, points=((0.0, 0.1), (0.01, 0.2), (7.0, 0.9)))),
    "the best is free": sweep(
        trial(0, points=((0.01, 0.2), (7.0, 0.3))), trial(1, points=((0.0, 0.9),))
    ),
    "one accuracy": sweep(trial(0, points=((1.0, 0.5), (2.0, 0.5)))),
    "no trials": sweep(),
}

# Epsilon and accuracy of a trial's reports.
curves = st.lists(
    st.tuples(
        st.none() | st.floats(0, 20, allow_nan=False),
        st.none() | st.floats(0, 1, allow_nan=False),
    ),
    max_size=6,
)
