"""What of a model is trained: all of it, its head, its biases, or low-rank updates.

A model's parameters are split into those that training changes and those that stay. Only the
former have per-example gradients, so only they are clipped and get noise: the fewer they are, the
less noise there is in all (Yu et al. 2022). What stays must be public: it is no output of the
mechanism. The head is what a model keeps under the top-level name ``head``, its last layer.

Low-rank updates (LoRA, Hu et al. 2022) are two leaves beside the kernel of a layer, ``lora_a``
and ``lora_b``. The layer adds ``(x A) B`` to its output, so that both meet data in products of
their own: that is what `trainer.clipping` measures gradients by. A kernel ``W + A B`` would be
the same function, with gradients of the kernel's size to form for each example.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict

from trainer.config import TrainableName
from trainer.errors import ConfigError
from trainer.models import init_params

HEAD = "head"
LORA_A, LORA_B = "lora_a", "lora_b"

# Keeps the draws of the low-rank updates apart from those of the model.
_LORA_STREAM = 0x10BA

Path = tuple[str, ...]


class Parameters(NamedTuple):
    """A network's parameters, two nested dictionaries that share no leaf.

    Attributes:
        trainable: What training changes.
        frozen: The rest; empty where all is trained.
    """

    trainable: Any
    frozen: Any


@dataclasses.dataclass(frozen=True)
class Network:
    """A model and what of it is trained; hashable, and compared by value.

    Attributes:
        model: From `trainer.models.make_model`, or any Flax module that maps a batch to logits.
        trainable: ``all``; ``head``; ``biases``: every leaf that is named ``bias``, those of
            normalisations included, and the head (BitFit, Ben Zaken et al. 2022; for DP-SGD Bu
            et al. 2022); or ``lora``: the head and a low-rank update of every other
            ``nn.Dense``. Other layers have none, ``nn.DenseGeneral`` and convolutions neither.
        lora_rank: Rank of each update, >= 1.
        head_init_scale: What the kernel of a fresh head is multiplied with, >= 0. Zero starts
            at equal logits for all classes, as De et al. 2022 and Mehta et al. 2022 fine-tune.
    """

    model: nn.Module
    trainable: TrainableName = "all"
    lora_rank: int = 8
    head_init_scale: float = 1.0

    def fresh(
        self,
        image_shape: tuple[int, ...],
        seed: int,
        *,
        input_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> Any:
        """The model's own parameters, freshly drawn; arguments as in `init_params`.

        Raises:
            ConfigError: If the head is to be scaled and the model has none.
        """
        params = init_params(self.model, image_shape, seed, input_dtype=input_dtype)
        if self.head_init_scale == 1:
            return params
        self._check_head("head_init_scale", self.head_init_scale, "1", params)
        scaled = {
            path: leaf * self.head_init_scale if _in_head(path) and path[-1] == "kernel" else leaf
            for path, leaf in _leaves(params).items()
        }
        return unflatten_dict(scaled)

    def init(
        self,
        image_shape: tuple[int, ...],
        seed: int,
        *,
        initial: Mapping[str, Any] | None = None,
        input_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> Parameters:
        """The parameters to begin with.

        Low-rank updates begin at zero: A is normal with variance 1 / inputs, B is zero, so the
        network computes what the model does.

        Args:
            image_shape: Shape of one example.
            seed: Seed of all that is drawn.
            initial: All of the model's own parameters, float32; None draws them (`fresh`).
            input_dtype: Type of the examples.

        Raises:
            ConfigError: If the model has no head though one is asked for, or with ``lora`` no
                other ``nn.Dense``.
        """
        params: Any = initial
        if initial is None:
            params = self.fresh(image_shape, seed, input_dtype=input_dtype)
        if self.trainable != "all":
            self._check_head("trainable", self.trainable, "all", params)
        if self.trainable != "lora":
            return self.split(params)
        inputs = jax.ShapeDtypeStruct((1, *image_shape), input_dtype)
        layers = [path for path in dense_layers(self.model, inputs) if not _in_head(path)]
        if not layers:
            raise ConfigError(
                f"model.trainable='lora': {type(self.model).__name__} has no dense layer besides "
                "its head to update; allowed is all, head or biases"
            )
        leaves = _leaves(params)
        key = jax.random.fold_in(jax.random.key(seed), _LORA_STREAM)
        for layer, layer_key in zip(layers, jax.random.split(key, len(layers)), strict=True):
            *stack, inputs_of_layer, outputs = leaves[(*layer, "kernel")].shape
            shape = (*stack, inputs_of_layer, self.lora_rank)
            draw = jax.random.normal(layer_key, shape, jnp.float32)
            leaves[(*layer, LORA_A)] = draw / jnp.sqrt(jnp.float32(inputs_of_layer))
            leaves[(*layer, LORA_B)] = jnp.zeros((*stack, self.lora_rank, outputs), jnp.float32)
        return self.split(unflatten_dict(leaves))

    def split(self, joined: Mapping[str, Any]) -> Parameters:
        """Separates what is trained from what stays; the inverse of `joined`."""
        if self.trainable == "all":
            return Parameters(joined, {})
        parts: tuple[dict[Path, Any], dict[Path, Any]] = ({}, {})
        for path, leaf in _leaves(joined).items():
            parts[not self._trains(path)][path] = leaf
        return Parameters(*map(unflatten_dict, parts))

    def joined(self, trainable: Any, frozen: Any) -> Any:
        """One nested dictionary of both: the model's parameters, and the low-rank updates."""
        return unflatten_dict(_leaves(trainable) | _leaves(frozen))

    def merged(self, trainable: Any, frozen: Any) -> Any:
        """The model's own parameters, low-rank updates added to their kernels.

        ``model.apply({"params": merged}, images)`` gives `logits` up to rounding.
        """
        return unflatten_dict(_with_updates_added(_leaves(trainable) | _leaves(frozen)))

    def logits(self, trainable: Any, frozen: Any, images: jax.Array) -> jax.Array:
        """Logits ``[batch, classes]`` of inputs ``[batch, *image_shape]``."""
        params = self.joined(trainable, frozen)
        if self.trainable != "lora":
            return self._apply(params, images)
        with nn.intercept_methods(_add_update):
            return self._apply(params, images)

    def _apply(self, params: Any, images: jax.Array) -> Any:
        return self.model.apply({"params": params}, images)

    def _trains(self, path: Path) -> bool:
        if _in_head(path):
            return True
        names = {"head": (), "biases": ("bias",), "lora": (LORA_A, LORA_B)}
        return path[-1] in names[self.trainable]

    def _check_head(self, field: str, value: Any, allowed: str, params: Mapping[str, Any]) -> None:
        if HEAD not in params:
            raise ConfigError(
                f"model.{field}={value!r}: {type(self.model).__name__} has no layer that is "
                f"named {HEAD}; allowed is {allowed}"
            )


