"""A quantized weight as the tensors of a checkpoint, and the shapes to expect when reading one."""

from __future__ import annotations

import torch

from quantkit.formats.bits import pack, packed_words
from quantkit.formats.scheme import Scheme


def packed_tensors(
    codes: torch.Tensor, scale: torch.Tensor, scheme: Scheme
) -> dict[str, torch.Tensor]:
    """Codes int8 [N, K] and scale float32 [N, G] (bf16 numbers) -> suffix -> tensor, in compressed-tensors' layout."""
    stored = scale.to(torch.bfloat16)
    if not torch.equal(stored.float(), scale.float()):
        raise ValueError(
            "a scale is not a bf16 number: weights must be rounded against the scale that is stored"
        )
    if scheme.packs:
        return {
            "weight_packed": pack(codes, scheme.weights.bits),
            "weight_scale": stored,
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
    return {"weight": codes.contiguous(), "weight_scale": stored}


def expected_tensors(
    scheme: Scheme, rows: int, columns: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of a weight [rows, columns] in this scheme."""
    groups = columns // scheme.weights.group_size if scheme.weights.group_size else 1
    scale = ("BF16", (rows, groups))
    if scheme.packs:
        return {
            "weight_packed": ("I32", (rows, packed_words(columns, scheme.weights.bits))),
            "weight_scale": scale,
            "weight_shape": ("I64", (2,)),
        }
    return {"weight": ("I8", (rows, columns)), "weight_scale": scale}
