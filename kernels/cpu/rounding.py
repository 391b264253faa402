"""The native CPU loops of rounding weights, called on torch tensors: what `methods` does in torch, many times faster."""

from __future__ import annotations

import ctypes

import torch

from . import native


def gptq_block(
    work: torch.Tensor,
    original: torch.Tensor,
    ratios: torch.Tensor,
    scale: torch.Tensor,
    groups: torch.Tensor,
    pivots: torch.Tensor,
    added: torch.Tensor,
    codes: torch.Tensor,
    low: int,
    high: int,
    shift: float,
) -> tuple[torch.Tensor, float] | None:
    """A block of GPTQ's columns; None where it cannot be had.

    Args:
        work: float32 [B, N], the weights as they stand, which become the targets.
        original: float32 [B, N], the weights as they were.
        ratios: float32 [B, B] upper triangular, rows in place.
        scale: float32 [G, N].
        groups: int32 [B], each column's row of `scale`.
        pivots, added: float64 [B], what a target's and a weight's squared error add to and take off the loss.
        codes: int8 [B, N], is filled.
        low, high: the codes' range.
        shift: of a level from its code.

    Returns:
        (errors float32 [B, N], the loss).
    """
    library = native.library()
    tensors = (work, original, scale, groups, pivots, added, codes)
    if library is None or work.device.type != "cpu" or not all(t.is_contiguous() for t in tensors):
        return None
    errors, loss = torch.empty_like(work), ctypes.c_double()
    failed = library.quantkit_gptq_block(
        *(work.data_ptr(), original.data_ptr(), work.shape[1], work.shape[0]),
        *(ratios.data_ptr(), ratios.stride(0), scale.data_ptr(), groups.data_ptr()),
        *(pivots.data_ptr(), added.data_ptr(), low, high, shift, codes.data_ptr()),
        *(errors.data_ptr(), ctypes.byref(loss), torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for a block of {len(work)} columns")
    return errors, loss.value


def scale_search(
    weight: torch.Tensor,
    start: torch.Tensor,
    importance: torch.Tensor | None,
    ratios: torch.Tensor,
    low: int,
    high: int,
    shift: float,
) -> torch.Tensor | None:
    """The multiple of each scale with the least squared error; None where it cannot be had.

    Args:
        weight: float32 [N, K].
        start: float32 [N, G].
        importance: float32 [K], the weight of each input's error, or None.
        ratios: float32 [R], of `start`; the earlier one wins a tie.
        low, high, shift: as `gptq_block`.

    Returns:
        float32 [N, G].
    """
    library = native.library()
    if library is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    weight, best = weight.contiguous(), start.contiguous().clone()
    importance = None if importance is None else importance.contiguous()
    rows, groups = best.shape
    library.quantkit_scale_search(
        *(weight.data_ptr(), rows, groups, weight.shape[1] // max(groups, 1)),
        *(None if importance is None else importance.data_ptr(), ratios.data_ptr(), len(ratios)),
        *(low, high, shift, best.data_ptr(), torch.get_num_threads()),
    )
    return best


def round_to_nearest(
    weight: torch.Tensor, scale: torch.Tensor, low: int, high: int, shift: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The nearest codes, and what they miss; None where they cannot be had.

    Args:
        weight: float32 [N, K].
        scale: float32 [N, G].
        low, high, shift: as `gptq_block`.

    Returns:
        (codes int8 [N, K], float64 [N, 2]: of each row the squared errors' sum and the squares').
    """
    library = native.library()
    if library is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    if scale.device.type != "cpu" or scale.shape[0] != weight.shape[0]:
        return None
    weight, scale = weight.contiguous(), scale.float().contiguous()
    rows, groups = scale.shape
    codes = torch.empty_like(weight, dtype=torch.int8)
    sums = torch.empty(rows, 2, dtype=torch.float64)
    library.quantkit_round(
        *(weight.data_ptr(), rows, groups, weight.shape[1] // max(groups, 1), scale.data_ptr()),
        *(low, high, shift, codes.data_ptr(), sums.data_ptr(), torch.get_num_threads()),
    )
    return codes, sums


def round_with_offset(
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    low: int,
    high: int,
    shift: float,
) -> torch.Tensor | None:
    """The values of the nearest codes of weight / scale + offset; None where they cannot be had.

    Args:
        weight, offset: float32 [N, K].
        scale: float32 [N, G].
        low, high, shift: as `gptq_block`.

    Returns:
        float32 [N, K].
    """
    library = native.library()
    if library is None or not _plain(weight, scale, offset):
        return None
    rows, groups = scale.shape
    value = torch.empty_like(weight)
    library.quantkit_round_with_offset(
        *(weight.data_ptr(), rows, groups, weight.shape[1] // max(groups, 1), scale.data_ptr()),
        *(offset.data_ptr(), low, high, shift, value.data_ptr(), torch.get_num_threads()),
    )
    return value


def round_with_offset_backward(
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    gradient: torch.Tensor,
    low: int,
    high: int,
    shift: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Gradients of `round_with_offset`, rounding counted as the identity; None where they cannot be had.

    Args:
        gradient: of the values, float32 [N, K]; the others as there.

    Returns:
        (of the offsets float32 [N, K], of the scales float32 [N, G]).
    """
    library = native.library()
    if library is None or not _plain(weight, scale, offset, gradient):
        return None
    rows, groups = scale.shape
    by_offset, by_scale = torch.empty_like(offset), torch.empty_like(scale)
    library.quantkit_round_with_offset_backward(
        *(weight.data_ptr(), rows, groups, weight.shape[1] // max(groups, 1), scale.data_ptr()),
        *(offset.data_ptr(), gradient.data_ptr(), low, high, shift),
        *(by_offset.data_ptr(), by_scale.data_ptr(), torch.get_num_threads()),
    )
    return by_offset, by_scale


def _plain(*tensors: torch.Tensor) -> bool:
    return all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors
    )
