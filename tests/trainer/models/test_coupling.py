"""What mixes examples is found, whatever it hides behind; what does not is let through."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from trainer.errors import ModelError
from trainer.models import check_examples_are_apart

SHAPE = (4, 4, 1)
CLASSES = 3


class Planted(nn.Module):
    """A sound network of two layers, with something between them."""

    def between(self, hidden: jax.Array) -> jax.Array:
        return hidden

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = nn.tanh(nn.Dense(5)(images.reshape(images.shape[0], -1)))
        return nn.Dense(CLASSES, name="head")(self.between(hidden))


class Training(Planted):
    def between(self, hidden):
        return nn.BatchNorm(use_running_average=False, name="norm")(hidden)


class Evaluating(Planted):
    def between(self, hidden):
        return nn.BatchNorm(use_running_average=True)(hidden)


class Centred(Planted):
    def between(self, hidden):
        return hidden - jnp.mean(hidden, axis=0)


class HardlyCentred(Planted):
    def between(self, hidden):
        return hidden - 1e-12 * jnp.mean(hidden, axis=0)


class BehindAZero(Planted):
    """A path that first parameters close."""

    def between(self, hidden):
        gain = self.param("gain", nn.initializers.zeros, ())
        return hidden + gain * jnp.sum(hidden, axis=0)


class Attending(Planted):
    def between(self, hidden):
        return jax.nn.softmax(hidden @ hidden.T) @ hidden


class BatchSoftmax(Planted):
    def between(self, hidden):
        return jax.nn.softmax(hidden, axis=0)


class Neighbours(Planted):
    def between(self, hidden):
        return hidden.at[1:].add(hidden[:-1])


class GradientAlone(Planted):
    """Logits do not move, gradients do."""

    def between(self, hidden):
        mean = jnp.mean(hidden, axis=0)
        return hidden + mean - jax.lax.stop_gradient(mean)


class SizeOfTheBatch(Planted):
    def between(self, hidden):
        return hidden / len(hidden)


class PlaceInTheBatch(Planted):
    def between(self, hidden):
        return hidden * (1 + jnp.arange(len(hidden)))[:, None]


class Counter(Planted):
    def between(self, hidden):
        count = self.variable("counts", "seen", jnp.zeros, ())
        if not self.is_initializing():
            count.value += len(hidden)
        return hidden


class LateCounter(Planted):
    def between(self, hidden):
        if not self.is_initializing():
            self.variable("counts", "seen", jnp.zeros, ())
        return hidden


class Dropping(Planted):
    def between(self, hidden):
        return nn.Dropout(0.5, deterministic=False)(hidden)


class Printing(Planted):
    def between(self, hidden):
        jax.debug.print("{}", hidden)
        return hidden


class Narrow(Planted):
    def between(self, hidden):
        return hidden.astype(jnp.bfloat16)


class BrokenForImages(Planted):
    def between(self, hidden):
        return hidden @ jnp.ones((3, 3))


class NotFinite(Planted):
    def between(self, hidden):
        return hidden / 0


class OneNumber(Planted):
    @nn.compact
    def __call__(self, images):
        return jnp.sum(nn.Dense(CLASSES)(images), axis=(0, 1, 2))


class NarrowLogits(Planted):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(CLASSES, dtype=jnp.bfloat16)(images.reshape(len(images), -1))


class NarrowParameters(Planted):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(CLASSES, param_dtype=jnp.bfloat16)(images.reshape(len(images), -1))


class NoParameters(Planted):
    @nn.compact
    def __call__(self, images):
        return images.reshape(len(images), -1)[:, :CLASSES]


NORMS = r"nn.GroupNorm.*nn.LayerNorm"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Training, rf"model Training: norm keeps state .*'batch_stats'; use {NORMS}"),
        (Evaluating, rf"BatchNorm_0 keeps state .*'batch_stats'; use {NORMS}"),
        (Centred, rf"the logits of example 1 moves? by \S+ of its size when example 0.*{NORMS}"),
        (HardlyCentred, "become NaN where example 0 does"),
        (BehindAZero, "the logits of example 1"),
        (Attending, "the logits of example 1"),
        (BatchSoftmax, "the logits of example 1"),
        (Neighbours, "the logits of example 1"),
        (GradientAlone, "the gradient of example 3 moves by .* when example 0 changes"),
        (SizeOfTheBatch, "the logits of example 0 .* when it is the only one"),
        (PlaceInTheBatch, "the logits of example 0 .* when the batch is permuted"),
        (Counter, "the model keeps state that is no parameter, in the collection 'counts'"),
        (LateCounter, "in the collection 'counts'; compute it anew from each example"),
        (Dropping, r"asks for random numbers.*\"dropout\".*deterministic=True"),
        (Printing, "has side effects"),
        (BrokenForImages, r"cannot be initialised for images float32\[1, 4, 4, 1\]: TypeError"),
        (NotFinite, "are not finite"),
        (OneNumber, r"to float32\[3\]; allowed are logits float32\[4, 3\]"),
        (NarrowLogits, r"to bfloat16\[4, 3\]; allowed are logits float32\[4, 3\]"),
        (
            NarrowParameters,
            r"the parameter \['Dense_0'\]\['bias'\] is bfloat16; allowed is float32",
        ),
        (NoParameters, "has no parameters"),
    ],
)
def test_a_planted_fault_is_found(model, message):
    with pytest.raises(ModelError, match=message):
        check_examples_are_apart(model(), SHAPE, CLASSES)


@pytest.mark.parametrize("model", [Planted, Narrow])
def test_a_sound_model_passes(model):
    check_examples_are_apart(model(), SHAPE, CLASSES)


def test_normalising_within_an_example_passes():
    class Normalised(Planted):
        def between(self, hidden):
            self.sow("intermediates", "hidden", hidden)
            return nn.GroupNorm(num_groups=5)(nn.LayerNorm()(hidden))

    check_examples_are_apart(Normalised(), SHAPE, CLASSES)


def test_an_answer_is_kept(monkeypatch):
    check_examples_are_apart(Planted(), SHAPE, CLASSES)
    monkeypatch.setattr(Planted, "apply", None)
    check_examples_are_apart(Planted(), SHAPE, CLASSES)
