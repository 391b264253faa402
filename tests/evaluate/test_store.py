import json
import shutil
from pathlib import Path

import pytest

from quantkit.evaluate.store import keep, merge, stored


def result(text: str, value: float, baseline: str | None = "original") -> dict:
    return {
        "model": "m",
        "ppl": {text: {"ppl": value}},
        "baseline": {text: {"ppl": 1.0}} if baseline else None,
        "divergence": None,
        "baseline_model": baseline,
        "seconds": value,
    }


def test_texts_add_up_and_the_latest_counts():
    both = merge(merge(merge({}, result("a", 1)), result("b", 2)), result("a", 3))
    assert both["ppl"] == {"a": {"ppl": 3}, "b": {"ppl": 2}}
    assert set(both["baseline"]) == {"a", "b"}
    assert merge(both, {"model": "m", "ppl": {}, "baseline_model": "original",
                        "tasks": {"m": {"t": {"acc": 1.0}}}})["ppl"] == both["ppl"]  # fmt: skip


def test_another_original_starts_anew():
    assert set(merge(result("a", 1), result("b", 2, "other"))["ppl"]) == {"b"}


def test_only_into_folders_of_ours(quantized, tiny, tmp_path: Path):
    assert keep(result("a", 1), tiny()) is None
    ours = Path(shutil.copytree(quantized("int4"), tmp_path / "ours"))
    (ours / "quantkit" / "eval.json").unlink(missing_ok=True)
    assert stored(ours) is None
    path = keep(result("a", 1), ours)
    assert path is not None
    assert json.loads(path.read_text())["ppl"] == {"a": {"ppl": 1}} == stored(ours)["ppl"]
    path.write_text("{")
    assert stored(ours) is None
    assert keep(result("b", 2), ours) is not None


def test_a_folder_that_cannot_be_written(
    quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ours = Path(shutil.copytree(quantized("int4"), tmp_path / "ours"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert keep(result("a", 1), ours) is None
