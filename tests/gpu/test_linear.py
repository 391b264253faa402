"""The GPU's linear layers against float64, for every kind of activation and shape of tile."""

from __future__ import annotations

import pytest
import torch
from quantkit.kernels import gpu_layout
from quantkit.kernels.hadamard import hadamard
from quantkit.kernels.hadamard_int4_linear import hadamard_int4_linear
from quantkit.kernels.int4_fp8_linear import int4_fp8_linear
from quantkit.kernels.int4_int8_linear import int4_int8_linear
from quantkit.kernels.int4_linear import int4_linear
from quantkit.kernels.int8_linear import int8_linear
from quantkit.kernels.packing import pack_int4
from quantkit.kernels.quantize_fp8 import quantize_fp8
from quantkit.kernels.quantize_half import quantize_half
from quantkit.kernels.quantize_int8 import quantize_int8

# M: one, odd, a full tile, more than one tile; N: less than a tile, not a multiple; K: one unit, an odd
# number of units, several splits.
SHAPES = [(1, 32, 128), (3, 160, 384), (16, 136, 256), (17, 64, 2048), (65, 48, 256), (0, 32, 128)]
GROUPS = [128, 64]
E4M3 = torch.float8_e4m3fn


class Weight:
    def __init__(self, n: int, k: int, group: int, device: torch.device, lowest: int = -7) -> None:
        self.codes = torch.randint(lowest, 8, (n, k), dtype=torch.int8)
        self.scale = (torch.rand(n, k // group) + 0.5).bfloat16() / 64
        self.group, self.device = group, device

    def repacked(self, activations: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        found = gpu_layout.repack(pack_int4(self.codes), self.scale, activations)
        assert found is not None
        return found[0].to(self.device), found[1].to(self.device)

    def rounded(self) -> torch.Tensor:
        """Each product rounded to e4m3, from the definition."""
        scale = self.scale.float()
        channel = scale.amax(dim=1, keepdim=True) / 448
        codes = (scale / channel).to(E4M3).float().repeat_interleave(self.group, dim=1)
        products = (self.codes.float() * codes / 8).to(E4M3)
        return products.double() * channel.double() * 8

    def dense(self, offset: float = 0.0) -> torch.Tensor:
        scale = self.scale.double().repeat_interleave(self.group, dim=1)
        return (self.codes.double() + offset) * scale


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_fp8(m, n, k, group, device, relative_error) -> None:
    weight = Weight(n, k, group, device)
    x8, x_scale = quantize_fp8(torch.randn(m, k).to(device))
    bias = torch.randn(n)
    expected = (x8.cpu().double() @ weight.dense().t()) * x_scale.cpu().double() + bias.double()
    packed = weight.repacked(E4M3)
    assert packed[0].dtype == torch.uint8
    y = int4_fp8_linear(x8, x_scale, *packed, bias.to(device), torch.float32)
    assert relative_error(y.cpu(), expected) < 1e-5
    y = int4_fp8_linear(x8, x_scale, *packed, bias.to(device))
    assert y.dtype == torch.bfloat16
    assert relative_error(y.cpu(), expected) < 5e-3


def test_fp8_with_a_code_of_minus_eight(device, relative_error) -> None:
    weight = Weight(48, 256, 128, device, lowest=-8)
    packed = weight.repacked(E4M3)
    assert packed[0].dtype == torch.int16
    x8, x_scale = quantize_fp8(torch.randn(5, 256).to(device))
    expected = (x8.cpu().double() @ weight.dense().t()) * x_scale.cpu().double()
    y = int4_fp8_linear(x8, x_scale, *packed, None, torch.float32)
    assert relative_error(y.cpu(), expected) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8(m, n, k, group, bits, device, relative_error) -> None:
    weight = Weight(n, k, group, device, lowest=-8)
    xq, x_scale = quantize_int8(torch.randn(m, k).to(device), bits)
    expected = (xq.cpu().double() @ weight.dense().t()) * x_scale.cpu().double()
    y = int4_int8_linear(xq, x_scale, *weight.repacked(torch.int8), None, torch.float32)
    assert relative_error(y.cpu(), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_sixteen_bits(m, n, k, group, dtype, device, relative_error) -> None:
    weight = Weight(n, k, group, device, lowest=-8)
    x = torch.randn(m, k).to(dtype).to(device)
    y = int4_linear(x, *weight.repacked(x.dtype))
    assert y.dtype == dtype
    assert relative_error(y.cpu(), x.cpu().double() @ weight.dense().t()) < 5e-3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_half_integers(m, n, k, bits, device, relative_error) -> None:
    weight = Weight(n, k, 128, device, lowest=-8)
    x = torch.randn(m, k).to(device)
    codes, step = quantize_half(hadamard.reference(x, 128), bits)
    expected = ((codes.cpu().double() + 0.5) @ weight.dense(0.5).t()) * step.cpu().double()
    y = hadamard_int4_linear(x, *weight.repacked(torch.int8), None, bits, 128)
    assert relative_error(y.cpu(), expected) < 1e-3


@pytest.mark.parametrize("kind", ["fp8", "rounded", "int8", "bf16", "half"])
@pytest.mark.parametrize("group", [256, 768])
def test_wide_groups_and_one_scale_per_channel(group, kind, device, relative_error) -> None:
    weight = Weight(40, 768, group, device)
    x = torch.randn(2, 2, 768).to(device)
    if kind == "bf16":
        y = int4_linear(x.bfloat16(), *weight.repacked(torch.bfloat16))
        expected = x.bfloat16().cpu().double() @ weight.dense().t()
    elif kind == "half":
        codes, step = quantize_half(hadamard.reference(x, 128), 8)
        expected = ((codes.cpu().double() + 0.5) @ weight.dense(0.5).t()) * step.cpu().double()
        y = hadamard_int4_linear(x, *weight.repacked(torch.int8), None, 8, 128)
    elif kind == "int8":
        xq, x_scale = quantize_int8(x)
        expected = (xq.cpu().double() @ weight.dense().t()) * x_scale.cpu().double()
        y = int4_int8_linear(xq, x_scale, *weight.repacked(torch.int8), None, torch.float32)
    else:
        x8, x_scale = quantize_fp8(x)
        dense = weight.rounded() if kind == "rounded" else weight.dense()
        expected = (x8.cpu().double() @ dense.t()) * x_scale.cpu().double()
        products = "fp8" if kind == "rounded" else "exact"
        y = int4_fp8_linear(x8, x_scale, *weight.repacked(E4M3), None, torch.float32, products)
    assert y.shape == (2, 2, 40)
    assert relative_error(y.cpu(), expected) < (5e-3 if kind == "bf16" else 1e-5)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 32, 128), (17, 72, 1280), (130, 40, 256)])
def test_fp8_products(m, n, k, group, device, relative_error) -> None:
    """Up to 64 rows in one kernel, from 128 on by way of the expanded weight: the same numbers."""
    weight = Weight(n, k, group, device)
    x8, x_scale = quantize_fp8(torch.randn(m, k).to(device))
    expected = (x8.cpu().double() @ weight.rounded().t()) * x_scale.cpu().double()
    arguments = (x8, x_scale, *weight.repacked(E4M3), None, torch.float32, "fp8")
    assert relative_error(int4_fp8_linear(*arguments).cpu(), expected) < 1e-5


@pytest.mark.parametrize("m", [2, 128])
def test_fp8_products_of_subnormal_scales(m, device, relative_error) -> None:
    weight = Weight(40, 256, 128, device)
    weight.scale[:, 0] /= 50_000
    x = torch.randn(m, 256).to(device)
    x[:, 128:] = 0  # what the other group adds would hide it
    x8, x_scale = quantize_fp8(x)
    expected = (x8.cpu().double() @ weight.rounded().t()) * x_scale.cpu().double()
    y = int4_fp8_linear(x8, x_scale, *weight.repacked(E4M3), None, torch.float32, "fp8")
    assert relative_error(y.cpu(), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_take_the_expanded_weight(dtype, device, relative_error, monkeypatch) -> None:
    from quantkit.kernels.gpu import linear

    for group in (64, 256):
        weight = Weight(80, 256, group, device, lowest=-8)
        x = torch.randn(20, 256).to(dtype).to(device)
        bias, residual = torch.randn(80).to(device), torch.randn(20, 40).to(dtype).to(device)
        arguments = (x, *weight.repacked(dtype), bias, residual, True)
        tiles = int4_linear(*arguments)
        with monkeypatch.context() as patched:
            patched.setitem(linear.EXPAND_ROWS, dtype, 20)
            patched.setattr(linear, "_launch", None)
            whole = int4_linear(*arguments)
        gate, up = (x.cpu().double() @ weight.dense().t() + bias.cpu().double()).chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up + residual.cpu().double()
        assert relative_error(tiles.cpu(), expected) < 5e-3
        assert relative_error(whole.cpu(), expected) < 8e-3  # the gate is rounded on the way


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 32, 128), (3, 33, 100), (17, 72, 1000), (70, 136, 257), (0, 8, 8)]
)
def test_int8_weights(m, n, k, device, relative_error) -> None:
    xq, x_scale = quantize_int8(torch.randn(m, k).to(device))
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale, bias = (torch.rand(n, 1) + 0.5) / 64, torch.randn(n)
    sums = xq.cpu().double() @ weight.double().t()
    expected = sums * x_scale.cpu().double() * scale.t().double() + bias.double()
    arguments = (weight.to(device), scale.to(device), bias.to(device))
    y = int8_linear(xq, x_scale, *arguments, torch.float32)
    assert relative_error(y.cpu(), expected) < 1e-6
    assert relative_error(int8_linear(xq, x_scale, *arguments).cpu(), expected) < 5e-3


