"""The native CPU sum of calibration inputs' products, called on torch tensors."""

from __future__ import annotations

import torch

from . import native

# Packed together: enough to hide what reading and writing the sums takes, few enough to take little memory.
_TOKENS = 512


def accumulate(hessian: torch.Tensor, x: torch.Tensor, strip: int) -> bool:
    """Add 2 X^T X of inputs rounded to bfloat16, summed in float32; False where there is no better way than torch's.

    Args:
        hessian: float32 [K, K]; of its rows [s, s + strip), s a multiple of `strip`, the columns from s on become whole.
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
