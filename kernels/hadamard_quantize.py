"""The Hadamard rotation and the activation's quantization in one pass."""

from __future__ import annotations

import torch

from .cpu import hadamard as native
from .dispatch import Op
from .hadamard import check as check_hadamard
from .hadamard import fits_gpu, hadamard
from .quantize_rows import FORMS, code_dtype, levels_and_factor, native_form, quantize_rows


def _reference(
    x: torch.Tensor, form: str, bits: int = 8, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> codes [..., K], scale float32 [..., 1] of hadamard(x, block), which stays in float32.

    Args:
        x: bf16, fp16 or float32.
        form: "fp8", "int8" or "half", as `quantize_rows` takes it.
        bits: of the codes.
        block: of the rotation, as `hadamard` takes it; 1 rotates nothing.

    Raises:
        ValueError: K is not a multiple of the block, or the form is unknown.
    """
    codes, scale = quantize_rows(hadamard.reference(x.float(), block), form, bits)
    return codes, scale


def _cpu(
    x: torch.Tensor, form: str, bits: int = 8, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    if block == 1:
        return quantize_rows(x, form, bits)
    found = native.rotate_and_quantize(x, block, *native_form(form, bits))
    return _reference(x, form, bits, block) if found is None else found


def _triton(
    x: torch.Tensor, form: str, bits: int = 8, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    from .gpu import hadamard as gpu

    if block == 1:
        return quantize_rows(x, form, bits)
    return gpu.rotate_and_quantize(x, block, form, *levels_and_factor(form, bits))


def _supports(x: torch.Tensor, form: str, bits: int = 8, block: int = 128) -> bool:
    return fits_gpu(x, block)


def _check(x: torch.Tensor, form: str, bits: int = 8, block: int = 128) -> None:
    check_hadamard(x, block)
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def _fake(
    x: torch.Tensor, form: str, bits: int = 8, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape, dtype=code_dtype(form)),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


hadamard_quantize = Op(
    "hadamard_quantize",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=_supports,
)
