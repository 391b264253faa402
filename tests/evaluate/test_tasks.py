import json
import sys
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.evaluate.tasks import run_tasks
from quantkit.pipeline import load_tokenizer
from quantkit.runtime.load import load


def task_file(folder: Path) -> Path:
    """A task of four multiple-choice questions on local data."""
    rows = [
        {"q": f"The {n}th line of", "choices": [" words", " xyzzy"], "gold": 0} for n in range(4)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "lines.yaml"
    path.write_text(
        "task: lines\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return path


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(QuantkitError, match="pip install"):
        run_tasks(None, None, ["anything"])


def test_a_local_task(quantized, tmp_path: Path):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    folder = quantized("fireq")
    found = run_tasks(load(folder), load_tokenizer(folder), [str(task_file(tmp_path))], limit=3)
    assert 0 <= found["lines"]["acc,none"] <= 1


def test_an_unknown_task(quantized, tmp_path: Path):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    for task, says in (
        ("no_such_task", "knows no such task"),
        (str(tmp_path / "a.yaml"), "no such task file"),
    ):
        with pytest.raises(QuantkitError, match=says):
            run_tasks(None, None, [task])
