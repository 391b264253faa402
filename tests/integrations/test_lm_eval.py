"""lm-eval's own `--model hf --model_args pretrained=DIR`, once quantkit is imported."""

from pathlib import Path

import pytest
from local_task import lm_eval, task_file

from quantkit.evaluate.tasks import run_tasks
from quantkit.models.tokenizer import load_tokenizer
from quantkit.runtime.fusion import LinearPart
from quantkit.runtime.load import load


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fireq", "quest-hadamard"])
def test_a_checkpoint_by_its_folder(quantized, tmp_path: Path, recipe: str):
    library = lm_eval()
    folder, task = quantized(recipe), str(task_file(tmp_path))
    found = library.simple_evaluate(
        model="hf", model_args=f"pretrained={folder}", tasks=[task], device="cpu", batch_size=2
    )
    want = run_tasks(load(folder), load_tokenizer(folder), [task])
    assert found["results"]["lines"]["acc,none"] == want["lines"]["acc,none"]
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu").model
    assert any(isinstance(module, LinearPart) for module in model.modules())
