"""A gate and a residual at the end of the linear layers: one meaning, whatever multiplies."""

from __future__ import annotations

import pytest
import torch
from quantkit.kernels import int4pack
from quantkit.kernels.dispatch import Op
from quantkit.kernels.hadamard_int4_linear import hadamard_int4_linear
from quantkit.kernels.int4_fp8_linear import int4_fp8_linear
from quantkit.kernels.int4_int8_linear import int4_int8_linear
from quantkit.kernels.int4_linear import int4_linear
from quantkit.kernels.int8_linear import int8_linear
from quantkit.kernels.quantize_fp8 import quantize_fp8
from quantkit.kernels.quantize_int8 import quantize_int8

N, K = 128, 256


def _arguments(op: Op, int4_weight, native: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The op's first arguments up to the bias, and the product in float64."""
    weight = int4_weight(N, K, 128)
    x, bias = torch.randn(2, 3, K), torch.randn(N)
    packed = weight.packed, weight.scale
    if native:
        packed = int4pack.repack(*packed)
        assert packed is not None
    if op is int4_linear:
        x = x.bfloat16()
        return [x, *packed, bias], x.double() @ weight.dense().t() + bias.double()
    quantize = quantize_fp8 if op is int4_fp8_linear else quantize_int8
    codes, row_scale = quantize(x)
    dense = weight.dense()
    if op is int8_linear:
        packed = weight.codes, weight.scale[:, :1]
        dense = weight.codes.double() * packed[1].double()
    product = (codes.double() @ dense.t()) * row_scale.double() + bias.double()
    return [codes, row_scale, *packed, bias], product


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("op", [int4_linear, int4_fp8_linear, int4_int8_linear, int8_linear])
def test_gate_and_residual(op, native, backend, int4_weight, relative_error, monkeypatch) -> None:
    monkeypatch.setenv("QUANTKIT_BACKEND", backend)
    arguments, product = _arguments(op, int4_weight, native)
    residual = torch.randn(2, 3, N)
    y = op(*arguments, residual=residual)
    assert y.shape == (2, 3, N)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, product + residual.double()) < 5e-3
    gate, up = product.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    y = op(*arguments, gate=True)
    assert y.shape == (2, 3, N // 2)
    assert relative_error(y, expected) < 8e-3
    y = op(*arguments, residual=residual[..., : N // 2], gate=True)
    assert relative_error(y, expected + residual[..., : N // 2].double()) < 8e-3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", [int4_linear, int4_fp8_linear, int4_int8_linear, int8_linear])
def test_a_residual_is_added_to_what_would_be_written(
    op, backend, int4_weight, monkeypatch
) -> None:
    monkeypatch.setenv("QUANTKIT_BACKEND", backend)
    arguments, _ = _arguments(op, int4_weight, True)
    residual = torch.randn(2, 3, N).bfloat16()
    assert torch.equal(op(*arguments, residual=residual), op(*arguments) + residual)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("native", [False, True])
def test_a_residual_behind_a_rotation(native, backend, int4_weight, monkeypatch) -> None:
    monkeypatch.setenv("QUANTKIT_BACKEND", backend)
    weight = int4_weight(N, K, 128)
    packed = weight.packed, weight.scale
    if native:
        packed = int4pack.repack(*packed, half=True)
        assert packed is not None
    x, residual = torch.randn(2, 3, K).bfloat16(), torch.randn(2, 3, N).bfloat16()
    with pytest.raises(ValueError, match=r"residual must be \(2, 3, 128\)"):
        hadamard_int4_linear(x, *packed, residual=residual[0])
    bias = torch.randn(N)
    y = hadamard_int4_linear(x, *packed, bias, residual=residual)
    assert torch.equal(y, hadamard_int4_linear(x, *packed, bias) + residual)


@pytest.mark.parametrize("op", [int4_linear, int4_fp8_linear, int4_int8_linear, int8_linear])
def test_bad_shapes_and_fakes(op, int4_weight) -> None:
    arguments, _ = _arguments(op, int4_weight, False)
    with pytest.raises(ValueError, match=r"residual must be \(2, 3, 128\), got \(2, 128\)"):
        op(*arguments, residual=torch.zeros(2, 128))
    with pytest.raises(ValueError, match=r"residual must be \(2, 3, 64\)"):
        op(*arguments, residual=torch.zeros(2, 3, 128), gate=True)
    meta = [a.to("meta") for a in arguments]
    assert op(*meta, gate=True).shape == (2, 3, 64)
    odd = [*arguments[:-3], *(a[:127] for a in arguments[-3:])]
    with pytest.raises(ValueError, match="N = 127"):
        op(*odd, gate=True)
