"""The native CPU quantizers of rows, called on torch tensors."""

from __future__ import annotations

import torch

from . import native

FLOAT8, INTEGER, HALF_INTEGER = 0, 1, 2  # as rows.cpp names them
DTYPES = (torch.bfloat16, torch.float32)


def quantize(
    x: torch.Tensor, form: int, low: float, high: float, factor: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """x [..., K] -> (codes [..., K], float32 scale [..., 1]); None where it cannot be had.

    Args:
        x: bf16 or float32.
        form: `FLOAT8` (e4m3 codes; scale = max|row| / factor), `INTEGER` (the same with int8 codes)
            or `HALF_INTEGER` (int8 codes n for (n + 1/2) * scale; scale = rms(row) * factor).
        low, high: the codes' range.
    """
    library = native.library()
    if library is None or x.dtype not in DTYPES or not x.shape[-1]:
        return None
    rows = flat(x, x.shape[-1])
    codes, scale = results(x, x.shape[-1], form)
    library.quantkit_quantize_rows(
        *(rows.data_ptr(), x.dtype == torch.float32, rows.stride(0), *rows.shape),
        *(form, low, high, factor, codes.data_ptr(), scale.data_ptr(), torch.get_num_threads()),
    )
    return codes, scale


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    form: int,
    low: float,
    high: float,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(y, codes, scale, hidden) as `rmsnorm_quantize` defines them; the form as `quantize` takes it."""
    library = native.library()
    if library is None or x.dtype not in DTYPES or not x.shape[-1]:
        return None
    rows, weight = flat(x, x.shape[-1]), weight.contiguous()
    other = None if residual is None else flat(residual, x.shape[-1])
    y = torch.empty(x.shape, dtype=x.dtype)
    hidden = torch.empty(0 if residual is None else x.shape, dtype=x.dtype)
    codes, scale = results(x, x.shape[-1], form)
    library.quantkit_norm_quantize(
        *(rows.data_ptr(), x.dtype == torch.float32, rows.stride(0), *rows.shape),
        *((None, 0) if other is None else (other.data_ptr(), other.stride(0))),
        *(weight.data_ptr(), eps, form, low, high, factor, hidden.data_ptr(), y.data_ptr()),
        *(codes.data_ptr(), scale.data_ptr(), torch.get_num_threads()),
    )
    return y, codes, scale, hidden


def gate(
    gate_up: torch.Tensor, form: int, low: float, high: float, factor: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(codes, scale) as `silu_mul_quantize` defines them; the form as `quantize` takes it."""
    library = native.library()
    k = gate_up.shape[-1] // 2
    if library is None or gate_up.dtype not in DTYPES or not k:
        return None
    rows = flat(gate_up, 2 * k)
    codes, scale = results(gate_up, k, form)
    failed = library.quantkit_gate_quantize(
        *(rows.data_ptr(), gate_up.dtype == torch.float32, rows.stride(0), len(rows), k),
        *(form, low, high, factor, codes.data_ptr(), scale.data_ptr(), torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for a row of {k} numbers")
    return codes, scale


def flat(x: torch.Tensor, k: int) -> torch.Tensor:
    """x [..., k] as rows whose elements are contiguous."""
    rows = x.reshape(-1, k)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def results(x: torch.Tensor, k: int, form: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty codes [..., k] and scales [..., 1] for x's rows."""
    dtype = torch.float8_e4m3fn if form == FLOAT8 else torch.int8
    codes = torch.empty((*x.shape[:-1], k), dtype=dtype)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
