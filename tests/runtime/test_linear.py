"""A packed linear of every width computes what its codes and scales say."""

import pytest
import torch

from quantkit.formats.packed import expected_tensors, packed_tensors
from quantkit.formats.scheme import ActivationFormat, Scheme, WeightFormat
from quantkit.runtime.linear import QuantLinear, stack

ROWS, COLUMNS = 48, 384
SCHEMES = [
    Scheme(WeightFormat(bits, group, half=half), acts, rotation)
    for bits in range(2, 9)
    for group, half, acts, rotation in [
        (128, False, None, None),
        (None, False, None, None),
        (32, False, ActivationFormat(8), None),
        (None, False, ActivationFormat(8), None),
        (128, False, ActivationFormat(8, "float"), None),
        (128, False, ActivationFormat(8, "float"), 128),
        (None, False, ActivationFormat(8), 128),
        (128, False, ActivationFormat(4), 128),
        (128, True, ActivationFormat(bits, half=True), 128),
        (128, True, ActivationFormat(8, half=True), 384),
        (None, True, ActivationFormat(8, half=True), None),
    ]
]


def linear_of(scheme: Scheme, seed: int = 0) -> tuple[QuantLinear, torch.Tensor]:
    """A layer with random codes, and the weight float64 [N, K] that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    bits, groups = scheme.weights.bits, COLUMNS // (scheme.weights.group_size or COLUMNS)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (ROWS, COLUMNS), generator=generator, dtype=torch.int8)
    scale = (torch.rand(ROWS, groups, generator=generator) + 0.1).bfloat16().float() / 2**bits
    linear = QuantLinear(COLUMNS, ROWS, True, scheme)
    tensors = packed_tensors(codes, scale, scheme)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        n: shape for n, (_, shape) in expected_tensors(scheme, ROWS, COLUMNS).items()
    }
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored == scheme.packed_bytes(ROWS, COLUMNS)
    for name, tensor in tensors.items():
        setattr(linear, name, tensor)
    linear.bias = torch.randn(ROWS, generator=generator)
    values = codes.double() + (0.5 if scheme.weights.half else 0.0)
    return linear, values * scale.double().repeat_interleave(COLUMNS // groups, 1)


def read(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What the product sees of x, in float64, written down from the definitions."""
    from quantkit.kernels.hadamard_matrices import hadamard_matrix

    x, acts, block = x.double(), scheme.activations, scheme.rotation
    if block:
        matrix = hadamard_matrix(block, x.device).double() / block**0.5
        x = (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2)
    if acts is None:
        return x
    if acts.half:
        from quantkit.methods.quest import fake_quantize

        return fake_quantize(x, acts.bits)
    top = x.abs().amax(-1, keepdim=True)
    if acts.type == "float":
        return (x / top * 448).float().to(torch.float8_e4m3fn).double() * top / 448
    largest, steps = 2 ** (acts.bits - 1) - 1, 127 if acts.bits == 8 else 7.5
    return (x / top * steps).round().clamp(-largest, largest) * top / steps


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_width(scheme: Scheme):
    """As stored and repacked, alone and stacked."""
    x = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(1))
    linear, weight = linear_of(scheme)
    want = read(x, scheme) @ weight.T + linear.bias
    # An activation on the edge between two codes may fall on either side.
    near = 1e-5 if scheme.activations is None else 2e-2

    def close(got: torch.Tensor) -> bool:
        return float((got.double() - want).norm() / want.norm()) < near

    assert close(linear(x))
    linear.prepare()
    assert close(linear(x))
    linear.prepare()
    assert close(linear(x)), "a second call changed it"
    other, lower = linear_of(scheme, seed=2)
    joined = stack([linear_of(scheme)[0], other])
    joined.prepare()
    got = joined(x)
    assert close(got[..., :ROWS])
    more = read(x, scheme) @ lower.T + joined.bias[ROWS:]
    assert float((got[..., ROWS:].double() - more).norm() / more.norm()) < near


@pytest.mark.parametrize("bits", range(2, 9))
def test_in_bf16(bits: int):
    scheme = Scheme(WeightFormat(bits, 128))
    linear, weight = linear_of(scheme)
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    linear.prepare()
    want = x.double() @ weight.T + linear.bias
    got = linear(x)
    assert got.dtype == torch.bfloat16
    assert float((got.double() - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize(
    "scheme", [s for s in SCHEMES if s.rotation and s.activations and s.activations.bits == 8], ids=str
)  # fmt: skip
def test_a_rotated_input_is_rounded_once(scheme: Scheme):
    """To codes, not to bf16 before; what is left is the output's own rounding, and codes at an edge."""
    linear, weight = linear_of(scheme)
    x = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    linear.prepare()
    want = read(x, scheme) @ weight.T + linear.bias
    assert float((linear(x).double() - want).norm() / want.norm()) < 4e-3
