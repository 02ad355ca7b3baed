"""The specification: what is taken, and what it is then."""

import subprocess
import sys
from typing import get_args

import jsonschema
import pydantic
import pytest

from sweeps.errors import Problem, SpecError
from sweeps.spec.domains import Domain
from sweeps.spec.reading import load_spec, parse_spec, validate_spec
from sweeps.spec.scheduler_spec import AsyncHyperBandSpec, FifoSpec
from sweeps.spec.sweep_spec import json_schema
from sweeps.spec.yaml_source import parse_yaml
from tests.sweeps.spec.spec_text import DIGITS, GOOD, GOOD_DATA, ROOT, good, refusal
from trainer.config import ModelName


def test_a_good_spec_is_read():
    spec = parse_spec(GOOD)
    assert spec.privacy.target_epsilon == 8.0
    assert spec.privacy.target_delta == 1e-5
    assert spec.privacy.accountant == "pld"
    assert spec.model.hidden_sizes == (64, 32)
    assert spec.scheduler == AsyncHyperBandSpec(
        name="async_hyperband", grace_period=25, reduction_factor=3
    )
    assert spec.search_space.learning_rate == Domain("grid_search", (0.1, 1.0, 8.0))
    assert spec.search_space.iterations == Domain("constant", (150,))
    assert spec.search_space.expected_batch_size == Domain("choice", (64.0, 256.0))
    assert spec.num_listed == 2 * 3 * 2


def test_what_may_be_left_out():
    text = GOOD[: GOOD.index("search: {")]
    spec = parse_spec(text)
    assert spec.scheduler == FifoSpec(name="fifo")
    assert (spec.search.num_samples, spec.search.seed, spec.seed) == (1, 0, 0)
    assert spec.report_every_steps == 25
    assert spec.resources.max_concurrent_trials == 1
    assert (spec.data.train_split, spec.data.eval_split) == ("train", "test")


@pytest.mark.parametrize(
    ("field", "text", "domain"),
    [
        ("learning_rate", "{uniform: [0.1, 8]}", Domain("uniform", (0.1, 8.0))),
        ("learning_rate", "{loguniform: [1e-5, 1]}", Domain("loguniform", (1e-5, 1.0))),
        ("learning_rate", "{quniform: [0.1, 1, 0.1]}", Domain("quniform", (0.1, 1.0, 0.1))),
        ("learning_rate", "{choice: [1, 1, 2]}", Domain("choice", (1.0, 1.0, 2.0))),
        ("expected_batch_size", "{lograndint: [16, 512]}", Domain("lograndint", (16, 512))),
        ("iterations", "{randint: [50, 200]}", Domain("randint", (50, 200))),
        ("iterations", "{grid_search: [50, 100]}", Domain("grid_search", (50, 100))),
        ("noise_multiplier", "calibrated", Domain("constant", ("calibrated",))),
        (
            "noise_multiplier",
            "{grid_search: [calibrated, 2]}",
            Domain("grid_search", ("calibrated", 2.0)),
        ),
        ("optimizer", "lamb", Domain("constant", ("lamb",))),
    ],
)
def test_domains(field, text, domain):
    lines = [
        f"  {field}: {text}" if line.startswith(f"  {field}:") else line
        for line in GOOD.splitlines()
    ]
    spec = parse_spec("\n".join(lines))
    assert getattr(spec.search_space, field) == domain
    assert parse_spec(spec.canonical_json()) == spec


@pytest.mark.parametrize(
    ("train", "held_out", "disjoint"),
    [
        ("train", "test", True),
        ("train", "train", False),
        ("train", "train[:10%]", False),
        ("train[:80%]", "train[80%:]", True),
        ("train[:80%]", "train[79%:]", False),
        ("train[:-20%]", "train[80%:]", True),
        ("train[-0%:]", "train[80%:]", False),
        ("train[10%:20%]", "train[:10%]", True),
        ("train[1000:]", "train[:1000]", True),
        ("train[:1001]", "train[1000:]", False),
        ("train[:-500]", "train[-500:]", True),
        ("train[:-500]", "train[-501:]", False),
        ("train[:500]", "train[-500:]", False),
        ("train[:100]", "train[50%:]", False),
        ("train[:]", "train[50%:]", False),
        ("train+validation", "test", True),
        ("train + validation", "validation", False),
        ("train", "validation+train[:5]", False),
        ("all", "test", False),
        ("train", "all", False),
    ],
)
def test_metrics_are_never_shown_of_training_examples(train, held_out, disjoint):
    text = good("{name: digits}", f"{{name: d, train_split: '{train}', eval_split: '{held_out}'}}")
    if disjoint:
        assert parse_spec(text).data.eval_split == held_out
    else:
        assert f": data.eval_split: '{held_out}' may share examples" in refusal(text)


