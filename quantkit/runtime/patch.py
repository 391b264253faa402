"""Make a loaded model fast: layers fused by role, weights in the layout that this device's kernels read."""

from __future__ import annotations

import ctypes
import sys
from typing import TypeVar

from torch import nn

from quantkit.runtime.fusion import fuse
from quantkit.runtime.linear import QuantLinear

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model) -> Model:
    """Fuse and repack a model whose quantized linears are `QuantLinear`s, in place; once is enough.

    q, k and v become one product, gate and up another; gated MLPs and RMS norms quantize on the way.
    Names and outputs stay; a layer that is built otherwise stays as it is. `quantkit.load` does this.

    Returns:
        the model.
    """
    fuse(model)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare()
    _give_back_memory()
    return model


def _give_back_memory() -> None:
    """Return what repacking freed to the system: glibc keeps blocks of up to 32 MB for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
