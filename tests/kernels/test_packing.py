import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkit.kernels.packing import pack_int4, unpack_int4


def test_word_layout() -> None:
    codes = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8)
    word = 0
    for k, q in enumerate(codes[0].tolist()):
        word |= (q + 8) << (4 * k)
    assert pack_int4(codes).item() == word - (1 << 32)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(0, 6), st.integers(0, 2**31))
def test_round_trip(n: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, 8 * words), dtype=torch.int8, generator=generator)
    packed = pack_int4(codes)
    assert packed.dtype == torch.int32
    assert packed.shape == (n, words)
    assert torch.equal(unpack_int4(packed), codes)


def test_same_as_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    assert torch.equal(pack_int4(codes), helpers.pack_to_int32(codes, 4))


def test_non_contiguous() -> None:
    codes = torch.randint(-8, 8, (64, 16), dtype=torch.int8).t()
    packed = pack_int4(codes)
    assert torch.equal(unpack_int4(packed), codes)
    row = torch.randint(-8, 8, (64, 1), dtype=torch.int8).t()
    assert torch.equal(unpack_int4(pack_int4(row)), row)
    assert torch.equal(unpack_int4(packed[:, ::2]), codes.reshape(16, 8, 8)[:, ::2].reshape(16, 32))


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"multiple of 8.*\(4, 12\)"):
        pack_int4(torch.zeros(4, 12, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"int8 \(4, 12\)"):
        unpack_int4(torch.zeros(4, 12, dtype=torch.int8))
