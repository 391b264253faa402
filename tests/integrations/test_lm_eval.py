"""lm-eval's own `--model hf --model_args pretrained=DIR`, once quantkit is imported."""

import json
from pathlib import Path

import pytest

from quantkit.evaluate.tasks import run_tasks
from quantkit.pipeline import load_tokenizer
from quantkit.runtime.fusion import LinearPart
from quantkit.runtime.load import load


def task_file(folder: Path) -> Path:
    """A task of multiple-choice questions on local data."""
    rows = [{"q": f"The {n}th line of", "choices": [" words", " ab"], "gold": 0} for n in range(6)]
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


@pytest.mark.parametrize("recipe", ["fireq", "quest-hadamard"])
def test_a_checkpoint_by_its_folder(quantized, tmp_path: Path, recipe: str):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    folder, task = quantized(recipe), str(task_file(tmp_path))
    found = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder}", tasks=[task], device="cpu", batch_size=2
    )
    want = run_tasks(load(folder), load_tokenizer(folder), [task])
    assert found["results"]["lines"]["acc,none"] == want["lines"]["acc,none"]
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu").model
    assert any(isinstance(module, LinearPart) for module in model.modules())
