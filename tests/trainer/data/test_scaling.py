"""Scaling: its formulas, its edge cases, and that it reads one example at a time."""

import numpy as np
import pytest

from trainer.data.scaling import scale

IMAGES = np.random.default_rng(7).integers(0, 256, (30, 4, 5, 3), dtype=np.uint8)


def test_unit_norm():
    scaled = scale(IMAGES, "unit_norm")
    norms = np.linalg.norm(scaled.reshape(30, -1).astype(np.float64), axis=1)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-6)  # float32 rounding of 60 pixels
    expected = IMAGES[3] / np.sqrt((IMAGES[3].astype(float) ** 2).sum())
    np.testing.assert_allclose(scaled[3], expected, rtol=1e-6)


def test_unit_norm_of_huge_and_tiny_images():
    images = np.stack([np.full((2, 2, 1), value, np.float32) for value in (1e38, 1e-38, 1e-45)])
    np.testing.assert_allclose(scale(images, "unit_norm"), 0.5, rtol=1e-6)


def test_per_image_standardization():
    scaled = scale(IMAGES, "per_image_standardization").astype(np.float64)
    np.testing.assert_allclose(scaled.mean(axis=(1, 2, 3)), 0.0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(axis=(1, 2, 3)), 1.0, atol=1e-6)


def test_per_image_standardization_of_a_nearly_constant_image():
    image = np.zeros((1, 4, 4, 1), np.float32)
    image[0, 0, 0, 0] = 0.16  # mean 0.01, std 0.0387 < 1 / sqrt(16)
    scaled = scale(image, "per_image_standardization")
    np.testing.assert_allclose(scaled[0, 0, 0, 0], (0.16 - 0.01) * 4, rtol=1e-6)
    np.testing.assert_allclose(scaled[0, 1, 1, 0], -0.01 * 4, rtol=1e-6)


def test_divide_by_255():
    np.testing.assert_array_equal(
        scale(IMAGES, "divide_by_255"), (IMAGES / 255.0).astype(np.float32)
    )


@pytest.mark.parametrize("scaling", ["unit_norm", "per_image_standardization", "divide_by_255"])
def test_zero_images_stay_zero_and_examples_do_not_meet(scaling):
    images = np.concatenate([IMAGES[:3], np.zeros_like(IMAGES[:1])])
    together = scale(images, scaling)
    assert together.dtype == np.float32
    assert not together[3].any()
    alone = np.concatenate([scale(image[None], scaling) for image in images])
    assert np.array_equal(together, alone)
