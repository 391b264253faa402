import pytest
import torch
from quantkit.kernels import gpu_layout
from quantkit.kernels.int4_fp8_linear import int4_fp8_linear
from quantkit.kernels.int4_linear import int4_linear
from quantkit.kernels.packing import pack_int4
from quantkit.kernels.quantize_fp8 import quantize_fp8

E4M3 = torch.float8_e4m3fn


LAYOUTS = [(torch.bfloat16, torch.int16), (torch.int8, torch.int8), (E4M3, torch.uint8)]


@pytest.mark.parametrize(("activations", "layout"), LAYOUTS)
@pytest.mark.parametrize("lowest", [-8, -7])
@pytest.mark.parametrize(("n", "k", "group"), [(3, 128, 128), (16, 512, 64), (5, 768, 256)])
def test_round_trip(n: int, k: int, group: int, lowest: int, activations, layout) -> None:
    codes = torch.randint(lowest, 8, (n, k), dtype=torch.int8)
    codes[0, 0] = lowest
    scale = torch.rand(n, k // group)
    repacked = gpu_layout.repack(pack_int4(codes), scale, activations)
    assert repacked is not None
    if activations == E4M3 and lowest == -8:  # which is no FP8 number here
        layout = torch.int16
    assert repacked[0].dtype == layout
    assert repacked[0].is_contiguous()
    assert gpu_layout.inputs(repacked[0]) == k
    assert torch.equal(gpu_layout.unpack(repacked[0], group), codes)
    assert torch.equal(repacked[1], scale)


def test_signs_are_fp8_numbers() -> None:
    """What the kernel does: mask, or rotate the word and mask, and read the bytes as e4m3."""
    codes = torch.randint(-7, 8, (4, 128), dtype=torch.int8)
    repacked = gpu_layout.repack(pack_int4(codes), torch.ones(4, 1), E4M3)
    assert repacked is not None
    words = repacked[0].view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rotated = ((words << 4) | (words >> 28)) & 0xFFFFFFFF
    for word, half in ((rotated, codes[:, :64]), (words, codes[:, 64:])):
        numbers = (word & 0x87878787).to(torch.uint32).view(torch.float8_e4m3fn)
        assert torch.equal(numbers.float() * 512, half.float())


def test_groups_that_no_kernel_takes() -> None:
    assert gpu_layout.repack(torch.zeros(2, 32, dtype=torch.int32), torch.ones(2, 8), E4M3) is None


@pytest.mark.parametrize("activations", [torch.bfloat16, torch.int8, E4M3])
def test_the_reference_reads_them(
    activations: torch.dtype, int4_weight, relative_error, monkeypatch
) -> None:
    monkeypatch.setenv("QUANTKIT_BACKEND", "reference")
    weight = int4_weight(32, 256, 128)
    weight.codes.clamp_(min=-7)
    repacked = gpu_layout.repack(weight.packed, weight.scale, activations)
    assert repacked is not None
    x8, scale = quantize_fp8(torch.randn(3, 256))
    want = int4_fp8_linear(x8, scale, weight.packed, weight.scale)
    assert torch.equal(int4_fp8_linear(x8, scale, *repacked), want)


def test_large_layers_are_repacked_in_parts(monkeypatch) -> None:
    codes = torch.randint(-7, 8, (700, 128), dtype=torch.int8)
    monkeypatch.setattr(gpu_layout, "_PART", 999 * 128)
    whole = gpu_layout.repack(pack_int4(codes), torch.ones(700, 1), E4M3)
    parts = gpu_layout.repack(pack_int4(codes).repeat(3, 1), torch.ones(2100, 1), E4M3)
    assert whole is not None
    assert parts is not None
    assert torch.equal(parts[0], whole[0].repeat(3, 1))


def test_groups_that_no_kernel_takes_are_refused_in_a_gpu_layout() -> None:
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="groups of 64 n inputs, not 32"):
        int4_linear(x, torch.zeros(4, 16, dtype=torch.int16), torch.ones(4, 2))
