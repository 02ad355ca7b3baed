"""Opacus beside the plain gradient of PyTorch, as callables that the benchmark times.

What is timed gives the sum of clipped gradients and no more: no noise, no step. With hooks that
is forward, backward, and `clip_and_accumulate`; with ghost clipping forward and two backwards.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import opacus  # type: ignore[import-not-found]
import torch  # type: ignore[import-not-found]
from opacus.grad_sample import (  # type: ignore[import-not-found]
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import (  # type: ignore[import-not-found]
    DPOptimizer,
    DPOptimizerFastGradientClipping,
)
from opacus.utils.fast_gradient_clipping_utils import (  # type: ignore[import-not-found]
    DPLossFastGradientClipping,
)

from benchmarks.clipping_torch_models import make_twin

VERSIONS = {"torch": torch.__version__, "opacus": opacus.__version__}
CLIP_NORM = 1.0


def make_calls(
    name: str, inputs: np.ndarray, labels: np.ndarray, on_gpu: bool
) -> dict[str, Callable[[], list[Any]]]:
    """For each engine a call that returns its gradients, done and in the model's order.

    Args:
        name: Name of the case.
        inputs: Images ``[batch, height, width, channels]`` or tokens ``[batch, length]``.
        labels: ``[batch]``.
        on_gpu: Whether to compute on the GPU.
    """
    device = torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
    _as_jax_does()
    if inputs.ndim == 4:  # Opacus takes for granted that memory is laid out in this order, too
        inputs = np.moveaxis(inputs, -1, 1)
    x = torch.tensor(np.ascontiguousarray(inputs)).to(device)
    y = torch.tensor(labels).to(device).long()
    x = x if x.is_floating_point() else x.long()

    def ready(work: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        def call() -> list[Any]:
            gradients = work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return gradients

        return call

    makers = {"plain": _plain, "opacus_hooks": _hooks, "opacus_ghost": _ghost}
    return {
        engine: ready(make(make_twin(name).to(device), x, y)) for engine, make in makers.items()
    }


def as_arrays(gradients: list[Any]) -> list[np.ndarray]:
    """Gradients as NumPy arrays."""
    return [gradient.detach().cpu().numpy() for gradient in gradients]


def _as_jax_does() -> None:
    """As many threads, and on GPUs the same precision of float32 products, as JAX takes."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")


def _plain(model: Any, x: Any, y: Any) -> Callable[[], list[Any]]:
    criterion = torch.nn.CrossEntropyLoss()

    def work() -> list[Any]:
        model.zero_grad(set_to_none=True)
        criterion(model(x), y).backward()
        return [parameter.grad for parameter in model.parameters()]

    return work


def _hooks(model: Any, x: Any, y: Any) -> Callable[[], list[Any]]:
    criterion = torch.nn.CrossEntropyLoss()
    module = GradSampleModule(model)
    optimizer = DPOptimizer(_unused_optimizer(module), **_terms(len(y)))

    def work() -> list[Any]:
        optimizer.zero_grad(set_to_none=True)
        criterion(module(x), y).backward()
        optimizer.clip_and_accumulate()
        return [parameter.summed_grad for parameter in model.parameters()]

    return work


def _ghost(model: Any, x: Any, y: Any) -> Callable[[], list[Any]]:
    module = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=CLIP_NORM, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(_unused_optimizer(module), **_terms(len(y)))
    criterion = DPLossFastGradientClipping(module, optimizer, torch.nn.CrossEntropyLoss())

    def work() -> list[Any]:
        optimizer.zero_grad(set_to_none=True)
        criterion(module(x), y).backward()
        return [parameter.grad for parameter in model.parameters()]

    return work


def _unused_optimizer(module: Any) -> Any:
    """Opacus keeps the sums with an optimizer; its steps are never taken."""
    return torch.optim.SGD(module.parameters(), lr=0.0)


def _terms(batch_size: int) -> dict[str, Any]:
    return {
        "noise_multiplier": 0.0,
        "max_grad_norm": CLIP_NORM,
        "expected_batch_size": batch_size,
    }
