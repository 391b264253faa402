"""The Triton kernels on a GPU where there is one, else on CPU tensors in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so it is set here, before any test module is.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    pytest.importorskip("triton", reason="Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op called in a test runs its Triton kernel, or raises; tensors are seeded."""
    torch.manual_seed(0)
    if "device" in request.fixturenames:
        monkeypatch.setenv("QUANTKIT_BACKEND", "triton")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| (Frobenius); 0 for empty tensors, inf for other shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.fixture(name="relative_error")
def _relative_error() -> object:
    return relative_error
