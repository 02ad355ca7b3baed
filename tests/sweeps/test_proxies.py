"""Trials that stand in for larger ones: what they run, what they cost, and what is shown."""

import pytest
import yaml

import accounting
from sweeps.database.store import open_store
from sweeps.errors import SpecError
from sweeps.forks import new_fork
from sweeps.guarantee import sampling
from sweeps.home import Home
from sweeps.report.table import CheckRow, check_table
from sweeps.service import make_plan, record
from tests.sweeps.report.test_table import printed
from trainer.config import TrialConfig
from trainer.training.plan import mechanism_of

SPEC = {
    "version": 1,
    "name": "small",
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "privacy": {"policy": "per_trial", "target_epsilon": 100.0, "target_delta": 1e-5},
    "search_space": {
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "expected_batch_size": {"grid_search": [96, 192]},
        "iterations": 20,
        "noise_multiplier": 3.0,
        "l2_clip_norm": 1.0,
    },
    "proxy": {"scale": 6},
    "report_every_steps": 5,
}


def plan_of(**sections):
    home = Home.from_environment()
    home.create()
    path = home.path / "spec.yaml"
    path.write_text(yaml.safe_dump({**SPEC, **sections}))
    return make_plan(path, home)


def with_space(**fields):
    return {"search_space": {**SPEC["search_space"], **fields}}


def epsilon_of(config):
    return accounting.epsilon(mechanism_of(config), delta=1e-5)


def test_batch_and_noise_are_scaled_and_what_runs_is_what_is_charged():
    proxies, real = plan_of().proposals, plan_of(proxy={}).proposals
    for proxy, run in zip(proxies, real, strict=True):
        assert proxy.config is not None
        assert run.config is not None
        for name in ("expected_batch_size", "sampling_prob", "noise_multiplier"):
            assert getattr(proxy.config, name) == pytest.approx(getattr(run.config, name) / 6)
            assert proxy.shown[name] == run.shown[name], "configurations are those of the run"
        assert proxy.config.learning_rate == run.config.learning_rate
        assert proxy.shown["proxy_expected_batch_size"] == proxy.config.expected_batch_size
        assert proxy.shown["proxy_noise_multiplier"] == proxy.config.noise_multiplier
        assert proxy.decision.epsilon == epsilon_of(proxy.config) > 3 * run.decision.epsilon
        assert proxy.shown["real_epsilon"] == run.decision.epsilon
        assert "real_epsilon" not in run.shown


def test_calibrated_noise_is_that_of_the_run_itself():
    space = with_space(noise_multiplier="calibrated")
    plan = plan_of(**space, proxy={"scale": 4, "target_epsilon": 2.0})
    privacy = {**SPEC["privacy"], "target_epsilon": 2.0}
    real = plan_of(**space, proxy={}, privacy=privacy)
    for proxy, run in zip(plan.proposals, real.proposals, strict=True):
        assert run.config is not None
        assert proxy.shown["noise_multiplier"] == run.config.noise_multiplier
        assert proxy.shown["real_epsilon"] == run.decision.epsilon <= 2.0
        assert proxy.decision.admitted
        assert proxy.decision.epsilon > 2.0


def test_a_proxy_that_is_too_dear_is_refused_however_cheap_the_run_would_be():
    plan = plan_of(privacy={**SPEC["privacy"], "target_epsilon": 2.0})
    assert all(proposal.shown["real_epsilon"] < 2.0 for proposal in plan.proposals)
    assert not plan.admitted


def test_check_shows_the_epsilon_of_the_run_rounded_up_beside_that_of_the_proxy():
    plan = plan_of()
    listed = [
        CheckRow(
            config=proposal.shown,
            epsilon=proposal.decision.epsilon,
            decision="admitted",
            reason="",
        )
        for proposal in plan.admitted
    ]
    text = printed(check_table(listed, guarantee=plan.guarantee), width=140)
    assert "real run" in text
    assert "Trials are proxies, with batches and noise 6 times smaller" in " ".join(text.split())
    rows = [line.split() for line in text.splitlines() if line.endswith("admitted")]
    for proposal, row in zip(plan.proposals, rows[-2:], strict=True):
        costs = [float(row[1]), float(row[-2])]
        exact = [proposal.decision.epsilon, proposal.shown["real_epsilon"]]
        for shown, epsilon in zip(costs, exact, strict=True):
            assert epsilon <= shown <= epsilon * 1.001


def test_a_proxy_of_a_run_that_takes_everybody_draws_all_the_same():
    plan = plan_of(**with_space(expected_batch_size=1437))
    (proposal,) = plan.proposals
    assert proposal.shown["sampling_prob"] == 1
    assert sampling(plan.spec.model_dump(mode="json"), 1.0) == "poisson"
    assert sampling(plan.spec.real.model_dump(mode="json"), 1.0) == "full_batch"


def test_a_fork_of_a_proxy_is_a_proxy():
    home = Home.from_environment()
    plan = plan_of()
    store = open_store(home)
    sweep_id = record(plan, store)
    parent = store.trials(sweep_id)[0]
    fork = new_fork(store, home, parent.trial_id, {"noise_multiplier": 4.5})
    before = TrialConfig.from_json(parent.trial_config)
    assert fork.trial_config.noise_multiplier == pytest.approx(4.5 / 6)
    assert fork.trial_config.expected_batch_size == pytest.approx(before.expected_batch_size)
    assert fork.config["noise_multiplier"] == 4.5
    assert fork.config["expected_batch_size"] == pytest.approx(96.0)
    assert fork.config["proxy_noise_multiplier"] == pytest.approx(4.5 / 6)


@pytest.mark.parametrize(
    ("sections", "where", "message"),
    [
        ({"proxy": {"scale": 0.5}}, "proxy.scale", "0.5 is not allowed; allowed: a number >= 1"),
        (
            {"proxy": {"scale": 6, "target_epsilon": 3}},
            "proxy.target_epsilon",
            "3 is not allowed without calibrated noise and a scale; allowed: null",
        ),
        (
            with_space(noise_multiplier="calibrated"),
            "proxy.target_epsilon",
            "is missing; allowed: a number > 0. calibrated noise is that of the run",
        ),
        (
            with_space(expected_batch_size="full"),
            "search_space.expected_batch_size",
            "full is not allowed with proxies, 6 times smaller; allowed: a number",
        ),
        (
            with_space(expected_batch_size=5),
            "search_space.expected_batch_size",
            "5 is not allowed with proxies, 6 times smaller; allowed: at least 6",
        ),
        (
            {"mechanism": {"bands": 2}},
            "mechanism.bands",
            "2 is not allowed with proxies of plain DP-SGD; allowed: 1",
        ),
        (
            {"mechanism": {"truncated_batch_size": 500}},
            "mechanism.truncated_batch_size",
            "500 is not allowed with proxies of plain DP-SGD; allowed: null",
        ),
        (
            {"clipping": {"mode": "quantile"}},
            "clipping.mode",
            "quantile is not allowed with proxies, for its count has noise of its own; allowed",
        ),
    ],
)
def test_what_proxies_cannot_stand_in_for_is_refused(sections, where, message):
    with pytest.raises(SpecError) as caught:
        plan_of(**sections)
    assert f"{where}: {message}" in str(caught.value)
