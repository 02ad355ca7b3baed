"""From pixels to model inputs, each example by itself."""

import numpy as np

from trainer.config import Scaling


def scale(images: np.ndarray, scaling: Scaling) -> np.ndarray:
    """Turns pixels into model inputs, each example by itself.

    *Formal guarantees.* Row i of the result is a function of row i alone, so scaling commutes
    with adding, removing or replacing an example. Under ``unit_norm`` no row is longer than 1,
    up to float32 rounding.

    *Edge cases.* An all-zero image stays zero. A constant image becomes zero under
    ``per_image_standardization``, as the divisor is never below ``1 / sqrt(pixels)``.

    Args:
        images: Finite numbers, shape (examples, height, width, channels).
        scaling: ``unit_norm`` divides an image by its L2 norm; ``per_image_standardization`` is
            TensorFlow's: ``(x - mean) / max(std, 1 / sqrt(pixels))`` over all pixels and
            channels of the image; ``divide_by_255`` divides by 255.

    Returns:
        float32, same shape.
    """
    rows = images.reshape(len(images), -1).astype(np.float64)
    match scaling:
        case "unit_norm":
            norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
            rows /= np.where(norms > 0, norms, 1.0)
        case "per_image_standardization":
            floor = 1.0 / np.sqrt(rows.shape[1])
            stds = rows.std(axis=1, keepdims=True)
            rows = (rows - rows.mean(axis=1, keepdims=True)) / np.maximum(stds, floor)
        case "divide_by_255":
            rows /= 255.0
    return rows.astype(np.float32).reshape(images.shape)
