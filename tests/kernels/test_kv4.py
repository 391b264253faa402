import pytest
import torch
from quantkit.kernels.kv4 import kv4_dequantize, kv4_quantize

STORED = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}


def _slow(vector: torch.Tensor, scale_dtype: str) -> tuple[list[int], float]:
    """Codes and stored scale of one vector, element by element."""
    largest = max(vector.tolist(), key=lambda v: (abs(v), -v))
    wanted = max(abs(largest) / 8, 2**-9 if "float8" in scale_dtype else 0)
    scale = torch.tensor(-wanted if largest > 0 else wanted).to(STORED[scale_dtype]).float()
    quotients = (vector.float() / scale).tolist() if scale else [0.0] * len(vector)
    return [max(-8, min(7, round(v))) for v in quotients], scale.item()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("scale_dtype", list(STORED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_against_loops(scale_dtype: str, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, 64) * torch.tensor([0.01, 1.0, 30.0])[None, :, None]).to(dtype)
    packed = kv4_quantize(x, scale_dtype)
    size = STORED[scale_dtype].itemsize
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, 32 + size)
    for vector, row in zip(x.flatten(0, 1), packed.flatten(0, 1)):
        codes, scale = _slow(vector, scale_dtype)
        expected = [(codes[i] + 8) | ((codes[i + 32] + 8) << 4) for i in range(32)]
        assert row[:32].tolist() == expected
        assert row[32:].clone().view(STORED[scale_dtype]).float().item() == scale


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("scale_dtype", list(STORED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize(scale_dtype: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 64)
    y = kv4_dequantize(kv4_quantize(x, scale_dtype), 64, dtype)
    assert y.dtype == dtype
    for vector, row in zip(x, y):
        codes, scale = _slow(vector, scale_dtype)
        assert torch.equal(row, (torch.tensor(codes).float() * scale).to(dtype))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("scale_dtype", list(STORED))
def test_zeros_small_and_large(scale_dtype: str) -> None:
    x = torch.zeros(4, 32)
    x[1], x[2], x[3] = 1e-5, 1e4, -1e4
    y = kv4_dequantize(kv4_quantize(x, scale_dtype), 32, torch.float32)
    assert y.isfinite().all()
    assert y[0].count_nonzero() == 0
    if scale_dtype == "bfloat16":
        torch.testing.assert_close(y, x, rtol=5e-3, atol=0)
    else:  # saturates at 8 * 448, and below 2^-10 there is nothing
        assert y[1].count_nonzero() == 0
        assert y[2].eq(3584).all()
        assert y[3].eq(-3584).all()


@pytest.mark.usefixtures("backend")
def test_the_largest_magnitude_has_the_code_that_only_one_sign_has() -> None:
    x = torch.linspace(-0.9, 1.0, 64).repeat(4, 1) * torch.tensor([[1.0], [-1.0], [0.0], [1.0]])
    x[3, 0] = -1.0  # two of one magnitude: the scale is positive
    packed = kv4_quantize(x)
    scales = packed[:, 32:].clone().view(torch.bfloat16).flatten()
    assert scales.sign().tolist() == [-1, 1, 0, 1]
    assert not scales[2].signbit()
    assert (packed[:2, 31] >> 4).tolist() == [0, 0]
    error = (kv4_dequantize(packed, 64, torch.float32) - x)[:2, 5:]
    assert error.abs().max() <= 1 / 16 + 1e-3


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(0, 64), (1, 2, 0, 64), (64,), (2, 8, 5, 128)])
def test_shapes(shape: tuple[int, ...]) -> None:
    packed = kv4_quantize(torch.randn(shape))
    assert packed.shape == (*shape[:-1], shape[-1] // 2 + 2)
    assert kv4_dequantize(packed, shape[-1]).shape == shape


@pytest.mark.usefixtures("backend")
def test_packed_vectors_can_be_cut_and_joined() -> None:
    x = torch.randn(2, 6, 10, 64)
    packed = kv4_quantize(x)
    whole = kv4_dequantize(packed, 64)
    joined = torch.cat((packed[:, :, 4:], packed[:, :, :4]), dim=2)
    torch.testing.assert_close(kv4_dequantize(joined, 64), whole.roll(-4, dims=2))
    torch.testing.assert_close(kv4_dequantize(packed.transpose(1, 2), 64), whole.transpose(1, 2))


def test_opcheck() -> None:
    x = torch.randn(2, 3, 64)
    torch.library.opcheck(torch.ops.quantkit.kv4_quantize.default, (x, "float8_e4m3fn"))
    arguments = (kv4_quantize(x), 64, torch.float16)
    torch.library.opcheck(torch.ops.quantkit.kv4_dequantize.default, arguments)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"D even.*\(2, 63\)"):
        kv4_quantize(torch.zeros(2, 63))
    with pytest.raises(ValueError, match="scale_dtype must be one of"):
        kv4_quantize(torch.zeros(2, 64), "float16")
    with pytest.raises(ValueError, match=r"uint8 \(2, 64\)"):
        kv4_dequantize(torch.zeros(2, 64, dtype=torch.uint8), 64)
