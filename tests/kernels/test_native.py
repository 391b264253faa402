"""The C++ products and quantizers against float64, and what happens where they cannot be had."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from quantkit.kernels import int4pack
from quantkit.kernels.cpu import linear, native, rows
from quantkit.kernels.int4_fp8_linear import int4_fp8_linear
from quantkit.kernels.quantize_fp8 import quantize_fp8
from quantkit.kernels.quantize_half import quantize_half
from quantkit.kernels.quantize_int8 import quantize_int8

needs_library = pytest.mark.skipif(
    native.level() == 0, reason="no C++ compiler, or no AVX-512-BF16"
)
# One and few rows, a panel's edge, several panels, more than a chunk; K over one slab of 1024.
INT4_SHAPES = [
    *((m, 128, 256, 128) for m in (1, 2, 3, 4, 5, 15, 16, 17, 33, 100)),
    *((m, 64, 2304, 256) for m in (1, 20, 300)),
    *((m, 1216, 1280, 128) for m in (1, 7)),
    *((9, 64, 128, group) for group in (32, 64, 128)),
    *((81, 192, 1792, group) for group in (32, 64, 256)),
    (6, 64, 1536, 1536),
]
INT8_SHAPES = [
    *((m, 128, 320) for m in (1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 65, 290)),
    *((m, 64, 2240) for m in (1, 40)),
]


@pytest.fixture(params=[1, 2], ids=["avx512", "amx"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    if native.level() < request.param:
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(native, "level", lambda: request.param)
    return request.param


def _codes(kind: str, m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as an op gets them, and the float64 values they stand for."""
    if kind == "bf16":
        x = torch.randn(m, k).bfloat16()
        return x, x.double()
    if kind == "fp8":
        x = (torch.randn(m, k) * torch.randn(m, k).exp()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return x, x.double()
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    return x, x.double() + (0.5 if kind == "half" else 0.0)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no AVX-512-BF16")
def test_the_library_is_there_where_it_can_be() -> None:
    """What does not compile would skip the other tests."""
    assert native.level() > 0
    assert (native.level() == 2) == torch.cpu._is_amx_tile_supported()


@needs_library
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8", "half"])
@pytest.mark.parametrize(("m", "n", "k", "group"), INT4_SHAPES)
def test_int4(m, n, k, group, kind, int4_weight, relative_error) -> None:
    half = kind == "half"
    weight = int4_weight(n, k, group)
    repacked = int4pack.repack(weight.packed, weight.scale, half)
    assert repacked is not None
    x, values = _codes(kind, m, k)
    row_scale, bias = torch.rand(m, 1) + 0.5, torch.randn(n)
    expected = (values @ weight.dense(half).t()) * row_scale.double() + bias.double()
    y = linear.int4(x, *repacked, row_scale, bias, torch.float32, half)
    assert y is not None
    assert relative_error(y, expected) < 2e-6
    plain = linear.int4(x, *repacked, None, None, torch.bfloat16, half)
    assert plain is not None
    assert relative_error(plain, values @ weight.dense(half).t()) < 3e-3


@needs_library
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("m", "n", "k"), INT8_SHAPES)
def test_int8(m, n, k, relative_error) -> None:
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale, row_scale, bias = torch.rand(n, 1).bfloat16(), torch.rand(m, 1) / 1024, torch.randn(n)
    expected = (x.double() @ weight.double().t()) * row_scale.double() * scale.double().t()
    y = linear.int8(x, weight, scale, row_scale, bias, torch.float32)
    assert y is not None
    assert relative_error(y, expected + bias.double()) < 1e-6
    half = linear.int8(x, weight, scale, row_scale, None, torch.float16)
    assert half is not None
    assert relative_error(half, expected) < 1e-3


@needs_library
def test_every_thread_count_gives_the_same(int4_weight) -> None:
    # 25 blocks: whole strips of 8 blocks a thread, and a partial one.
    weight = int4_weight(1600, 2304, 128)
    repacked = int4pack.repack(weight.packed, weight.scale)
    assert repacked is not None
    x = torch.randn(300, 2304).bfloat16()
    codes = x.clamp(-4, 4).mul(30).to(torch.int8)
    # With AMX: exact sums of bf16, scaled weights, bytes.
    for inputs, dtype in ((x, torch.float32), (x, torch.bfloat16), (codes, torch.float32)):
        torch.set_num_threads(1)
        expected = linear.int4(inputs, *repacked, None, None, dtype)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for _ in range(10):
                assert torch.equal(linear.int4(inputs, *repacked, None, None, dtype), expected)