def dense_layers(model: nn.Module, inputs: jax.ShapeDtypeStruct) -> list[Path]:
    """Paths of all ``nn.Dense`` that a model calls, sorted."""
    found: set[Path] = set()

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if _is_dense_call(context):
            found.add(context.module.path)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        # A function of its own: JAX would not trace `model.init` again, and nothing be noted.
        jax.eval_shape(lambda key, x: model.init(key, x), jax.random.key(0), inputs)
    return sorted(found)


def _with_updates_added(leaves: Mapping[Path, Any]) -> dict[Path, Any]:
    """Leaves by path without low-rank updates, which are added to the kernels beside them."""
    merged = {path: leaf for path, leaf in leaves.items() if path[-1] not in (LORA_A, LORA_B)}
    for path, factor in leaves.items():
        if path[-1] == LORA_A:
            kernel, second = (*path[:-1], "kernel"), (*path[:-1], LORA_B)
            # Not in place, for the kernel may be a NumPy array of the caller's.
            merged[kernel] = merged[kernel] + factor @ leaves[second]
    return merged


def _leaves(tree: Any) -> dict[Path, Any]:
    return cast("dict[Path, Any]", flatten_dict(tree))


def _in_head(path: Path) -> bool:
    return path[:1] == (HEAD,)


def _add_update(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Adds ``(x A) B`` to the output of a dense layer that has these two leaves.

    Hu et al. 2022 scale the product by alpha / rank and find that, with Adam, tuning alpha is
    roughly tuning the learning rate. That is searched anyway, so here alpha is the rank.
    """
    outputs = call(*args, **kwargs)
    layer = context.module
    if not _is_dense_call(context) or not layer.has_variable("params", LORA_A):
        return outputs
    inputs = args[0] if args else kwargs["inputs"]
    factors = (layer.get_variable("params", name) for name in (LORA_A, LORA_B))
    inputs, a, b = promote_dtype(inputs, *factors, dtype=layer.dtype)
    multiply = lambda x, y: jnp.matmul(x, y, precision=layer.precision)
    return outputs + multiply(multiply(inputs, a), b)


def _is_dense_call(context: nn.module.InterceptorContext) -> bool:
    return isinstance(context.module, nn.Dense) and context.method_name == "__call__"