@pytest.mark.parametrize("split", [1, 2, 4, 8])
def test_every_split_gives_the_same_and_leaves_its_tickets_at_zero(split, device) -> None:
    from quantkit.kernels.gpu import linear

    weight = Weight(72, 1152, 128, device)  # nine units: the last split has fewer
    xq, x_scale = quantize_int8(torch.randn(3, 1152).to(device))
    config = {"BN": 64, "BM": 16, "SPLIT": split, "num_warps": 4, "num_stages": 3}
    run = lambda: linear.int4(  # noqa: E731
        "", xq, *weight.repacked(torch.int8), x_scale, None, torch.float32, config=config
    )
    expected = (xq.cpu().double() @ weight.dense().t()) * x_scale.cpu().double()
    first = run()
    torch.testing.assert_close(first.cpu().double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(), first)
    assert all(int(tickets.abs().sum()) == 0 for _, tickets in linear._WORKSPACES.values())


@pytest.mark.parametrize("split", [1, 2])
def test_more_tiles_than_a_band_either_way(split, device, relative_error) -> None:
    from quantkit.kernels.gpu import linear

    weight = Weight(200, 256, 128, device)
    xq, x_scale = quantize_int8(torch.randn(150, 256).to(device))
    config = {"BN": 64, "BM": 16, "SPLIT": split, "num_warps": 4, "num_stages": 3}
    packed = weight.repacked(torch.int8)
    y = linear.int4("", xq, *packed, x_scale, None, torch.float32, config=config)
    expected = (xq.cpu().double() @ weight.dense().t()) * x_scale.cpu().double()
    assert relative_error(y.cpu(), expected) < 1e-5


