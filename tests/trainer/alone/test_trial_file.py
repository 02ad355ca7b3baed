"""Names and types of a file: what is refused, and whether a person can mend it."""

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.alone.trial_files import TRIAL, write
from trainer.alone.trial_file import read_trial_file
from trainer.config import TrialConfig
from trainer.errors import ConfigError

REQUIRED = [
    field.name
    for field in dataclasses.fields(TrialConfig)
    if field.default is field.default_factory is dataclasses.MISSING
    and field.name != "sampling_prob"
]


def refusal(tmp_path, changes):
    path = write(tmp_path, changes)
    with pytest.raises(ConfigError) as refused:
        read_trial_file(path)
    assert str(path) in str(refused.value)
    return str(refused.value)


def test_what_is_said_is_kept(tmp_path):
    changes = {
        "target_epsilon": 3,
        "seed": 7,
        "model": {"name": "mlp", "hidden_sizes": [3, 4]},
        "averaging.ema_decay": None,
    }
    file = read_trial_file(write(tmp_path, changes))
    assert file.target_epsilon == 3
    assert file.fields["seed"] == 7
    assert file.fields["model"] == {"name": "mlp", "hidden_sizes": (3, 4)}
    assert file.fields["averaging"] == {"ema_decay": None}
    assert "sampling_prob" not in file.fields


@pytest.mark.parametrize("field", REQUIRED)
def test_what_is_missing_is_named_with_what_is_allowed(tmp_path, field):
    assert f"{field}: is missing; allowed is" in refusal(tmp_path, {field: ...})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("learning_rat", 1, "unknown field (did you mean learning_rate?); allowed: data, model"),
        ("model.hidden_size", [1], "did you mean model.hidden_sizes?"),
        ("bands", 2, "did you mean mechanism.bands?"),
        ("model.iterations", 2, "did you mean iterations?"),
        ("target_epsilom", 2, "did you mean target_epsilon?"),
        ("zzzzzz", 2, "unknown field; allowed"),
        ("learning_rate", "fast", "learning_rate='fast': allowed is a number"),
        ("learning_rate", "0.5", "(write it without quotes)"),
        ("learning_rate", True, "learning_rate=True: allowed is a number"),
        ("learning_rate", None, "learning_rate=None: allowed is a number"),
        ("iterations", 1.5, "iterations=1.5: allowed is a whole number"),
        ("iterations", [3], "iterations=[3]: allowed is a whole number"),
        ("optimizer", "sdg", "optimizer='sdg': allowed is one of sgd, momentum"),
        ("noise_multiplier", "calibrate", "allowed is a number or the word calibrated"),
        ("noise_multiplier", "full", "allowed is a number or the word calibrated"),
        ("expected_batch_size", "all", "allowed is a number or the word full"),
        ("target_epsilon", "low", "target_epsilon='low': allowed is a number"),
        ("model", "mlp", "model='mlp': allowed is a section with name, hidden_sizes"),
        ("mechanism", None, "mechanism=None: allowed is a section with bands"),
        ("model.hidden_sizes", 64, "allowed is a list of whole numbers"),
        ("model.hidden_sizes", [1.5], "allowed is a list of whole numbers"),
        ("augmentation.flip", "yes", "augmentation.flip='yes': allowed is true or false"),
        ("averaging.ema_decay", "x", "averaging.ema_decay='x': allowed is a number, or null"),
        ("data.name", 3, "data.name=3: allowed is text"),
        ("data.name", ..., "data.name: is missing; allowed is text"),
    ],
)
def test_refusals_name_field_value_and_what_is_allowed(tmp_path, field, value, words):
    assert words in refusal(tmp_path, {field: value})


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "seed: &x 1\nmodel:\n  name: mlp\n  name: cnn\n",
            [
                ":1: seed: anchor &x is not allowed; write each value itself",
                ":4: model.name: is given twice, first in line 3",
            ],
        ),
        ("- seed\n", [":1: the top level is a list; allowed: a mapping of keys to values"]),
        ("seed: \x00\n", [": is not YAML: unacceptable character #x0000: "]),
        ("", [":1: is empty; allowed: a mapping of keys to values"]),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_place(tmp_path, text, messages):
    path = tmp_path / "trial.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_trial_file(path)
    for line, message in zip(str(refused.value).splitlines(), messages, strict=True):
        assert line.startswith(f"{path}{message}")


def test_all_problems_are_found_at_once_in_the_order_of_the_file(tmp_path):
    path = write(tmp_path, {"seed": "x", "iterations": "x", "data.nam": 1})
    lines = path.read_text().splitlines()
    with pytest.raises(ConfigError) as refused:
        read_trial_file(path)
    found = str(refused.value).splitlines()
    expected = [
        f"{path}:{number}:"
        for number, line in enumerate(lines, 1)
        if line.strip().startswith(("seed", "iterations", "nam:"))
    ]
    assert [line.split(" ")[0] for line in found] == expected


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**6)
    | st.floats()
    | st.text("abc 1e-", max_size=5)
    | st.lists(st.integers(0, 3), max_size=2)
    | st.dictionaries(st.sampled_from(["name", "bands", "x"]), st.integers(0, 3), max_size=2)
)
FIELDS = sorted({*TRIAL, "seed", "mechanism", "averaging", "clipping", "target_epsilon", "spare"})


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_whatever_is_written_is_read_in_its_type_or_refused(tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("trial") / "trial.yaml"
    path.write_text(yaml.safe_dump({**TRIAL, **changes}))
    try:
        file = read_trial_file(path)
    except ConfigError:
        return
    for name in ("learning_rate", "l2_clip_norm", "target_delta"):
        assert type(file.fields[name]) is float
    for name in ("iterations", "report_every_steps"):
        assert type(file.fields[name]) is int
