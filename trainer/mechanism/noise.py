"""Gaussian noise on a sum: independent in every step, or correlated over several.

jax-privacy's privatizers draw it and correlate it. They are given a key for each step
(`trainer.mechanism.keys`), where they would by themselves derive one step's from the last's, so a
step's noise depends on the branch and the step's number and on nothing that a checkpoint would
have to hold. What correlated noise remembers of earlier steps is as secret as the keys: whoever
subtracts it has gradients without noise. It too is in no checkpoint, and `replay` makes it anew.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy import noise_addition
from jax_privacy.matrix_factorization import streaming_matrix, toeplitz

KEY_IMPL = "threefry2x32"

# What is folded into a step's key for its count, so that it is not the key of the gradients.
_COUNT = 2**32 - 1


def _noising_matrix(strategy: tuple[float, ...]) -> Any:
    if not strategy:
        return streaming_matrix.identity()
    return toeplitz.inverse_as_streaming_matrix(jnp.asarray(strategy, jnp.float32))


def start_noise(strategy: tuple[float, ...], like: Any) -> Any:
    """What noise remembers before the first step.

    Args:
        strategy: Coefficients from `trainer.mechanism.noise_strategy`; none for independent noise.
        like: A pytree of arrays in the form of the sums.
    """
    return _noising_matrix(strategy).init_multiply(like)


def add_noise(
    sums: Any,
    memory: Any,
    *,
    key_data: jax.typing.ArrayLike,
    stddev: float | jax.Array,
    strategy: tuple[float, ...] = (),
) -> tuple[Any, Any]:
    """Adds one step's noise.

    Args:
        sums: A pytree of float arrays.
        memory: From `start_noise`, or from the step before. Secret.
        key_data: uint32 ``[2]``, secret and used once.
        stddev: Standard deviation of independent noise on every coordinate, >= 0; may be traced.
            Callers set it to noise_multiplier x sensitivity. Correlated noise is that of
            ``C^-1 Z`` with Z of this deviation.
        strategy: As in `start_noise`.

    Returns:
        The noisy sums, each leaf with noise of its own, and the memory for the next step.
    """
    key = jax.random.wrap_key_data(jnp.asarray(key_data), impl=KEY_IMPL)
    privatizer = noise_addition.matrix_factorization_privatizer(
        _noising_matrix(strategy),
        stddev=stddev,  # type: ignore[arg-type]  # it is only multiplied with
        prng_key=key,
    )
    noisy, state = privatizer.update(sums, (key, memory))
    return noisy, state[1]  # type: ignore[index]  # the next key, which is not used, and memory


def replay(
    strategy: tuple[float, ...], like: Any, key_data: np.ndarray, stddev: float | jax.Array
) -> Any:
    """What noise remembers after some steps, from their keys.

    Args:
        strategy: As in `start_noise`.
        like: A pytree of arrays in the form of the sums.
        key_data: uint32 ``[steps, 2]``, the keys of all steps since the first.
        stddev: As in `add_noise`, the same in each of them.
    """
    count = len(key_data)
    if not strategy or not count:
        return start_noise(strategy, like)
    # Few lengths, so few programs.
    keys = np.zeros((1 << (count - 1).bit_length(), 2), np.uint32)
    keys[:count] = key_data
    return _make_replay(strategy)(like, keys, np.int32(count), jnp.float32(stddev))


@functools.lru_cache(maxsize=64)
def _make_replay(strategy: tuple[float, ...]) -> Any:
    @jax.jit
    def program(like: Any, keys: jax.Array, count: jax.Array, stddev: jax.Array) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, like)

        def step(i: jax.Array, memory: Any) -> Any:
            return add_noise(zeros, memory, key_data=keys[i], stddev=stddev, strategy=strategy)[1]

        return jax.lax.fori_loop(0, count, step, start_noise(strategy, like))

    return program


def count_noise(key_data: jax.typing.ArrayLike, stddev: float | jax.Array) -> jax.Array:
    """Gaussian noise for one count, independent of the noise that the same key gives a tree.

    Args:
        key_data: As in `add_noise`; the same step's.
        stddev: Standard deviation, >= 0; may be traced.

    Returns:
        A float32 scalar.
    """
    key = jax.random.wrap_key_data(jnp.asarray(key_data), impl=KEY_IMPL)
    return jnp.float32(stddev) * jax.random.normal(jax.random.fold_in(key, _COUNT))
