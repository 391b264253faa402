"""Sums of products of calibration inputs rounded to bfloat16, on a CPU: our own loop, or oneDNN's where that is faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import native

# Packed together: enough to hide what reading and writing the sums takes, few enough to take little memory.
_TOKENS = 512


@contextmanager
def rounded_factors() -> Iterator[None]:
    """Within it, torch on a CPU with AMX rounds the factors of float32 products to bfloat16 and adds up in float32; on
    others it multiplies them as they are."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None:
        yield
        return
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def accumulate(hessian: torch.Tensor, x: torch.Tensor, strip: int) -> bool:
    """Add 2 X^T X of inputs rounded to bfloat16, summed in float32; False where there is no better way than torch's.

    Args:
        hessian: float32 [K, K]; of its rows [s, s + strip), s a multiple of `strip`, the columns from s on are whole then,
            those before mean nothing.
        x: float32 [T, K].
    """
    # With AMX oneDNN has a faster one.
    if (
        native.level() != 1
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or x.stride(1) != 1
    ):
        return False
    library = native.library()
    assert library is not None
    columns = x.shape[1]
    packed = torch.empty(-(-columns // 16), _TOKENS // 2, 16, dtype=torch.int32)
    for part in x.split(_TOKENS):
        library.quantkit_hessian(
            *(part.data_ptr(), part.stride(0), part.shape[0], columns, strip, packed.data_ptr()),
            *(hessian.data_ptr(), torch.get_num_threads()),
        )
    return True
