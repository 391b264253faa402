import pytest
import torch
from quantkit.kernels.kv4 import kv4_quantize, planes
from quantkit.kernels.kv4_append import kv4_append

# batch, query heads, KV heads, tokens, head_dim, turned elements
SHAPES = [(2, 4, 2, 3, 128, 128), (1, 3, 1, 1, 80, 80), (2, 2, 2, 5, 64, 32), (1, 6, 2, 0, 32, 32)]


def _inputs(shape, dtype, extra=2, length=9):
    batch, heads, kv_heads, tokens, dim, turned = shape
    # As a projection gives them: tokens before heads.
    query = torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
    key, value = (
        torch.randn(batch, tokens, kv_heads, dim).to(dtype).transpose(1, 2) for _ in range(2)
    )
    angles = torch.rand(batch, tokens, turned // 2) * 6
    angles = torch.cat((angles, angles), dim=-1)
    size = (batch, kv_heads, length, dim // 2 + extra)
    caches = [torch.randint(0, 256, size, dtype=torch.uint8) for _ in range(2)]
    positions = torch.randperm(length)[:tokens]
    return query, key, value, angles.cos().to(dtype), angles.sin().to(dtype), *caches, positions


def _turn(x, cos, sin):
    """Pair by pair, in float64."""
    out, half = x.double().clone(), cos.shape[-1] // 2
    for i in range(half):
        a, b = x[..., i].double(), x[..., i + half].double()
        c, s = cos[:, None, :, i].double(), sin[:, None, :, i].double()
        out[..., i], out[..., i + half] = a * c - b * s, b * c + a * s
    return out


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_pairs(shape, dtype, relative_error) -> None:
    query, key, value, cos, sin, keys, values, positions = _inputs(shape, dtype)
    factor = torch.rand(shape[2], shape[4]) + 0.5
    before = keys.clone()
    out = kv4_append(query, key, value, cos, sin, keys, values, positions, factor)
    assert relative_error(out, _turn(query, cos, sin)) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert torch.equal(values[:, :, positions], kv4_quantize.reference(value))
    if dtype == torch.float32:
        expected = kv4_quantize.reference(_turn(key, cos, sin).float(), "bfloat16", factor)
        same = (keys[:, :, positions] == expected).float().mean() if expected.numel() else 1
        assert same > 0.999
    others = torch.tensor([i for i in range(keys.shape[2]) if i not in positions.tolist()])
    assert torch.equal(keys[:, :, others], before[:, :, others])


@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_gives_the_references_bits(shape, dtype, extra) -> None:
    inputs = _inputs(shape, dtype, extra)
    again = [t.clone() for t in inputs]
    out = kv4_append.implementations["cpu"](*inputs)
    assert torch.equal(out, kv4_append.reference(*again))
    assert torch.equal(inputs[5], again[5])
    assert torch.equal(inputs[6], again[6])


@pytest.mark.usefixtures("backend")
def test_a_part_of_a_longer_cache() -> None:
    query, key, value, cos, sin, keys, values, _ = _inputs((1, 2, 1, 3, 64, 64), torch.bfloat16)
    whole = torch.full((1, 1, 40, 34), 9, dtype=torch.uint8)
    part, positions = whole[:, :, 4:13], torch.arange(3)
    kv4_append(query, key, value, cos, sin, part, values, positions)
    kv4_append.reference(query, key, value, cos, sin, keys, values, positions)
    assert torch.equal(whole[:, :, 4:7], keys[:, :, :3])
    assert (whole[:, :, :4] == 9).all()
    assert (whole[:, :, 7:] == 9).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("position", [9, -1])
def test_slots_outside_the_cache_are_refused(position) -> None:
    inputs = list(_inputs((1, 2, 1, 1, 64, 64), torch.bfloat16))
    inputs[7] = torch.tensor([position])
    with pytest.raises((IndexError, RuntimeError)):
        kv4_append(*inputs)


@pytest.mark.parametrize(
    ("index", "wrong", "said"),
    [
        (1, torch.zeros(1, 1, 2, 64), "query must be"),
        (3, torch.zeros(1, 1, 66), "cos and sin"),
        (3, torch.zeros(1, 1, 64, dtype=torch.bfloat16), "one dtype"),
        (5, torch.zeros(1, 1, 9, 30, dtype=torch.uint8), "packed must be"),
        (5, torch.zeros(1, 2, 9, 34, dtype=torch.uint8), "caches"),
        (7, torch.zeros(2, dtype=torch.int64), "positions"),
        (8, torch.zeros(2, 64), "factor"),
    ],
)
def test_shapes_that_do_not_fit(index, wrong, said) -> None:
    inputs = [*_inputs((1, 2, 1, 1, 64, 64), torch.float32), None]
    inputs[index] = wrong
    with pytest.raises(ValueError, match=said):
        kv4_append(*inputs)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("extra", [1, 2])
def test_planar_holds_the_same_vectors(extra) -> None:
    inputs = _inputs((2, 4, 2, 3, 64, 64), torch.bfloat16, extra, length=16)
    again = [t.clone() for t in inputs]
    kv4_append(*inputs, None, True)
    kv4_append.reference(*again)
    positions = inputs[7]
    for planar, plain in zip(inputs[5:7], again[5:7], strict=True):
        codes, scales = planes(planar, 64, True)
        assert torch.equal(codes[:, :, positions], plain[:, :, positions, :32])
        assert torch.equal(scales[:, :, positions], plain[:, :, positions, 32:])


def test_a_planar_cache_must_be_whole() -> None:
    inputs = list(_inputs((1, 2, 1, 1, 64, 64), torch.float32))
    inputs[5] = inputs[5].new_zeros(1, 1, 20, 34)[:, :, :9]
    with pytest.raises(ValueError, match="sliced"):
        kv4_append(*inputs, None, True)
