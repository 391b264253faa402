"""Where things run, as a user names it."""

from __future__ import annotations

import torch

from quantkit.errors import QuantkitError


def find_device(name: str) -> torch.device:
    """The device that a user named.

    Raises:
        QuantkitError: it is unknown, not supported, or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise QuantkitError(f"--device {name}: unknown; cpu and cuda are known") from None
    if device.type not in ("cpu", "cuda"):
        raise QuantkitError(f"--device {name}: not supported; cpu and cuda are")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise QuantkitError(f"--device {name}: torch sees no CUDA device; use --device cpu")
    return device


def product_dtype(device: torch.device, bits: int) -> torch.dtype:
    """The type of products that only measure, calibrate or are learned from, for weights of so many bits.

    bfloat16 where the hardware multiplies it: beside what four bits lose its rounding is nothing. The errors of eight bits
    would be measured too large: they take float32.
    """
    if bits > 4:
        return torch.float32
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
