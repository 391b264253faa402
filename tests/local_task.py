"""A task of lm-eval's on local data, for the tests that run it."""

import json
from pathlib import Path
from typing import Any

import pytest


def lm_eval() -> Any:
    """The library; a test that needs it is skipped where it is not installed."""
    return pytest.importorskip("lm_eval", reason="lm-eval is an extra")


def task_file(folder: Path) -> Path:
    """A task of six multiple-choice questions."""
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
