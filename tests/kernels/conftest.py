"""What the op tests share: seeded data, slow float64 products, and the error they are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from quantkit.kernels.packing import pack_int4


@dataclass
class Int4Weight:
    """Random INT4 codes with bf16 group scales, and their float64 values."""

    codes: torch.Tensor  # int8 [N, K]
    scale: torch.Tensor  # bf16 [N, G]

    @property
    def packed(self) -> torch.Tensor:
        return pack_int4(self.codes)

    def dense(self, half: bool = False) -> torch.Tensor:
        """float64 [N, K]"""
        group = self.codes.shape[1] // self.scale.shape[1]
        scale = self.scale.double().repeat_interleave(group, dim=1)
        return (self.codes.double() + (0.5 if half else 0.0)) * scale


def _int4_weight(n: int, k: int, group: int) -> Int4Weight:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = (torch.rand(n, k // group) + 0.5).bfloat16() / 64
    return Int4Weight(codes, scale)


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| (Frobenius); 0 for empty tensors, inf for other shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    # The tensors are small: on busy cores a second thread costs more than it gives.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def int4_weight() -> Callable[[int, int, int], Int4Weight]:
    return _int4_weight


@pytest.fixture
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return _relative_error


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once with each implementation forced."""
    monkeypatch.setenv("QUANTKIT_BACKEND", request.param)
    return request.param
