"""The plan: what would be cut by tensor parallelism, what fits, and whether its memory estimate is true."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from quantkit import Recipe, quantize
from quantkit.errors import QuantkitError
from quantkit.estimate import Estimate, choose_offload
from quantkit.plan import make_plan

CPU = torch.device("cpu")


def test_what_tensor_parallelism_would_cut(tiny):
    whole = make_plan(str(tiny()), Recipe.load("int4")).whole
    assert whole[1] == ""
    assert whole[2] == "384 / 2 inputs of mlp.down_proj are no whole groups of 128"
    assert whole[4] == "2 KV heads do not divide by 4"
    assert make_plan(str(tiny()), Recipe.load("int8")).whole[2] == ""
    small = Recipe.load("int4", ["weights.group_size=64"])
    assert make_plan(str(tiny()), small).whole[2] == ""


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_what_is_missing_outside_the_layers_is_said_first(tmp_path: Path, name: str):
    """transformers would draw an output layer at random that the checkpoint neither has nor ties."""
    model = save_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors[name]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantkitError, match=f"tensor '{name}' is missing"):
        make_plan(str(model), Recipe.load("int4"))


def test_modules_add_up(tiny):
    plan = make_plan(str(tiny()), Recipe.load("fireq"))
    modules = plan.module_bytes().values()
    assert sum(m["before"] for m in modules) == plan.linear_bytes[0]
    assert sum(m["after"] for m in modules) == plan.linear_bytes[1]


@pytest.mark.parametrize(
    ("available", "wish", "gives"),
    [(100, None, False), (60, None, True), (100, True, True), (60, False, None), (20, None, None)],
)
def test_where_activations_go(monkeypatch, available: int, wish, gives):
    from quantkit import memory

    monkeypatch.setattr(memory, "available", lambda: available)
    monkeypatch.setattr(memory, "resident", lambda: 10)
    need = Estimate(100, 0, 50, 0, 0.0)
    if gives is None:
        with pytest.raises(QuantkitError, match="of memory are needed"):
            choose_offload(need, wish, CPU)
    else:
        assert choose_offload(need, wish, CPU) is gives


def test_offloaded_activations_give_the_same_bytes(tiny, text, tmp_path: Path):
    files = []
    for offload in (False, True):
        out = tmp_path / str(offload)
        quantize(str(tiny()), "fireq", out, calib=str(text), samples=8, seqlen=64, offload=offload)
        files.append((out / "model.safetensors").read_bytes())
        assert not (out / ".unfinished").exists()
    assert files[0] == files[1]


CHILD = """
import json, sys
from quantkit import Recipe, memory, quantize
from quantkit.plan import make_plan
model, recipe, text, out = sys.argv[1:]
sizes = {"samples": 16, "seqlen": 256}
planned = make_plan(model, Recipe.load(recipe), **sizes).estimate.host_bytes
quantize(model, recipe, out, calib=text, **sizes)
print(json.dumps([planned, memory.peak()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int4", "fireq"])
@pytest.mark.parametrize("hidden", [1024, 2048])
def test_the_peak_is_as_planned(tmp_path: Path, text: Path, recipe: str, hidden: int):
    """The kernel's own record of a process that plans and quantizes."""
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 3, "head_dim": 128,
             "num_attention_heads": hidden // 128, "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip
    model = save_model(tmp_path / "model", **sizes)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= (
        0.05  # logits as a model's that knows nothing, for the sanity text
    )
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-c", CHILD, str(model), recipe, str(text), str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    planned, peak = json.loads(done.stdout.splitlines()[-1])
    assert planned == pytest.approx(peak, rel=0.15)