def test_add_or_remove_one_with_a_declared_size():
    text = good("{name: digits}", "{name: digits, declared_num_examples: 1400}")
    spec = parse_spec(text.replace("zero_out", "add_or_remove_one"))
    assert spec.data.declared_num_examples == 1400


def test_what_is_found_later_is_placed_in_the_document_that_was_kept():
    document = parse_yaml(GOOD, source="x.yaml")
    assert validate_spec(document) == parse_spec(GOOD)
    later = SpecError([Problem(message="is too large", key_path="privacy.target_epsilon")])
    assert str(document.placed(later)) == "x.yaml:9:19: privacy.target_epsilon: is too large"


def test_a_spec_is_frozen():
    spec = parse_spec(GOOD)
    with pytest.raises(pydantic.ValidationError):
        spec.seed = 1


def test_hash_ignores_layout_and_sees_every_value():
    spec = parse_spec(GOOD)
    assert len(spec.spec_hash()) == 64
    assert parse_spec("# comment\n" + good("8.0", "8")).spec_hash() == spec.spec_hash()
    assert parse_spec(good("[0.1, 1, 8]", "[1e-1, 1.0, 8.0]")).spec_hash() == spec.spec_hash()
    spelled_out = good("  target_delta", "  accountant: pld\n  target_delta")
    assert parse_spec(spelled_out).spec_hash() == spec.spec_hash()
    for text in (good("8.0", "8.1"), good("seed: 3", "seed: 4"), good("[64, 32]", "[32, 64]")):
        assert parse_spec(text).spec_hash() != spec.spec_hash()


def test_hash_is_the_same_in_another_process():
    code = (
        f"from sweeps.spec.reading import load_spec; print(load_spec({str(DIGITS)!r}).spec_hash())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == load_spec(DIGITS).spec_hash()


def test_reading_a_spec_imports_no_heavy_library():
    code = (
        "import sys; import sweeps.search_space, sweeps.spec.reading; "
        "print([m for m in ('jax', 'ray', 'mlflow', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(DIGITS.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_allowed(path):
    assert load_spec(path).name == path.stem.replace("_", "-")


def test_the_example_is_allowed():
    spec = load_spec(DIGITS)
    assert spec.name == "digits"
    domain = spec.search_space.expected_batch_size
    assert isinstance(domain, Domain)
    assert domain.kind == "grid_search"


@pytest.mark.parametrize("name", get_args(ModelName))
def test_every_model_can_be_named(name):
    spec = parse_spec(good("name: mlp", f"name: {name}"))
    assert spec.model.name == name
    data = {**GOOD_DATA, "model": {"name": name}}
    assert not list(jsonschema.Draft202012Validator(json_schema()).iter_errors(data))


@pytest.mark.parametrize(
    ("name", "ok"),
    [
        ("our_models.nets:Net", True),
        ("nets:make_net", True),
        ("our_models.nets", False),
        ("our_models..nets:Net", False),
        ("our_models.nets:Net.inner", False),
        ("mlp:", False),
        ("mlp2", False),
        ("../nets:Net", False),
        ("nets:Net()", False),
    ],
)
def test_a_model_of_ones_own_is_named_by_its_import_path(name, ok):
    data = {**GOOD_DATA, "model": {"name": name}}
    schema = jsonschema.Draft202012Validator(json_schema())
    assert schema.is_valid(data) == ok
    text = good("name: mlp", f"name: {name!r}")
    if ok:
        assert parse_spec(text).model.name == name
    else:
        assert "or package.module:attribute for a model of your own" in refusal(text)


def test_the_type_that_models_compute_in():
    assert parse_spec(GOOD).model.dtype == "float32"
    assert parse_spec(good("name: mlp", "name: mlp\n  dtype: bfloat16")).model.dtype == "bfloat16"
    told = refusal(good("name: mlp", "name: mlp\n  dtype: float16"))
    assert told.startswith("x.yaml:6:10: model.dtype: 'float16' is not allowed; allowed: one of ")
    told = refusal(good("name: mlp", "name: nets:Net\n  dtype: bfloat16"))
    assert told == (
        "x.yaml:6:10: model.dtype: bfloat16 is not allowed with nets:Net, which chooses itself; "
        "allowed: float32"
    )
