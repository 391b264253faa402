import pytest
import torch
from quantkit.kernels import int4_weight as shared
from quantkit.kernels import int4pack
from quantkit.kernels.int4_linear import int4_linear

BOUND = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
SHAPES = [(1, 32, 128, 128), (3, 16, 14336, 128), (0, 32, 128, 128), (37, 48, 384, 128)]
SHAPES += [(65, 80, 256, 256), (5, 32, 96, 32), (2, 24, 128, 128), (1, 64, 2048, 64)]


@pytest.fixture(params=["stored", "repacked"])
def layout(request: pytest.FixtureRequest):
    def apply(weight, half: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        if request.param == "stored":
            return weight.packed, weight.scale
        repacked = int4pack.repack(weight.packed, weight.scale, half)
        if repacked is None:
            pytest.skip("the native op does not take this shape")
        return repacked

    return apply


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("m", "n", "k", "group"), SHAPES)
def test_against_float64(m, n, k, group, dtype, layout, int4_weight, relative_error) -> None:
    weight = int4_weight(n, k, group)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    y = int4_linear(x, *layout(weight), bias)
    assert y.dtype == dtype
    assert relative_error(y, x.double() @ weight.dense().t() + bias.double()) < BOUND[dtype]
    no_bias = int4_linear(x, *layout(weight))
    assert relative_error(no_bias, x.double() @ weight.dense().t()) < BOUND[dtype]


@pytest.mark.usefixtures("backend")
def test_per_channel(layout, int4_weight, relative_error) -> None:
    weight = int4_weight(48, 384, 384)
    x = torch.randn(4, 384).bfloat16()
    y = int4_linear(x, *layout(weight))
    assert relative_error(y, x.double() @ weight.dense().t()) < 5e-3


@pytest.mark.usefixtures("backend")
def test_batch_dimensions_and_strides(layout, int4_weight, relative_error) -> None:
    weight = int4_weight(32, 128, 128)
    x = torch.randn(128, 3, 2).bfloat16().permute(2, 1, 0)
    y = int4_linear(x, *layout(weight))
    assert y.shape == (2, 3, 32)
    assert y.is_contiguous()
    assert relative_error(y, x.double() @ weight.dense().t()) < 5e-3


@pytest.mark.usefixtures("backend")
def test_float32_scales_stay_exact(layout, int4_weight, relative_error) -> None:
    weight = int4_weight(32, 256, 128)
    weight.scale = torch.rand(32, 2) / 64
    x = torch.randn(4, 256)
    y = int4_linear(x, *layout(weight))
    assert relative_error(y, x.double() @ weight.dense().t()) < 1e-5


def test_decode_and_prefill_agree(int4_weight, relative_error) -> None:
    """torch's native product and the expanded one, on the same packed copy."""
    weight = int4_weight(80, 512, 128)
    repacked = int4pack.repack(weight.packed, weight.scale)
    if repacked is None:
        pytest.skip("no native layout here")
    x = torch.randn(8, 512).bfloat16()
    native, expanded = (shared.matmul(x, *repacked, native=native) for native in (True, False))
    assert relative_error(expanded, native) < 5e-3


def test_expands_in_tiles(monkeypatch, int4_weight, relative_error) -> None:
    weight = int4_weight(80, 512, 128)
    x = torch.randn(8, 512)
    monkeypatch.setattr(shared, "_TILE_BYTES", 32 * 512 * 4)
    y = int4_linear(x, weight.packed, weight.scale)
    assert relative_error(y, x.double() @ weight.dense().t()) < 1e-5


def test_opcheck(int4_weight) -> None:
    weight = int4_weight(32, 128, 128)
    arguments = (torch.randn(2, 3, 128), weight.packed, weight.scale, torch.randn(32))
    torch.library.opcheck(torch.ops.quantkit.int4_linear.default, arguments)


def test_compiles(int4_weight) -> None:
    weight = int4_weight(32, 128, 128)
    packed, scale = weight.packed, weight.scale

    def layer(x: torch.Tensor) -> torch.Tensor:
        return int4_linear(x * 2, packed, scale) + 1

    x = torch.randn(3, 128)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_bad_shapes(int4_weight) -> None:
    weight = int4_weight(32, 256, 128)
    x = torch.randn(2, 256)
    for arguments, message in [
        ((torch.randn(2, 128), weight.packed, weight.scale), r"x must be \[..., 256\].*\(2, 128\)"),
        ((x, weight.codes.long(), weight.scale), "weight must be int32"),
        ((x, weight.packed, weight.scale[:16]), r"scale must be \[N, G\].*\(16, 2\)"),
        ((x, weight.packed, weight.scale.expand(32, 2).repeat(1, 3)), "must divide K = 256"),
        ((x, weight.packed, weight.scale, torch.zeros(31)), r"bias must be \[32\].*\(31,\)"),
        ((x.long(), weight.packed, weight.scale), "x must be bf16, fp16 or float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            int4_linear(*arguments)
