import pytest
import torch
from quantkit.kernels import int4pack
from quantkit.kernels.cpu import linear
from quantkit.kernels.packing import unpack_int4

needs_native = pytest.mark.skipif(
    not int4pack.supported(), reason="the native INT4 layout of this CPU is not understood"
)


def test_supported_on_x86() -> None:
    if torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2"):
        assert int4pack.supported()


@needs_native
@pytest.mark.parametrize("n", [16, 32, 48, 64, 80, 112, 128, 320])
@pytest.mark.parametrize("k", [32, 128, 1024])
def test_unpack_inverts_repack(n: int, k: int, int4_weight) -> None:
    weight = int4_weight(n, k, min(k, 128))
    repacked = int4pack.repack(weight.packed, weight.scale)
    assert repacked is not None
    packed, scales_and_zeros = repacked
    assert packed.dtype == torch.uint8
    assert packed.shape == (n, k // 2)
    assert scales_and_zeros.shape == (k // min(k, 128), n, 2)
    assert torch.equal(int4pack.unpack(packed), weight.codes)


@needs_native
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, 384, 768])
def test_native_product(half: bool, group: int, int4_weight, relative_error) -> None:
    weight = int4_weight(80, 768, group)
    repacked = int4pack.repack(weight.packed, weight.scale, half)
    assert repacked is not None
    packed, scales_and_zeros = repacked
    x = torch.randn(3, 768).bfloat16()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, packed, 768 // len(scales_and_zeros), scales_and_zeros
    )
    assert relative_error(y, x.double() @ weight.dense(half).t()) < 3e-3


@pytest.mark.parametrize(("n", "group"), [(24, 128), (64, 16)])
def test_what_the_native_op_cannot_take(n: int, group: int, int4_weight) -> None:
    weight = int4_weight(n, 256, group)
    assert int4pack.repack(weight.packed, weight.scale) is None


def test_unknown_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose blocks are none that we know: every probe fails."""

    def unknown(rows: int, probe_rows: int) -> None:
        raise LookupError

    int4pack.supported.cache_clear()
    int4pack._full_block.cache_clear()
    monkeypatch.setattr(int4pack, "_probe", unknown)
    assert not int4pack.supported()
    monkeypatch.undo()
    int4pack.supported.cache_clear()


@pytest.mark.parametrize(("n", "k"), [(64, 32), (64, 256), (192, 4104), (1600, 128)])
def test_the_native_repacking_gives_what_torchs_does(n: int, k: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32)
    packed = linear.pack_int4(words)
    if packed is None:
        pytest.skip("no C++ compiler, or no AVX-512-BF16")
    unsigned = unpack_int4(words).add(8).to(torch.int32)
    wanted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    assert torch.equal(packed, wanted)
