"""RMS norm, with the residual's addition before it and the activation's quantization after it."""

from __future__ import annotations

import torch

from .cpu import rows
from .dispatch import Op
from .quantize_fp8 import row_fits
from .quantize_rows import FORMS, code_dtype, levels_and_factor, native_form, quantize_rows


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    form: str,
    bits: int = 8,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden = x + residual; y = hidden / rms(hidden) * weight; (codes, scale) = quantize(y).

    y is rounded as transformers' RMS norms do: normalised in float32, rounded to x's dtype, then
    multiplied by the weight in that dtype. The codes are those of the rounded y.

    Args:
        x: [..., K] bf16, fp16 or float32.
        weight: [K].
        eps: added to the mean square.
        form: "fp8", "int8" or "half", as `quantize_rows` takes it.
        bits: of the codes.
        residual: [..., K] in x's dtype, or None.

    Returns:
        y [..., K] in x's dtype, codes [..., K], scale float32 [..., 1], and hidden: [..., K], or
        empty ([0]) where there is no residual, since an op must not return its input.

    Raises:
        ValueError: the shapes do not fit together, or the form is unknown.
    """
    hidden = x if residual is None else x + residual
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    y = weight * wide.to(x.dtype)
    codes, scale = quantize_rows(y, form, bits)
    return y, codes, scale, x.new_empty(0) if residual is None else hidden


def _cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    form: str,
    bits: int = 8,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    found = rows.norm(x, weight, eps, residual, *native_form(form, bits))
    return _reference(x, weight, eps, form, bits, residual) if found is None else found


def _triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    form: str,
    bits: int = 8,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .gpu import rows as gpu

    return gpu.norm(x, weight, eps, residual, form, *levels_and_factor(form, bits))


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    form: str,
    bits: int = 8,
    residual: torch.Tensor | None = None,
) -> None:
    if x.dim() == 0 or not x.dtype.is_floating_point or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x must be floating point [..., K] and weight [K], "
            f"got x {x.dtype} {tuple(x.shape)}, weight {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} {tuple(x.shape)}, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    form: str,
    bits: int = 8,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=code_dtype(form)),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
        x.new_empty(0 if residual is None else x.shape),
    )


rmsnorm_quantize = Op(
    "rmsnorm_quantize",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=row_fits,
)
