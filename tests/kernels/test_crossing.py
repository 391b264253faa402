import json

import pytest
from quantkit.kernels import int4pack
from quantkit.kernels.cpu import crossing

needs_native = pytest.mark.skipif(
    not int4pack.supported(), reason="the native INT4 layout of this CPU is not understood"
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    crossing.crossing_rows.cache_clear()
    yield
    crossing.crossing_rows.cache_clear()


@needs_native
def test_measured_once_and_kept(monkeypatch, tmp_path) -> None:
    rows = crossing.crossing_rows()
    assert rows in (1, 2, 4, 8, 16, 32, 64)
    assert list(json.loads((tmp_path / "int4pack_rows.json").read_text()).values()) == [rows]
    crossing.crossing_rows.cache_clear()
    monkeypatch.setattr(crossing, "_measure", lambda: pytest.fail("measured again"))
    assert crossing.crossing_rows() == rows


@pytest.mark.parametrize("content", ["", "[]", '{"other": 4}', "{", '{"a": null}'])
def test_a_broken_or_foreign_cache_is_measured_anew(monkeypatch, tmp_path, content) -> None:
    (tmp_path / "int4pack_rows.json").write_text(content)
    monkeypatch.setattr(crossing, "_measure", lambda: 8)
    assert crossing.crossing_rows() == 8


def test_the_largest_size_at_which_the_native_product_wins(monkeypatch) -> None:
    seconds = iter([1, 2, 1, 2, 3, 2])
    monkeypatch.setattr(crossing, "_seconds", lambda run: next(seconds))
    if int4pack.supported():
        assert crossing._measure() == 4


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(crossing, "_measure", lambda: 2)
    assert crossing.crossing_rows() == 2
