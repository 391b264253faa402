"""The native CPU quantizer of rows, called on torch tensors."""

from __future__ import annotations

import torch

from . import native

FLOAT8, INTEGER, HALF_INTEGER = 0, 1, 2  # as rows.cpp names them


def quantize(
    x: torch.Tensor, form: int, low: float, high: float, factor: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """x [..., K] -> (codes [..., K], float32 scale [..., 1]); None where it cannot be had.

    Args:
        x: bf16 or float32.
        form: `FLOAT8` (e4m3 codes; scale = max|row| / high), `INTEGER` (the same with int8 codes)
            or `HALF_INTEGER` (int8 codes n for (n + 1/2) * scale; scale = rms(row) * factor).
        low, high: the codes' range.
    """
    library = native.library()
    if library is None or x.dtype not in (torch.bfloat16, torch.float32) or not x.shape[-1]:
        return None
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    dtype = torch.float8_e4m3fn if form == FLOAT8 else torch.int8
    codes = torch.empty(x.shape, dtype=dtype)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    library.quantkit_quantize_rows(
        rows.data_ptr(),
        x.dtype == torch.float32,
        rows.stride(0),
        *rows.shape,
        form,
        low,
        high,
        factor,
        codes.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, scale
