"""Models by import path: what is called, what is refused, and that they train."""

import sys

import pytest

from trainer.config import ClippingConfig, DataConfig, ModelConfig, TrialConfig
from trainer.errors import ConfigError, ModelError
from trainer.loop import run_trial
from trainer.models import make_model
from trainer.models.user_models import load_user_model

SOURCE = """
import flax.linen as nn

class Linear(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.num_classes, name="head")(images.reshape(len(images), -1))

class BatchNormed(Linear):
    @nn.compact
    def __call__(self, images):
        return Linear(self.num_classes)(nn.BatchNorm(use_running_average=False)(images))

class Listed(Linear):
    sizes: list = ()

def linear(num_classes):
    return Linear(num_classes)

def two(num_classes, width):
    return Linear(num_classes)

def listed(num_classes):
    return Listed(num_classes, sizes=[1])

def text(num_classes):
    return "model"

number = 5
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a user's; gives its folder."""
    folder = tmp_path / "our_models"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    load_user_model.cache_clear()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "our_models"]:
        del sys.modules[name]


def load(attribute, num_classes=3):
    return make_model(ModelConfig(name=f"our_models.{attribute}"), num_classes)


@pytest.mark.parametrize("attribute", ["nets:Linear", "nets:linear"])
def test_a_class_or_a_function_gives_the_model(package, attribute):
    model = load(attribute)
    assert type(model).__name__ == "Linear"
    assert load(attribute) is model  # so that its programs are compiled once
    assert load(attribute, 4) != model


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("missing:Net", "there is no module 'our_models.missing' here; install its package"),
        ("nets:Liner", r"our_models.nets has no attribute Liner \(did you mean Linear\?\)"),
        ("nets:number", "number is 5; allowed is a flax.linen module class, or a function"),
        ("nets:two", r"two\(3\) failed with TypeError: .*'width'; it is called with the number"),
        ("nets:text", r"text\(3\) gave str; allowed is an instance of flax.linen.Module"),
        ("nets:listed", r"listed\(3\) has fields that cannot be hashed.*tuples instead of lists"),
        ("broken:Net", "importing our_models.broken failed with ZeroDivisionError: division"),
        ("needy:Net", "importing our_models.needy failed with ModuleNotFoundError: No module"),
    ],
)
def test_what_cannot_be_loaded_is_said(package, attribute, message):
    (package / "broken.py").write_text("1 / 0\n")
    (package / "needy.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(ModelError, match=rf"model 'our_models\.{attribute}': .*{message}"):
        load(attribute)


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ModelError, match="there is no module 'a_package_that_nobody_has' here"):
        make_model(ModelConfig(name="a_package_that_nobody_has.nets:Net"), 3)


@pytest.mark.parametrize(
    "name",
    [
        "gpt",
        "a.b",
        "a:b:c",
        "a..b:c",
        ".a:b",
        "a:",
        ":b",
        "a:b.c",
        "a b:c",
        "a:b\n",
        "1a:b",
        "a-b:c",
    ],
)
def test_only_names_are_import_paths(name):
    with pytest.raises(
        ConfigError, match=r"model\.name=.*allowed is one of logistic_reg.*:attribute"
    ):
        ModelConfig(name=name)


def test_an_import_path_has_an_end():
    with pytest.raises(ConfigError, match=r"model\.name="):
        ModelConfig(name="a" * 200 + ":b")


def test_nothing_is_imported_to_check_a_name(package):
    (package / "loud.py").write_text("raise SystemExit('imported')\n")
    assert ModelConfig(name="our_models.loud:Net").name == "our_models.loud:Net"


def test_a_user_model_chooses_its_own_type():
    with pytest.raises(ConfigError, match=r"model\.dtype='bfloat16': allowed is float32 with"):
        ModelConfig(name="a:b", dtype="bfloat16")


def trial(attribute):
    return TrialConfig(
        data=DataConfig(name="digits"),
        model=ModelConfig(name=f"our_models.nets:{attribute}"),
        optimizer="sgd",
        learning_rate=2.0,
        l2_clip_norm=1.0,
        noise_multiplier=1.0,
        sampling_prob=0.1,
        expected_batch_size=143.7,
        iterations=60,
        report_every_steps=60,
        target_delta=1e-5,
        accountant="rdp",
        clipping=ClippingConfig(engine="book_keeping"),
    )


@pytest.mark.slow
def test_a_user_model_trains(package, tmp_path):
    result = run_trial(trial("Linear"), data_home=tmp_path / "data")
    assert result.report.outcome == "completed"
    assert (result.report.eval_accuracy or 0) > 0.5


@pytest.mark.slow
def test_a_model_that_mixes_examples_is_refused_before_it_trains(package, tmp_path):
    charged = []
    with pytest.raises(ModelError, match="BatchNorm_0 keeps state"):
        run_trial(
            trial("BatchNormed"),
            data_home=tmp_path / "data",
            charge=lambda branch, step: charged.append(step) or step,
        )
    assert not charged
