"""Make a loaded model fast: layers fused by role, weights in the layout that this device's kernels read."""

from __future__ import annotations

import ctypes
import sys
from typing import TypeVar

import torch
from torch import nn

from quantkit.runtime.cache import quantizers
from quantkit.runtime.fusion import fuse
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.residual import add_in_products

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, *, fresh_prompts: bool = False) -> Model:
    """Fuse and repack a model whose quantized linears are `QuantLinear`s, in place; once is enough.

    q, k and v become one product, gate and up another; gated MLPs and RMS norms quantize on the way,
    and on a GPU products add what follows them.
    Names and outputs stay; a layer that is built otherwise stays as it is. `quantkit.load` does this.

    Args:
        fresh_prompts: see `quantkit.load`.

    Returns:
        the model.
    """
    fuse(model)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare()
    for quantizer in quantizers(model):
        quantizer.fresh_prompts = fresh_prompts
    add_in_products(model)
    _read_whole_rows(model)
    _give_back_memory()
    return model


def _read_whole_rows(model: nn.Module) -> None:
    """Give an unquantized output layer rows of their own.

    After a prompt it reads the last token alone, a slice of the hidden states; for its strides torch copies
    the whole vocabulary's weight on a CPU: seconds at each prompt.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if type(head) is nn.Linear and not head._forward_pre_hooks:
        head.register_forward_pre_hook(_own_rows)


def _own_rows(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden = inputs[0]
    if hidden.dim() == 3 and hidden.shape[1] == 1:
        # Not `contiguous`, which leaves one row of a slice as it is.
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    return (hidden, *inputs[1:])


def _give_back_memory() -> None:
    """Return what repacking freed to the system: glibc keeps blocks of up to 32 MB for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
