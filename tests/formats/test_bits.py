import pytest
import torch

from quantkit.formats.bits import pack, packed_words, unpack

WIDTHS = range(1, 9)


def codes_of(bits: int, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + columns)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = low, high - 1
    return codes


@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 100, 384])
@pytest.mark.parametrize("bits", WIDTHS)
def test_there_and_back(bits: int, columns: int):
    codes = codes_of(bits, 3, columns)
    packed = pack(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.int32, (3, packed_words(columns, bits)))
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_is_one_stream_of_bits(bits: int):
    """Written with Python's integers, which have as many bits as they need."""
    codes = codes_of(bits, 2, 45)
    for row, words in zip(codes.tolist(), pack(codes, bits).tolist()):
        stream = sum((code + 2 ** (bits - 1)) << (k * bits) for k, code in enumerate(row))
        assert [w % 2**32 for w in words] == [
            (stream >> (32 * n)) % 2**32 for n in range(len(words))
        ]


@pytest.mark.parametrize("columns", [96, 100])
@pytest.mark.parametrize("bits", WIDTHS)
def test_as_compressed_tensors_packs(bits: int, columns: int):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of(bits, 4, columns)
    theirs = helpers.pack_to_int32(codes, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, columns), codes)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="1 to 8, got 9"):
        pack(torch.zeros(1, 8, dtype=torch.int8), 9)
    with pytest.raises(ValueError, match="3 words"):
        unpack(torch.zeros(1, 4, dtype=torch.int32), 3, 32)
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        pack(torch.zeros(8, dtype=torch.int8), 3)
