"""Whose code may be trained: the list is asked before anything starts, and again in the worker."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sweeps import service
from sweeps.database.attempts import Attempt
from sweeps.errors import SpecError, SweepError
from sweeps.home import Home
from sweeps.user_models import USER_MODELS_VARIABLE, check_model_allowed
from sweeps.worker import TrialRun
from tests.sweeps.cli.spec_files import write

NAME = "our_models.nets:Net"


def check(listed, name=NAME):
    check_model_allowed(name, {USER_MODELS_VARIABLE: listed})


@pytest.mark.parametrize(
    "listed",
    [
        NAME,
        "our_models.nets:*",
        "our_models.*",
        f"other:Net, {NAME}",
        f" {NAME} ,, ",
    ],
)
def test_what_is_listed_passes(listed):
    check(listed)


@pytest.mark.parametrize(
    "listed",
    [
        "our_models.nets:Nets",
        "our_models.nets:Ne",
        "our_models:*",
        "our_model.*",
        "nets.*",
        "our_models.nets.*",
        "our_models.net:*",
    ],
)
def test_what_is_not_listed_is_refused(listed):
    with pytest.raises(SpecError) as refused:
        check(listed)
    assert str(refused.value) == (
        "model.name: 'our_models.nets:Net' is not among the user models that "
        f"DP_SWEEPS_USER_MODELS lists; allowed: {listed}. Whoever runs this installation can add "
        "it there"
    )


def test_an_empty_list_allows_nothing():
    for environment in ({}, {USER_MODELS_VARIABLE: ""}):
        with pytest.raises(SpecError, match="allowed: none, for it is empty"):
            check_model_allowed(NAME, environment)


@pytest.mark.parametrize(
    "entry", ["*", "*:*", "our_models", "our_models*", "a.*:b", "a.*.b", "a:b*"]
)
def test_a_list_that_cannot_be_read_allows_nothing(entry):
    with pytest.raises(
        SweepError, match=r"DP_SWEEPS_USER_MODELS: .* is not allowed; allowed: pack"
    ):
        check(f"{NAME}, {entry}")


def test_models_of_the_trainer_need_no_list():
    check("", "resnet50")


def test_a_specification_is_refused_before_anything_starts(tmp_path, monkeypatch):
    spec = write(tmp_path, {"model.name": NAME})
    home = Home.from_environment()
    for read in (service.make_plan, service.read_spec):
        with pytest.raises(SpecError, match=r"spec\.yaml:\d+:\d+: model\.name: 'our_models"):
            read(spec, home)
    assert not home.path.exists() or not any(home.path.iterdir())
    monkeypatch.setenv(USER_MODELS_VARIABLE, "our_models.*")
    plan = service.make_plan(spec, home)
    assert {proposal.config.model.name for proposal in plan.proposals if proposal.config} == {NAME}
    assert "our_models" not in sys.modules


def test_workers_are_given_the_list(tmp_path, monkeypatch):
    monkeypatch.setenv(USER_MODELS_VARIABLE, "our_models.*")
    given = {}

    def connect(address, env_vars):
        given.update(env_vars)
        raise SweepError("no further")

    monkeypatch.setattr(service, "connect", connect)
    home = Home.from_environment()
    plan = service.make_plan(write(tmp_path, {"model.name": NAME}), home)
    with (
        pytest.raises(SweepError, match="no further"),
        service.cluster_for(plan.spec, home, "local"),
    ):
        pass
    assert given[USER_MODELS_VARIABLE] == "our_models.*"


def test_a_worker_asks_again(monkeypatch):
    config = SimpleNamespace(model=SimpleNamespace(name=NAME))
    reasons = []
    # The database knows no other method: nothing is begun.
    attempts = SimpleNamespace(
        begin=lambda trial_id, worker: Attempt("token", trial_id, 1),
        assignment=lambda trial_id: SimpleNamespace(config=config),
        fail=lambda attempt, reason: reasons.append(reason),
        forget_old_checkpoints=lambda attempt: [],
    )
    store: Any = SimpleNamespace(attempts=attempts)
    with TrialRun(store, Home.from_environment(), "trial") as run:
        assert run.next_report() is None
    assert "is not among the user models" in reasons[0]
    assert "our_models" not in sys.modules


def test_check_says_so_with_exit_code_2(tmp_path, monkeypatch, capsys):
    from sweeps import cli

    spec = write(tmp_path, {"model.name": NAME})
    monkeypatch.setattr("sys.argv", ["dp-sweeps", "check", str(spec)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "is not among the user models" in " ".join(capsys.readouterr().err.split())


def test_the_list_is_not_part_of_a_specification(tmp_path):
    spec = json.dumps({"user_models": [NAME]})
    with pytest.raises(SpecError, match="unknown key"):
        service.make_plan(write(tmp_path, **json.loads(spec)), Home.from_environment())
