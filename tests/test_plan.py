"""The plan: what would be cut by tensor parallelism, what fits, and whether its memory estimate is true."""

import gc
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


def test_cycles_are_collected_again_afterwards(tiny, tmp_path: Path):
    make_plan(str(tiny()), Recipe.load("int4"))
    assert gc.isenabled()
    with pytest.raises(QuantkitError):
        make_plan(str(tmp_path / "none"), Recipe.load("int4"))
    assert gc.isenabled()


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
            choose_offload(
                need, wish, CPU, lambda room: f"{room} bytes would do for another recipe"
            )
    else:
        assert choose_offload(need, wish, CPU, str) is gives


def test_what_cannot_fit_is_refused_with_a_setting_that_fits(tmp_path: Path, monkeypatch):
    from quantkit import memory

    here = 500 << 20
    monkeypatch.setattr(memory, "resident", lambda: here)
    sizes = {"intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = str(save_model(tmp_path / "model", hidden_size=512, **sizes))
    plan = make_plan(model, Recipe.load("gptq-refined"))
    refined, gptq, nearest = (
        need.host_bytes - need.activation_bytes
        for need in (
            plan.estimate,
            make_plan(model, Recipe.load("gptq-refined", ["refine=null"])).estimate,
            make_plan(
                model,
                Recipe.load("gptq-refined", ["refine=null", "weights.rounding=nearest"]),
            ).estimate,
        )
    )
    assert nearest < gptq < refined
    for room, words in (
        (gptq + 1000, r"--set refine=null needs \d+\.\d\d GB"),
        (nearest + 1000, r"--set refine=null --set weights\.rounding=nearest needs \d+\.\d\d GB"),
        (here, "a machine with more"),
    ):
        monkeypatch.setattr(memory, "available", lambda room=room: max(0, room - here))
        with pytest.raises(QuantkitError, match=f"of memory are needed.*{words}"):
            quantize(model, "gptq-refined")


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
model, recipe, text, out, samples, *changes = sys.argv[1:]
sizes = {"samples": int(samples), "seqlen": 256}
need = make_plan(model, Recipe.load(recipe, changes), **sizes).estimate
quantize(model, recipe, out, calib=text, overrides=changes, **sizes)
print(json.dumps([need.host_bytes, need.activation_bytes, memory.peak()]))
"""


def wide_model(folder: Path, hidden: int, variant: str = "llama", **changes: int) -> Path:
    """Its tensors are large enough to be seen beside what Python and torch take."""
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 3, "head_dim": 128,
             "num_attention_heads": hidden // 128, "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip
    model = save_model(folder, variant, **(sizes | changes))
    tensors = load_file(model / "model.safetensors")
    # Logits as a model's that knows nothing, for the sanity text.
    tensors["model.norm.weight"] *= 0.05
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def planned_and_peak(
    model: Path, recipe: str, text: Path, out: Path, *changes: str, samples: int = 16
) -> tuple[int, int, int]:
    """Bytes planned, the activations among them, and the kernel's own record of a process that plans and quantizes."""
    command = [sys.executable, "-c", CHILD, str(model), recipe, str(text), str(out), str(samples)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([*command, *changes], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    planned, activations, peak = json.loads(done.stdout.splitlines()[-1])
    return planned, activations, peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "setting", "model"),
    [
        ("int4", "", (2048, "llama", {})),
        ("fireq", "", (1024, "llama", {})),
        # The Hessians of its experts are a third of it, what is refined at once is half.
        ("gptq", "", (2048, "qwen3-moe", {"num_experts": 32, "moe_intermediate_size": 256})),
        ("gptq-refined", "refine.steps=2", (2048, "llama", {"intermediate_size": 2048, "vocab_size": 4000})),
        ("int4", "rotation={residual: true, inputs: none}", (2048, "llama", {})),
    ],
)  # fmt: skip
def test_the_peak_is_as_planned(tmp_path: Path, text: Path, recipe: str, setting: str, model):
    hidden, variant, sizes = model
    folder = wide_model(tmp_path / "model", hidden, variant, **sizes)
    changes = [setting] if setting else []
    planned, _, peak = planned_and_peak(folder, recipe, text, tmp_path / "out", *changes)
    print(f"planned {planned >> 20}, peak {peak >> 20} MB")
    assert planned == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_more_samples_take_their_activations_and_nothing_else(tmp_path: Path, text: Path):
    model = wide_model(tmp_path / "model", 1024)
    few = planned_and_peak(model, "gptq", text, tmp_path / "few", samples=8)
    many = planned_and_peak(model, "gptq", text, tmp_path / "many", samples=40)
    more = many[1] - few[1]
    assert more == 32 * 256 * 1024 * 4
    assert many[2] - few[2] < more + (24 << 20)
