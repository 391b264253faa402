"""Seconds of `quantkit plan` for models of 8B to 405B, of which only the headers are there.

    python benchmarks/plan.py

The files are sparse: they have the size of the real ones and take next to no disk. `command` is the whole process, from
its start to its end; in another one the plan is timed without the imports of torch and transformers. Results go to
benchmarks/results/plan.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COMMAND = Path(sys.executable).with_name("quantkit")
RESULTS = Path(__file__).parent / "results" / "plan.json"
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "head_dim": 128,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama 8B": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "Llama 70B": _LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "Llama 405B": _LLAMA | {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
    },
    "Qwen3 235B, 128 experts": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936,
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "dtype": "bfloat16", "tie_word_embeddings": False,
    },
}  # fmt: skip
_CHILD = """
import json, sys, time
import torch
import transformers.modeling_utils
from transformers import AutoModelForCausalLM
from quantkit.plan import make_plan
from quantkit.recipe import Recipe
imported = time.perf_counter()
plan = make_plan(sys.argv[1], Recipe.load(sys.argv[2]))
print(json.dumps({"plan": time.perf_counter() - imported,
                  "linears": len(plan.schemes), "host_bytes": plan.estimate.host_bytes}))
"""


def write_headers(config: dict[str, Any], folder: Path) -> Path:
    """A checkpoint in bf16 whose weights were never written."""
    from quantkit.models.structure import build_skeleton, load_config

    model = build_skeleton(load_config(config, str(folder)), str(folder))
    header, at = {}, 0
    for name, parameter in model.named_parameters():
        end = at + 2 * parameter.numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, (label, config) in enumerate(MODELS.items()):
            folder = write_headers(config, Path(name) / str(number))
            size = (folder / "model.safetensors").stat().st_size
            for recipe in ("int4", "gptq"):
                command = [str(COMMAND), "plan", str(folder), "-r", recipe]
                started = time.perf_counter()
                subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
                took = time.perf_counter() - started
                command = [sys.executable, "-c", _CHILD, str(folder), recipe]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                row = {"model": label, "recipe": recipe, "checkpoint": size, "command": took}
                rows.append(row | json.loads(done.stdout.splitlines()[-1]))
                print(
                    f"{label:<24} {recipe:<5} {size / 1e9:6.0f} GB, {rows[-1]['linears']:>6} linears: "
                    f"command {took:.1f} s, the plan itself {rows[-1]['plan']:.1f} s, "
                    f"peak memory {rows[-1]['host_bytes'] / 1e9:.1f} GB",
                    flush=True,
                )
    RESULTS.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