@pytest.mark.parametrize("kind", ["fp8", "int8", "dense"])
@pytest.mark.parametrize("m", [3, 70])
def test_gate_and_residual(m, kind, device, relative_error) -> None:
    weight = Weight(2 * 80, 256, 128, device)
    quantize = quantize_fp8 if kind == "fp8" else quantize_int8
    codes, x_scale = quantize(torch.randn(m, 256).to(device))
    bias, residual = torch.randn(160).to(device), torch.randn(m, 80).to(device)
    last = (bias, torch.float32)
    if kind == "fp8":
        y = int4_fp8_linear(codes, x_scale, *weight.repacked(E4M3), *last, "exact", residual, True)
    elif kind == "int8":
        y = int4_int8_linear(
            codes, x_scale, *weight.repacked(torch.int8), *last, False, residual, True
        )
    else:
        weight.scale = weight.scale[:, :1].expand(-1, 2)
        arguments = (weight.codes.to(device), weight.scale[:, :1].to(device))
        y = int8_linear(codes, x_scale, *arguments, *last, residual, True)
    both = (codes.cpu().double() @ weight.dense().t()) * x_scale.cpu().double()
    gate, up = (both + bias.cpu().double()).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up + residual.cpu().double()
    assert relative_error(y.cpu(), expected) < 1e-5


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("kind", ["bf16", "half"])
def test_a_residual_is_added_to_what_would_be_written(kind, split, device) -> None:
    from quantkit.kernels.gpu import linear

    weight = Weight(72, 256, 128, device)
    config = {"BN": 64, "BM": 16, "SPLIT": split, "num_warps": 4, "num_stages": 3}
    x, row_scale, operand = torch.randn(5, 256).bfloat16().to(device), None, torch.bfloat16
    if kind == "half":
        (x, row_scale), operand = quantize_half(x, 4), torch.int8
    packed, residual = weight.repacked(operand), torch.randn(5, 72).bfloat16().to(device)

    def run(added: torch.Tensor | None) -> torch.Tensor:
        return linear.int4(
            "", x, *packed, row_scale, None, torch.bfloat16,
            half_integer=kind == "half", residual=added, config=config,
        )  # fmt: skip

    assert torch.equal(run(residual), run(None) + residual)


def test_strided_rows_and_a_poisoned_output(device, relative_error, monkeypatch) -> None:
    weight = Weight(72, 256, 128, device)
    wide = torch.randn(6, 512).to(device)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.dtype.is_floating_point else made

    monkeypatch.setattr(torch, "empty", poisoned)
    x = wide.bfloat16()[::2, :256]
    y = int4_linear(x, *weight.repacked(x.dtype))
    assert relative_error(y.cpu(), x.cpu().double() @ weight.dense().t()) < 5e-3


def test_what_no_kernel_takes_is_declined(device) -> None:
    weight = Weight(32, 256, 128, device)
    stored = pack_int4(weight.codes).to(device), weight.scale.to(device)
    x8, x_scale = quantize_fp8(torch.randn(2, 256).to(device))
    with pytest.raises(ValueError, match="does not support"):
        int4_fp8_linear(x8, x_scale, *stored)
    with pytest.raises(ValueError, match="does not support"):  # halves are not for FP8
        int4_fp8_linear(x8, x_scale, *weight.repacked(torch.int8))


def test_no_configuration_for_blackwell_has_a_16_bit_tile_that_traps(device) -> None:
    from quantkit.kernels.gpu import linear

    largest = linear.largest_tile(linear.HALF, 10)
    for m in (65, 128, 4096):
        chosen = linear.heuristic(linear.HALF, m, 4096, 4096, 128, 148, largest)
        tried = linear.candidates(linear.HALF, m, largest)
        assert all(config["BM"] <= 64 for config in (chosen, *tried))
