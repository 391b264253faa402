"""The native CPU Hadamard rotation, called on torch tensors."""

from __future__ import annotations

import torch

from . import native, rows


def rotate(x: torch.Tensor, block: int) -> torch.Tensor | None:
    """x [..., K] @ blockdiag(H_block) / sqrt(block) in x's dtype; None where it cannot be had."""
    if not _supported(x, block):
        return None
    out = torch.empty(x.shape, dtype=x.dtype)
    _run(x, block, out.data_ptr(), (0, 0.0, 0.0, 0.0), None, None)
    return out


def rotate_and_quantize(
    x: torch.Tensor, block: int, form: int, low: float, high: float, factor: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(codes, scale) of the rotated rows, which stay in float32; the form as `rows.quantize` takes it."""
    if not _supported(x, block):
        return None
    codes, scale = rows.results(x, x.shape[-1], form)
    _run(x, block, None, (form, low, high, factor), codes.data_ptr(), scale.data_ptr())
    return codes, scale


def _supported(x: torch.Tensor, block: int) -> bool:
    power_of_two = block > 0 and not block & (block - 1)
    return native.library() is not None and x.dtype in rows.DTYPES and power_of_two


def _run(
    x: torch.Tensor,
    block: int,
    out: int | None,
    quantizer: tuple[int, float, float, float],
    codes: int | None,
    scale: int | None,
) -> None:
    library = native.library()
    assert library is not None
    if not x.numel():
        return
    flat = rows.flat(x, x.shape[-1])
    failed = library.quantkit_hadamard(
        *(flat.data_ptr(), x.dtype == torch.float32, flat.stride(0), *flat.shape, block),
        *(out, *quantizer, codes, scale, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for a row of {x.shape[-1]} numbers")
