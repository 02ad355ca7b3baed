"""TFDS builder of ``digits``: scikit-learn's bundled copy of the UCI optical digits.

The split is a fixed public permutation: the examples are ranked by the SHA-256 digest of
their position in scikit-learn's array, the first 360 of that order are ``test`` and the other
1,437 are ``train``. Which split an example is in depends on its position alone, never on a
pixel, a label or another example, and on no random number generator whose stream may change.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

NUM_EXAMPLES = 1797
NUM_TEST = 360

_DESCRIPTION = """\
Optical recognition of handwritten digits: 1,797 grey images of 8x8 pixels with whole values
from 0 to 16, each the count of inked pixels in a 4x4 block of a scanned 32x32 bitmap, and the
digit that it shows. It is the test set of the UCI collection in the copy that scikit-learn
carries, so preparing it downloads nothing.

`test` has 360 examples and `train` 1,437, a fixed permutation of positions in scikit-learn's
array. Writers are not identified, and the images of one writer fall into both splits: privacy
is per image here, not per writer, and utility is measured on familiar handwriting.
"""

_CITATION = """\
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}
"""


@functools.cache
def split_positions() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The fixed public split.

    Returns:
        Positions in scikit-learn's array of the 1,437 training and the 360 test examples.
    """

    def rank(position: int) -> bytes:
        return hashlib.sha256(f"digits/{position}".encode()).digest()

    order = sorted(range(NUM_EXAMPLES), key=rank)
    return tuple(order[NUM_TEST:]), tuple(order[:NUM_TEST])


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits, 8x8 pixels, ten classes, without a download."""

    name = "digits"
    # TFDS would look this path up through the package importlib_resources, which it uses but does
    # not require on the Python versions supported here.
    code_path = epath.Path(__file__)
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "1,437 training and 360 test examples by a fixed permutation."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # Nothing is downloaded.
        train, test = split_positions()
        return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

    def _generate_examples(self, positions: tuple[int, ...]) -> Iterator[tuple[int, dict]]:
        # Loading scikit-learn takes longer than preparing; a machine that only reads skips it.
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        if digits.images.shape != (NUM_EXAMPLES, 8, 8):
            raise ValueError(f"scikit-learn's digits have shape {digits.images.shape}")
        images = digits.images.astype(np.uint8)[..., None]
        for position in positions:
            yield position, {"image": images[position], "label": int(digits.target[position])}
