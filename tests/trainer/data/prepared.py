"""Small data sets as their own builders would write them, for tests that read."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

RNG = np.random.default_rng(7)
IMAGES = RNG.integers(0, 256, (30, 4, 5, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3
FEATURES = {
    "picture": tfds.features.Tensor(shape=(4, 5, 3), dtype=np.uint8),
    "kind": tfds.features.ClassLabel(num_classes=3),
}


def examples(images: Any = IMAGES, labels: Any = LABELS, **more: Any) -> list[dict[str, Any]]:
    """Examples by feature, of images, labels and further columns."""
    return [
        {"picture": image, "kind": label, **{key: column[i] for key, column in more.items()}}
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def prepare(
    data_dir: Path,
    *,
    features: Mapping[str, Any] = FEATURES,
    splits: Mapping[str, list[dict]] | None = None,
    file_format: str = "array_record",
    name: str = "shapes",
    version: str = "1.0.0",
    config: str | None = None,
    supervised_keys: tuple[str, str] | None = None,
) -> Path:
    """Writes a data set as its own builder would; none of that code is there when it is read."""
    written = splits or {"train": examples()[:24], "test": examples()[24:]}

    class Generic(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        # TFDS would look for these in a package folder of the builder's own.
        code_path = epath.Path(__file__)
        pkg_dir_path = epath.Path(__file__).parent

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(dict(features)),
                supervised_keys=supervised_keys,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(rows) for split, rows in written.items()}

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    Generic.name = name
    builder = Generic(data_dir=data_dir, file_format=file_format)
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return Path(builder.data_dir)


def encoded(image: np.ndarray, file_format: str = "png") -> bytes:
    """An image as a file of its own."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
        buffer, format=file_format
    )
    return buffer.getvalue()
