"""Population based training exploits and explores as Ray Tune's own scheduler, over any crash."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.schedulers import pbt as rays

from sweeps.database.states import TrialState
from sweeps.database.store import Store, open_store
from sweeps.errors import CommandError
from sweeps.home import HOME_VARIABLE, Home
from sweeps.schedule import Schedule
from sweeps.search import pbt
from sweeps.search_space import value_at
from sweeps.service import make_plan, record
from sweeps.spec.domains import Domain
from sweeps.spec.stop_spec import StopSpec
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.trial_queue import TrialQueue
from tests.sweeps.database.small_sweep import PLAN, go_to, row_of
from tests.sweeps.fork_parents import SPEC
from tests.sweeps.search.virtual_sweep import EVERY, REPORTS, VirtualSweep, rung_table
from trainer.errors import ConfigError

FRACTIONS = st.floats(0.01, 0.5)
UTILITIES = st.integers(0, 5).map(float) | st.just(float("nan"))
MUTATIONS = {
    "learning_rate": Domain("loguniform", (0.01, 10.0)),
    "l2_clip_norm": Domain("choice", (0.5, 1.0, 2.0)),
}


class Rays:
    """Ray's own scheduler, asked what it makes of a population."""

    def __init__(self, quantile_fraction: float = 0.25, resample_probability: float = 0.25):
        self.rule: Any = PopulationBasedTraining(
            metric="m",
            mode="max",
            quantile_fraction=quantile_fraction,
            resample_probability=resample_probability,
            hyperparam_mutations={"learning_rate": [1.0]},
        )

    def quantiles(self, scores: list[tuple[int, float]]) -> tuple[list[int], list[int]]:
        """Numbers in the lower and in the upper quantile."""
        self.rule._trial_state = {
            _Trial(number): SimpleNamespace(last_score=score) for number, score in scores
        }
        lower, upper = self.rule._quantiles()
        return [trial.number for trial in lower], [trial.number for trial in upper]


class _Trial:
    def __init__(self, number: int) -> None:
        self.number = number

    def is_finished(self) -> bool:
        return False


