"""What a prepared data set is made of, read off its metadata: features, splits, identity.

Nothing here reads an example.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.dataset_location import Location
from trainer.errors import DatasetError

# A run of examples in one file: file, first, one past the last.
Slice = tuple[str, int, int]


def fingerprint(location: Location, tfds_info: Any, image_key: str, label_key: str) -> str:
    """The digest that `trainer.data.datasets.DatasetInfo` describes."""
    image, label = tfds_info.features[image_key], tfds_info.features[label_key]
    identity = {
        "name": location.name,
        "version": location.version,
        "image": [image_key, image.shape, np.dtype(image.np_dtype).name],
        "label": [label_key, label.num_classes],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def image_and_label(name: str, tfds_info: Any) -> tuple[str, str]:
    """Keys of the image and the label: the supervised pair, else the only ones of their kind.

    Raises:
        DatasetError: There is not one of each.
    """
    from tensorflow_datasets import features as tfds_features

    features: dict[str, Any] = {}
    if isinstance(tfds_info.features, tfds_features.FeaturesDict):
        features = dict(tfds_info.features.items())
    supervised: Any = tfds_info.supervised_keys
    if supervised and len(supervised) == 2 and all(isinstance(key, str) for key in supervised):
        features = {key: features[key] for key in supervised}
    labels = [
        key
        for key, kind in features.items()
        if type(kind) is tfds_features.ClassLabel and kind.num_classes
    ]
    images = [
        key
        for key, kind in features.items()
        if len(kind.shape or ()) in (2, 3)
        # Exactly these: text, labels and boxes are kinds of Tensor too.
        and (type(kind), kind.np_dtype)
        in (
            (tfds_features.Image, np.uint8),
            (tfds_features.Tensor, np.uint8),
            (tfds_features.Tensor, np.float32),
        )
    ]
    if len(labels) != 1 or len(images) != 1:
        raise DatasetError(
            f"data set {name!r} has {len(images)} usable image features and {len(labels)} class "
            f"labels among {sorted(features)}; allowed is one of each: an Image of uint8 or a "
            "Tensor of uint8 or float32 with two or three dimensions, and a ClassLabel. Where "
            "there are several, the data set's supervised_keys choose"
        )
    return images[0], labels[0]


def checked_slices(
    name: str, tfds_info: Any, field: str, expression: str, *, show_sizes: bool
) -> list[Slice]:
    """The examples of a split expression as TFDS will read them.

    Args:
        name: The data set.
        tfds_info: Its metadata.
        field: The field of `trainer.config.DataConfig` that holds the expression.
        expression: The expression.
        show_sizes: Whether an error may say how large the splits are.

    Raises:
        DatasetError: It is none, or selects no example, or one more than once.
    """
    sizes = ", ".join(
        f"{key} ({split.num_examples})" if show_sizes else key
        for key, split in tfds_info.splits.items()
    )
    try:
        runs = tfds_info.splits[expression].file_instructions
    except Exception as error:  # TFDS raises six types here, by the kind of mistake.
        raise DatasetError(
            f"data set {name!r}: {field}={expression!r} cannot be read as a split. It has the "
            f"splits {sizes}; a part is written such as 'train[:80%]' or 'train[100:200]'",
            field=field,
        ) from error
    if not runs or any(run.take < 1 for run in runs):
        raise DatasetError(
            f"data set {name!r}: {field}={expression!r} selects no example. It has the splits "
            f"{sizes}",
            field=field,
        )
    slices = [(str(run.filename), run.skip, run.skip + run.take) for run in runs]
    if overlap(slices):
        # In training it would count for more than one clipped gradient.
        raise DatasetError(
            f"data set {name!r}: {field}={expression!r} takes an example more than once. Use "
            "ranges that do not overlap",
            field=field,
        )
    return slices


def overlap(slices: Sequence[Slice]) -> bool:
    """Whether an example is in more than one run."""
    # If any two overlap, so do two neighbours in this order.
    ordered = sorted(slices)
    return any(
        file == next_file and next_start < stop
        for (file, _, stop), (next_file, next_start, _) in itertools.pairwise(ordered)
    )


def check_user_feature(name: str, tfds_info: Any, key: str) -> None:
    """Checks that a feature can name whose an example is.

    Raises:
        DatasetError: There is none of that name, or it is neither text nor one whole number.
    """
    from tensorflow_datasets import features as tfds_features

    features: dict[str, Any] = {}
    if isinstance(tfds_info.features, tfds_features.FeaturesDict):
        features = dict(tfds_info.features.items())
    kind: Any = features.get(key)
    whole = (
        isinstance(features.get(key), tfds_features.Tensor)
        and kind.shape == ()
        and np.dtype(kind.np_dtype).kind in "iu"
        # In bytes it would be a text of another machine's byte order.
        and kind.to_json_content().encoding == "none"
    )
    if not whole and type(kind) is not tfds_features.Text:
        raise DatasetError(
            f"data set {name!r}: user_feature={key!r} names no feature that says whose an example "
            f"is; allowed is a Text or a whole number among {sorted(features)}",
            field="user_feature",
        )
