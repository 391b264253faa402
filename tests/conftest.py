"""Fixtures of all tests: tiny checkpoints and a text; offline."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and test processes side by side would wait for one another's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """model_type -> the folder of a tiny checkpoint, made once. Do not change it; copy it first."""
    made: dict[str, Path] = {}

    def get(model_type: str = "llama") -> Path:
        if model_type not in made:
            made[model_type] = save_model(tmp_path_factory.mktemp(model_type) / "model", model_type)
        return made[model_type]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 20,000 bytes: as many tokens for the tiny models."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"The {n}th line of {n * n % 97} words. " for n in range(700))[:20000],
        encoding="utf-8",
    )
    return path


@pytest.fixture
def change_json() -> Callable[..., None]:
    def change(path: Path, **changes: Any) -> None:
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    return change


@pytest.fixture(scope="session")
def quantized(
    tiny: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """(recipe, model_type, settings...) -> the folder of a quantized tiny checkpoint, made once."""
    from quantkit import Recipe, quantize

    made: dict[tuple[str, ...], Path] = {}

    def get(recipe: str, model_type: str = "llama", *settings: str) -> Path:
        key = (recipe, model_type, *settings)
        if key not in made:
            # What a refinement learns is tested elsewhere; here a few steps do.
            few = ["refine.steps=8"] if Recipe.load(recipe).refine else []
            folder = tmp_path_factory.mktemp("quantized") / f"{model_type}-{recipe}"
            quantize(
                str(tiny(model_type)),
                recipe,
                folder,
                calib=str(text),
                samples=16,
                seqlen=128,
                overrides=[*few, *settings],
            )
            made[key] = folder
        return made[key]

    return get