def explored_by_ray(
    config: dict[str, Any],
    mutations: dict[str, Domain],
    probability: float,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """What Ray's rule makes of a configuration, with chance from the same place."""
    theirs = {
        name: [*domain.values]
        if domain.kind == "choice"
        else lambda domain=domain: value_at(domain, rng.random())
        for name, domain in mutations.items()
    }
    with monkeypatch.context() as patched:
        patched.setattr(rays, "random", rng)
        factors: Any = pbt.PERTURBATION_FACTORS
        found, _ = rays._explore(dict(config), theirs, probability, factors, None)
    return {name: found[name] for name in mutations}


# -- the rules -------------------------------------------------------------------------------


@given(st.lists(UTILITIES, max_size=20), FRACTIONS)
def test_the_quantiles_are_rays(utilities: list[float], fraction: float) -> None:
    ours = pbt.quantiles(utilities, fraction)
    assert ours == Rays(fraction).quantiles([*enumerate(utilities)])
    assert not {*ours[0]} & {*ours[1]}


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("norm", [0.5, 1.0, 2.0, 1.5])
def test_a_variant_is_rays(
    probability: float, norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"learning_rate": 0.5, "l2_clip_norm": norm}
    seen: set[float] = set()
    for seed in range(40):
        ours = pbt.explore(config, MUTATIONS, probability, random.Random(seed))
        assert ours == explored_by_ray(
            config, MUTATIONS, probability, random.Random(seed), monkeypatch
        )
        seen.add(float(ours["learning_rate"]))
    factors = {0.5 * factor for factor in pbt.PERTURBATION_FACTORS}
    assert factors <= seen if probability < 1 else not factors & seen
    assert seen == factors or probability > 0


def test_a_whole_number_stays_one() -> None:
    domain = Domain("randint", (1, 10))
    found = {
        pbt.explore({"x": value}, {"x": domain}, 0.0, random.Random(seed))["x"]
        for value in (1, 7)
        for seed in range(20)
    }
    assert found == {1, 6, 8}


# -- whole sweeps ----------------------------------------------------------------------------


class PopulationSweep(VirtualSweep):
    """Trials that can be forked, on a budget that refuses what has too little noise."""

    def create(self, store: Store) -> None:
        space = {
            **SPEC["search_space"],
            "learning_rate": {"loguniform": [0.1, 10.0]},
            "iterations": PLAN,
        }
        text = {
            **SPEC,
            "search_space": space,
            "search": {"num_samples": 6, "seed": 5},
            "privacy": {**SPEC["privacy"], "target_epsilon": 3.0},
            "report_every_steps": EVERY,
            "scheduler": self.scheduler,
        }
        path = self.home.path / "spec.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(text))
        self.sweep_id = record(make_plan(path, self.home), store)

    def spec(self, store: Store) -> SweepSpec:
        return SweepSpec.model_validate(store.sweep(self.sweep_id).spec)


SCHEDULER = {
    "name": "pbt",
    "perturbation_interval": 20,
    "quantile_fraction": 0.34,
    "hyperparam_mutations": {
        "learning_rate": {"loguniform": [0.1, 10.0]},
        "noise_multiplier": {"choice": [0.4, 2.0]},
    },
}


def a_virtual_sweep(folder: Path, seed: int, **more: Any) -> PopulationSweep:
    """Six trials to begin with, and curves for whatever takes their place."""
    rng = random.Random(seed)
    return PopulationSweep(
        home=Home.from_environment({HOME_VARIABLE: str(folder)}),
        scheduler=SCHEDULER,
        curves=[[rng.random() for _ in range(REPORTS)] for _ in range(40)],
        paces=[rng.randrange(1, 6) for _ in range(40)],
        workers=4,
        **more,
    )


def lineage(store: Store, sweep_id: str) -> list[tuple[Any, ...]]:
    """Of every trial: where it comes from, with what, and what became of it."""
    rows = store.trials(sweep_id)
    numbers = {row.trial_id: row.number for row in rows}
    return [
        (
            row.number,
            numbers.get(row.parent_trial_id),
            row.parent_step,
            row.config["learning_rate"],
            row.config["noise_multiplier"],
            row.state,
            row.charged_iterations,
        )
        for row in rows
    ]


def test_a_population_is_rays_whatever_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = a_virtual_sweep(tmp_path / "calm", 3)
    calm.run()
    store = open_store(calm.home)
    ours = lineage(store, calm.sweep_id)
    rows = {row.number: row for row in store.trials(calm.sweep_id)}

    # The same by Ray's rules, each place of the population in turn.
    configs = {number: rows[number].config for number in range(6)}
    begun = dict.fromkeys(range(6), 0)
    alive, newest = [*range(6)], 5
    ended: dict[int, str] = {}
    expected_parents: dict[int, int] = {}
    mutations = calm.spec(store).scheduler
    domains = mutations.hyperparam_mutations.given()  # pyright: ignore
    for rung in range(20, PLAN, 20):
        scores = [(number, calm.curves[number][rung // EVERY - 1]) for number in alive]
        lower, upper = Rays(0.34).quantiles(scores)
        assert len(lower) == 3
        for number in lower:
            newest += 1
            rng = random.Random(f"5/{number}/{rung}")
            parent = rng.choice(upper)
            expected_parents[newest] = parent
            changes = explored_by_ray(configs[parent], domains, 0.25, rng, monkeypatch)
            configs[newest] = {**configs[parent], **changes}
            begun[newest] = rung
            if rows[newest].state == TrialState.REJECTED:
                ended[newest] = "REJECTED"
                continue
            ended[number] = "PRUNED"
            assert rows[number].charged_iterations == rung - begun[number]
            assert (
                f"trial {newest} took its place, a fork of trial {parent}" in rows[number].reason
            )
            alive[alive.index(number)] = newest
        alive.sort()
    assert [each[1] for each in ours[6:]] == [*expected_parents.values()]
    assert [each[2] or 0 for each in ours] == [*begun.values()]
    assert [each[3] for each in ours] == [configs[n]["learning_rate"] for n in configs]
    assert [each[4] for each in ours] == [configs[n]["noise_multiplier"] for n in configs]
    assert [each[5] for each in ours] == [ended.get(n, "COMPLETED") for n in configs]
    refused = [row for row in rows.values() if row.state == TrialState.REJECTED]
    assert refused
    assert all(row.config["noise_multiplier"] == 0.4 for row in refused)
    assert all("epsilon" in row.reason for row in refused)
    assert any(row.parent_trial_id in {f.trial_id for f in rows.values() if f.parent_step}
               for row in rows.values()), "a fork of a fork"  # fmt: skip

    # Its driver dies again and again, with one report that it has not seen.
    rough = a_virtual_sweep(tmp_path / "rough", 3)
    rough.run(crash_at=range(2, 1000, 3))
    again = open_store(rough.home)
    assert lineage(again, rough.sweep_id) == ours
    assert sorted(rung_table(again)) == sorted(rung_table(store))
    for each in (store, again):
        assert each.ledger.verify().ok
        each.ledger.close()


# -- where nothing can be forked -------------------------------------------------------------


def gathered(tmp_path: Path, *, with_checkpoints: bool) -> tuple[PopulationSweep, Store, str]:
    """A population that waits at its first perturbation, and the id of its worst trial."""
    sweep = a_virtual_sweep(tmp_path, 3)
    store = open_store(sweep.home)
    sweep.create(store)
    schedule = Schedule(sweep.spec(store), store, sweep.home)
    ids = [row.trial_id for row in store.trials(sweep.sweep_id)]
    for place, trial_id in enumerate(ids):
        attempt = store.attempts.begin(trial_id)
        go_to(store, attempt, 20, accuracy=place / 8)
        if with_checkpoints:
            store.attempts.checkpoint(attempt, 20, "/somewhere")
        assert schedule.promotable(sweep.sweep_id) is None
        assert schedule.decide(trial_id)
        assert store.rungs.set_aside(trial_id)
    assert schedule.promotable(sweep.sweep_id) == ids[0]
    return sweep, store, ids[0]


def test_without_a_checkpoint_of_the_best_the_worst_goes_on(tmp_path: Path) -> None:
    sweep, store, worst = gathered(tmp_path, with_checkpoints=False)
    schedule = Schedule(sweep.spec(store), store, sweep.home)
    assert schedule.promote(sweep.sweep_id) == worst
    assert row_of(store, worst).reason == ""
    assert len(store.trials(sweep.sweep_id)) == 6
    store.ledger.close()


def test_a_variant_that_could_never_run_is_refused_and_the_worst_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise CommandError("--set: no") from ConfigError("too little noise for the count")

    sweep, store, worst = gathered(tmp_path, with_checkpoints=True)
    monkeypatch.setattr("sweeps.population.new_fork", never)
    schedule = Schedule(sweep.spec(store), store, sweep.home)
    assert schedule.promote(sweep.sweep_id) == worst
    refused = store.trials(sweep.sweep_id)[-1]
    assert (refused.number, refused.state) == (6, "REJECTED")
    assert refused.reason == "too little noise for the count"
    assert refused.planned_epsilon is None
    assert refused.planned_iterations == PLAN - 20
    assert refused.config["iterations"] == PLAN
    store.ledger.close()


def test_no_other_takes_a_place_once_a_rule_holds(tmp_path: Path) -> None:
    sweep, store, _ = gathered(tmp_path, with_checkpoints=True)
    spec = sweep.spec(store).model_copy(update={"stop": StopSpec(utility=0.5)})
    queue = TrialQueue(
        spec,
        sweep.sweep_id,
        store,
        waiting=store.runnable(sweep.sweep_id),
        schedule=Schedule(spec, store, sweep.home),
        proposals=None,
        limit=10,
    )
    assert queue.take() is None
    assert queue.is_over()
    assert len(store.trials(sweep.sweep_id)) == 6
    store.ledger.close()
