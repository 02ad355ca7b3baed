"""Draws the examples of a synthetic data set.

Idea: each class is a Gaussian blob of one colour somewhere in the image, under noise that is the
same for all. How bright it is makes classes about as hard to tell apart in any shape, and most
of them easy for a linear model.
"""

from typing import NamedTuple

import numpy as np

from trainer.data.synthetic.request import Synthetic

# Noise is uniform over so many values from 0 on: its standard deviation, and the most that a blob
# may add without leaving uint8.
_NOISE_VALUES = 128
_NOISE_STDDEV = _NOISE_VALUES / np.sqrt(12)
_MAX_CONTRAST = 127.0
# Distance between two classes in standard deviations of the noise, by the square root of two.
_SEPARATION = 8.0
# Steps by which the R2 sequence fills a square evenly, however many points it has.
_SPREAD = np.array([0.7548776662466927, 0.5698402909980532])
# Of a blob, in image sides.
_RADIUS = 0.15


class Batch(NamedTuple):
    """Some examples.

    Attributes:
        images: uint8 ``[examples, height, width, channels]``.
        labels: Classes from 0.
        owners: Whose each is, or None for each.
    """

    images: np.ndarray
    labels: list[int]
    owners: list[int] | list[None]


class Drawing:
    """What is the same for all examples of a request."""

    def __init__(self, request: Synthetic) -> None:
        self.request = request
        self._blobs = _blobs(request)

    def draw(self, split: str, start: int, stop: int, rng: np.random.Generator) -> Batch:
        """Draws the examples from ``start`` to before ``stop`` of a split."""
        request, count = self.request, stop - start
        labels = rng.integers(0, request.num_classes, count)
        images = rng.integers(0, _NOISE_VALUES, (count, *request.shape), np.uint8)
        images += self._blobs[labels]
        owners = _owners(request, split, start, stop, rng)
        return Batch(images, labels.tolist(), owners)


def _blobs(request: Synthetic) -> np.ndarray:
    """What each class adds to the noise, uint8 ``[classes, height, width, channels]``."""
    rng = np.random.default_rng([request.seed, 2])
    height, width, channels = request.shape
    y = (np.arange(height)[:, None, None] + 0.5) / height
    x = (np.arange(width)[:, None] + 0.5) / width
    blobs = np.empty((request.num_classes, *request.shape), np.uint8)
    shift = rng.uniform(size=2)
    # One at a time: in float64 all of them take eight times the memory.
    for number, blob in enumerate(blobs):
        row, column = 0.2 + 0.6 * ((shift + number * _SPREAD) % 1)
        colour = rng.uniform(0.2, 1.0, channels)
        shape = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * _RADIUS**2)) * colour
        wanted = _SEPARATION * _NOISE_STDDEV / np.linalg.norm(shape)
        blob[...] = np.rint(min(wanted, _MAX_CONTRAST / shape.max()) * shape)
    return blobs


def _owners(
    request: Synthetic, split: str, start: int, stop: int, rng: np.random.Generator
) -> list[int] | list[None]:
    """Whose the examples are: of a split's first ones, everybody has one; the rest are drawn."""
    if request.num_users is None:
        return [None] * (stop - start)
    first, count = 0, request.num_users
    if split == "test":
        first, count = request.num_users, max(1, min(request.num_users // 5, request.num_test))
    places = np.arange(start, stop)
    drawn = rng.integers(0, count, stop - start)
    return (first + np.where(places < count, places, drawn)).tolist()
