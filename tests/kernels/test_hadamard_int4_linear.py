import pytest
import torch
from quantkit.kernels import int4pack
from quantkit.kernels.hadamard_int4_linear import hadamard_int4_linear
from quantkit.kernels.quantize_half import GAUSSIAN_CLIP

BOUND = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 2e-3}
SHAPES = [(1, 32, 128, 128), (3, 16, 14336, 128), (0, 32, 128, 128), (37, 48, 384, 384)]


def _weights(weight) -> list[tuple[torch.Tensor, torch.Tensor]]:
    repacked = int4pack.repack(weight.packed, weight.scale, half=True)
    return [(weight.packed, weight.scale), *([repacked] if repacked else [])]


def _quantized(x: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """The rotated and quantized x, in float64."""
    signs = torch.tensor(
        [[(-1) ** bin(i & j).count("1") for j in range(block)] for i in range(block)],
        dtype=torch.float64,
    )
    rotated = (x.double().reshape(-1, block) @ signs / block**0.5).reshape(x.shape)
    rms = rotated.square().mean(-1, keepdim=True).sqrt()
    step = 2 * GAUSSIAN_CLIP[bits] * rms / (2**bits - 1)
    half = 2 ** (bits - 1)
    return ((rotated / step).floor().clamp(-half, half - 1) + 0.5) * step


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("m", "n", "k", "group"), SHAPES)
def test_against_float64(m, n, k, group, dtype, bits, int4_weight, relative_error) -> None:
    weight = int4_weight(n, k, group)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
    dense = weight.dense(half=True)
    expected = _quantized(x, bits, 128) @ dense.t() + bias.double()
    for packed, scale in _weights(weight):
        y = hadamard_int4_linear(x, packed, scale, bias, bits)
        assert y.dtype == dtype
        # float32 and float64 may put a value at the border of two codes on different sides.
        assert relative_error(y, expected) < BOUND[dtype]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("block", [32, 256])
def test_other_blocks_and_batch_dimensions(block, int4_weight, relative_error) -> None:
    weight = int4_weight(32, 512, 128)
    x = torch.randn(512, 3, 2).permute(2, 1, 0)
    expected = _quantized(x, 8, block) @ weight.dense(half=True).t()
    for packed, scale in _weights(weight):
        y = hadamard_int4_linear(x, packed, scale, block=block)
        assert y.shape == (2, 3, 32)
        assert relative_error(y, expected) < 2e-3


@pytest.mark.usefixtures("backend")
def test_rotated_weights_give_back_the_plain_product(int4_weight, relative_error) -> None:
    """x H (W H)^T = x W^T, up to the quantization of x at 8 bits."""
    from quantkit.kernels.hadamard import hadamard

    weight = int4_weight(32, 256, 128)
    plain = hadamard(weight.dense(half=True).float())
    x = torch.randn(16, 256)
    y = hadamard_int4_linear(x, weight.packed, weight.scale)
    assert relative_error(y, x @ plain.t()) < 2e-2


@pytest.mark.usefixtures("backend")
def test_zeros(int4_weight) -> None:
    weight = int4_weight(32, 256, 128)
    y = hadamard_int4_linear(torch.zeros(2, 256), weight.packed, weight.scale)
    assert y.count_nonzero() == 0


def test_opcheck(int4_weight) -> None:
    weight = int4_weight(32, 128, 128)
    arguments = (torch.randn(2, 3, 128), weight.packed, weight.scale, torch.randn(32), 4, 64)
    torch.library.opcheck(torch.ops.quantkit.hadamard_int4_linear.default, arguments)


def test_bad_input(int4_weight) -> None:
    weight = int4_weight(32, 192, 64)
    x = torch.randn(2, 192)
    with pytest.raises(ValueError, match=r"multiple of 128.*\(2, 192\)"):
        hadamard_int4_linear(x, weight.packed, weight.scale)
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 0"):
        hadamard_int4_linear(x, weight.packed, weight.scale, bits=0, block=64)
    with pytest.raises(ValueError, match=r"x must be \[..., 192\]"):
        hadamard_int4_linear(x[:, :64], weight.packed, weight.scale, block=64)
