"""The gate of a gated MLP: SiLU, multiplication and the activation's quantization in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cpu import rows
from .dispatch import Op
from .quantize_rows import FORMS, code_dtype, levels_and_factor, native_form, quantize_rows


def _reference(
    gate_up: torch.Tensor, form: str, bits: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [..., 2K] -> codes [..., K], scale float32 [..., 1] of silu(gate) * up.

    gate is the first half of the last dimension, up the second. silu(gate) and the product are
    rounded to gate_up's dtype, as a model in eager mode does, before they are quantized.

    Args:
        gate_up: bf16, fp16 or float32; may be strided.
        form: "fp8", "int8" or "half", as `quantize_rows` takes it.
        bits: of the codes.

    Raises:
        ValueError: the last dimension is odd, or the form is unknown.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    codes, scale = quantize_rows(F.silu(gate) * up, form, bits)
    return codes, scale


def _cpu(gate_up: torch.Tensor, form: str, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    found = rows.gate(gate_up, *native_form(form, bits))
    return _reference(gate_up, form, bits) if found is None else found


def _triton(gate_up: torch.Tensor, form: str, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    from .gpu import rows as gpu

    return gpu.gate(gate_up, form, *levels_and_factor(form, bits))


def _check(gate_up: torch.Tensor, form: str, bits: int = 8) -> None:
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 or not gate_up.dtype.is_floating_point:
        raise ValueError(
            f"gate_up must be floating point [..., 2K], got {gate_up.dtype} {tuple(gate_up.shape)}"
        )
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def _fits(gate_up: torch.Tensor, form: str, bits: int = 8) -> bool:
    return gate_up.shape[-1] > 0


def _fake(gate_up: torch.Tensor, form: str, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return (
        gate_up.new_empty(shape, dtype=code_dtype(form)),
        gate_up.new_empty((*shape[:-1], 1), dtype=torch.float32),
    )


silu_mul_quantize = Op(
    "silu_mul_quantize",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=_fits,
)
