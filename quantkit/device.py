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