@needs_library
def test_between_products_of_torch(int4_weight) -> None:
    """Tiles are configured per thread: neither side may be left with the other's."""
    weight = int4_weight(64, 128, 128)
    repacked = int4pack.repack(weight.packed, weight.scale)
    assert repacked is not None
    x = torch.randn(40, 128).bfloat16()
    dense = torch.randn(256, 128).bfloat16()
    before = x @ dense.t()
    for _ in range(3):
        linear.int4(x, *repacked, None, None, torch.bfloat16)
        assert torch.equal(x @ dense.t(), before)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 96), (64, 1000)])
def test_quantizers_equal_their_references(shape, dtype) -> None:
    x = (torch.randn(shape) * torch.randn(shape).exp() ** 3).to(dtype)
    for op, extra in ((quantize_fp8, ()), (quantize_int8, (8,)), (quantize_int8, (4,))):
        codes, scale = op(x, *extra)
        expected, expected_scale = op.reference(x, *extra)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    for bits in (1, 4, 8):
        codes, step = quantize_half(x, bits)
        expected, expected_step = quantize_half.reference(x, bits)
        # The mean square is summed in another order: a code at a step's very edge may differ.
        torch.testing.assert_close(step, expected_step, rtol=1e-6, atol=0)
        assert (codes != expected).sum() <= 1


@needs_library
def test_float8_of_every_bf16_value() -> None:
    every = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16).float()
    x = torch.cat((every[every.isfinite()].clamp(-448, 448), torch.tensor([448.0])))[None]
    found = rows.quantize(x, rows.FLOAT8, -448.0, 448.0, 448.0)
    assert found is not None
    assert found[1].item() == 1.0
    assert torch.equal(found[0].view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@needs_library
def test_nan_infinity_and_zero_rows() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0], [0.0, 0.0, 0.0], [float("inf"), 1.0, -2.0]])
    codes, scale = quantize_fp8(x)
    assert scale[0].isnan()
    assert codes[0, 1].float().isnan()
    assert scale[1] == 0
    assert (codes[1].float() == 0).all()
    assert scale[2].isinf()
    strided = torch.randn(6, 64).t()
    assert torch.equal(quantize_int8(strided)[0], quantize_int8(strided.contiguous())[0])


def test_without_the_library_torch_serves(monkeypatch, int4_weight, relative_error) -> None:
    weight = int4_weight(64, 256, 128)
    repacked = int4pack.repack(weight.packed, weight.scale)
    if repacked is None:
        pytest.skip("torch's native INT4 layout is not known on this machine")
    monkeypatch.setattr(native, "library", lambda: None)
    assert (
        linear.int4(torch.randn(3, 256).bfloat16(), *repacked, None, None, torch.bfloat16) is None
    )
    for m in (1, 100):
        x8, x_scale = quantize_fp8(torch.randn(m, 256))
        expected = (x8.double() @ weight.dense().t()) * x_scale.double()
        assert relative_error(int4_fp8_linear(x8, x_scale, *repacked), expected) < 5e-3


@pytest.fixture
def _fresh() -> None:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_switched_off_or_without_a_compiler(monkeypatch, caplog) -> None:
    monkeypatch.setenv(native.ENV, "0")
    assert native.library() is None
    assert not caplog.records
    native.library.cache_clear()
    monkeypatch.delenv(native.ENV)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        assert native.library() is None
    assert "no C++ compiler" in caplog.text


@pytest.mark.usefixtures("_fresh")
@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_compiler_that_fails_is_reported_and_leaves_nothing(
    monkeypatch, caplog, tmp_path
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho half > "${@: -1}"\necho broken >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        assert native.library() is None
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.usefixtures("_fresh")
@needs_library
def test_compiled_once_into_a_private_folder(monkeypatch, tmp_path) -> None:
    # What the real compiler made for the other tests is what this one makes.
    ready, compiler = native.library()._name, tmp_path / "c++"
    compiler.write_text(f'#!/bin/bash\n[ "$1" = --version ] || cp "{ready}" "${{@: -1}}"\n')
    compiler.chmod(0o755)
    native.library.cache_clear()
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    assert native.library() is not None
    built = list((tmp_path / "native").glob("*.so"))
    assert len(built) == 1
    assert stat.S_IMODE(Path(tmp_path / "native").stat().st_mode) == 0o700
    written = built[0].stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert built[0].stat().st_mtime_ns == written


@needs_library
def test_strided_scales_and_an_empty_batch(int4_weight) -> None:
    weight = int4_weight(64, 128, 128)
    repacked = int4pack.repack(weight.packed, weight.scale)
    assert repacked is not None
    x8, scale = quantize_fp8(torch.randn(8, 128))
    strided = scale.expand(8, 3)[:, :1]
    wanted = int4_fp8_linear(x8, scale, *repacked)
    assert torch.equal(int4_fp8_linear(x8[::2], strided[::2], *repacked), wanted[::2])
    assert int4_fp8_linear(x8[:0], scale[:0], *repacked).shape == (0, 64)
