"""Each known use by itself: its gradient and its measured norm against `jax.vjp`."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.clipping.comparison import labels, normal, quick
from trainer.clipping.interpreter import record
from trainer.clipping.program import DATA, Info, Kind, View, analyse
from trainer.clipping.uses import CopiedOperand, gram_of_weight

NHWC = ("NHWC", "HWIO", "NHWC")


def conv(strides=(1, 1), padding: Any = "SAME", numbers=NHWC, **options):
    return lambda k, x: jax.lax.conv_general_dilated(
        x, k, strides, padding, dimension_numbers=numbers, **options
    )


def contraction(equation):
    return lambda w, x: jnp.einsum(equation, x, w)


def gather(**options):
    return lambda table, index: jnp.take(table, index, axis=0, **options)


CASES = {
    "matmul": (contraction("td,dh->th"), normal(4, 5), normal(6, 4)),
    "weight_transposed": (contraction("td,hd->th"), normal(5, 4), normal(6, 4)),
    "one_row": (contraction("d,dh->h"), normal(4, 5), normal(4)),
    "heads": (contraction("td,hdk->thk"), normal(2, 4, 3), normal(6, 4)),
    "heads_back": (contraction("thk,hkm->tm"), normal(2, 3, 5), normal(6, 2, 3)),
    "heads_back_other_order": (contraction("tkh,hmk->tm"), normal(2, 5, 3), normal(6, 3, 2)),
    "groups": (contraction("tgd,gdm->tgm"), normal(2, 4, 5), normal(6, 2, 4)),
    "groups_last": (contraction("tdg,mdg->tmg"), normal(5, 4, 2), normal(6, 4, 2)),
    "no_contraction": (contraction("t,d->td"), normal(5), normal(6)),
    "conv": (conv(), normal(3, 3, 2, 4), normal(1, 5, 5, 2)),
    "conv_strided": (conv((2, 1), "VALID"), normal(2, 3, 2, 4), normal(1, 5, 6, 2)),
    "conv_dilated": (
        conv(padding=[(2, 1), (-1, 3)], lhs_dilation=(2, 1), rhs_dilation=(1, 2)),
        normal(2, 2, 2, 4),
        normal(1, 4, 5, 2),
    ),
    "conv_grouped": (conv(feature_group_count=2), normal(3, 3, 2, 4), normal(1, 4, 4, 4)),
    "conv_depthwise": (conv(feature_group_count=4), normal(3, 3, 1, 8), normal(1, 4, 4, 4)),
    "conv_several_images": (conv(), normal(3, 3, 2, 4), normal(3, 4, 4, 2)),
    "conv_channels_first": (
        conv(numbers=("NCHW", "OIHW", "NCHW")),
        normal(4, 2, 3, 3),
        normal(1, 2, 4, 4),
    ),
    "conv_large_patch": (conv(), normal(3, 3, 20, 4), normal(1, 4, 4, 20)),
    "look_up": (gather(), normal(7, 3), labels(5, classes=7)),
    "look_up_of_matrices": (gather(), normal(7, 3, 2), labels(5, 2, classes=7)),
    "look_up_outside": (gather(mode="clip"), normal(4, 3), labels(9, classes=9) - 2),
    "look_up_filled": (
        gather(mode="fill", fill_value=0),
        normal(4, 3),
        labels(9, classes=9),
    ),
    "look_up_of_one": (gather(), normal(7, 3), np.int32(3)),
}


class One:
    """A function of a weight and data in which the two meet once.

    Attributes:
        site: Where.
        axes: For each axis of the operand there its axis in the weight.
        saved: What is kept of the data.
        delta: The cotangent there, for `cotangent` of the function's result.
        want: The gradient with respect to the operand.
    """

    def __init__(self, fn, weight, data):
        self.weight, data = jnp.asarray(weight), jnp.asarray(data)
        param = Info(Kind.PARAM, frozenset({0}), View(("leaf", 0), tuple(range(weight.ndim))))
        block = analyse(jax.make_jaxpr(fn)(self.weight, data), [param, DATA])
        (self.site,) = block.sites
        view: Any = self.site.operand.view
        self.axes = view.axes

        def tapped(tap):
            (out,), saved = record(block, [self.weight, data], {self.site.index: tap})
            return out, saved[self.site.index]

        tap = jnp.zeros(self.site.tap_shape)
        out, transpose, self.saved = jax.vjp(tapped, tap, has_aux=True)
        cotangent = jnp.asarray(normal(*out.shape, seed=1))
        (self.delta,) = transpose(cotangent)
        (grad,) = jax.vjp(lambda w: fn(w, data), self.weight)[1](cotangent)
        self.want = grad.transpose(self.axes)

    def gram(self, saved, delta, kept):
        use = self.site.use.gram(saved, delta, kept, self.axes, self.weight)
        return gram_of_weight([use])


KEPT = list(itertools.product((False, True), repeat=2))
FACTORS = 1 + np.arange(6.0).reshape(2, 3)


def spread(x):
    """Two axes in front, along which numbers are scaled; look-ups save whole numbers."""
    scaled = jnp.multiply.outer(FACTORS, x)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return scaled if floating else jnp.broadcast_to(x, scaled.shape)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradient_and_norm(case):
    fn, *arrays = case

    def program(weight, data):
        """For one example, and with leading axes that are kept or summed over."""
        one = One(fn, weight, data)
        use = one.site.use
        assert not isinstance(use, CopiedOperand)
        inside = tuple(map(spread, one.saved)), jnp.multiply.outer(FACTORS[::-1], one.delta)
        results = []
        for kept in [(), *KEPT]:
            saved, delta = inside if kept else (one.saved, one.delta)
            assert use.cost(saved, delta) > 0
            grad = use.operand_grad(saved, delta, kept)
            twice = jax.tree.map(lambda x: jnp.stack([x, x]), saved), jnp.stack([delta, delta])
            total = use.operand_grad_sum(twice[0], twice[1], kept)
            gram = one.gram(saved, delta, kept)
            assert gram is None or gram.cost > 0
            results.append((grad, total, gram and gram.measure()))
        return one.want, results

    with jax.enable_x64(True):
        want, results = quick(program, *arrays)
    looked_up = np.issubdtype(arrays[1].dtype, np.integer)
    each = np.multiply.outer((1 if looked_up else FACTORS) * FACTORS[::-1], want)
    expected = [want, *(each.sum(tuple(i for i in (0, 1) if not kept[i])) for kept in KEPT)]
    for (grad, total, measured), right in zip(results, expected, strict=True):
        np.testing.assert_allclose(grad, right, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(total, 2 * right, rtol=1e-11, atol=1e-11)
        if measured is not None:
            assert measured.squared_norm == pytest.approx(np.sum(right**2), rel=1e-10)
            assert measured.squared_terms > 0


@pytest.mark.slow
def test_two_uses_of_a_weight_have_cross_terms():
    uses = [
        (contraction("td,dh->th"), normal(3, 4)),
        (contraction("td,hd->th"), normal(5, 4)),
        (gather(), labels(6, classes=4)),
    ]

    def program(weight):
        ones = [One(fn, weight, data) for fn, data in uses]
        grams = [one.site.use.gram(one.saved, one.delta, (), one.axes, one.weight) for one in ones]
        total = sum(one.want.transpose(np.argsort(one.axes)) for one in ones)
        gram: Any = gram_of_weight(grams)
        return gram.measure().squared_norm, jnp.sum(total**2)

    with jax.enable_x64(True):
        squared, want = quick(program, normal(4, 4))
    assert squared == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("fn", "weight", "data"),
    [
        (lambda w, x: jnp.take(w, x, axis=1), normal(4, 7), labels(5, classes=4)),
        (lambda w, x: jax.lax.dynamic_slice(w, (x, 0), (2, 3)), normal(7, 3), np.int32(2)),
        (lambda w, x: jnp.sin(w) * x, normal(4), normal(4)),
    ],
)
def test_other_operands_are_copied(fn, weight, data):
    param = Info(Kind.PARAM, frozenset({0}), View(("leaf", 0), tuple(range(weight.ndim))))
    block = analyse(jax.make_jaxpr(fn)(weight, data), [param, DATA])
    assert [type(site.use) for site in block.sites] == [CopiedOperand]
