import sys
from pathlib import Path

import pytest
from local_task import lm_eval, task_file

from quantkit.errors import QuantkitError
from quantkit.evaluate.tasks import run_tasks
from quantkit.models.tokenizer import load_tokenizer
from quantkit.runtime.load import load


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(QuantkitError, match="pip install"):
        run_tasks(None, None, ["anything"])


def test_a_local_task(quantized, tmp_path: Path):
    lm_eval()
    folder = quantized("fireq")
    found = run_tasks(load(folder), load_tokenizer(folder), [str(task_file(tmp_path))], limit=3)
    assert 0 <= found["lines"]["acc,none"] <= 1


def test_an_unknown_task(quantized, tmp_path: Path):
    lm_eval()
    for task, says in (
        ("no_such_task", "knows no such task"),
        (str(tmp_path / "a.yaml"), "no such task file"),
    ):
        with pytest.raises(QuantkitError, match=says):
            run_tasks(None, None, [task])
