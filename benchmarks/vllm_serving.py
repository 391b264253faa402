"""Every recipe served by vLLM: log-probabilities, clients, broken checkpoints, two ranks, a thousand requests.

    QUANTKIT_VLLM_PYTHON=/path/to/vllm/bin/python python benchmarks/vllm_serving.py [part...]

Parts: agree, stock, float32, clients, experts, broken, parallel, soak (all of them, if none is
named). The interpreter named is that of an environment with vLLM and quantkit; this script runs in quantkit's own.
Exits with 1 where a bar is missed. `-o FILE` puts what was found into a JSON file, beside what is there.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm_server import Scores, Server, vllm_python

from quantkit import load, quantize
from quantkit.calibration.data import read_text, tokenize
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.writer import save_tensors
from quantkit.models.names import bundled_path
from quantkit.models.tokenizer import load_tokenizer
from quantkit.recipe import recipe_names
from quantkit.servers import NATIVE, REFUSED, TRANSFORMERS, VLLM_CPU

CLIENT = Path(__file__).parent / "openai_client.py"
# Every row of the table in docs/serving.md.
RECIPES = (*recipe_names(), "fireq kv_cache=null")
WEIGHT_ONLY = {"int4", "gptq", "gptq-refined"}
WINDOWS, SEQLEN = 8, 500
# Mean absolute difference of log-probabilities; share of positions whose likeliest token is the same.
WEIGHT_BAR, ACTIVATION_BAR, GREEDY_BAR = 0.02, 0.08, 0.95
# How much further transformers alone may be from quantkit.load than that is from itself with its sums in another order.
ROUNDING = 1.25
# Share of the perplexity, at the most.
WEIGHTS_LOSE = 0.02


def windows() -> torch.Tensor:
    tokens = tokenize(load_tokenizer(bundled_path()), read_text("sample", split="test"))
    return tokens[: WINDOWS * SEQLEN].view(WINDOWS, SEQLEN)


@torch.no_grad()
def model_scores(model: Any, texts: torch.Tensor) -> Scores:
    logits = [model(text[None], use_cache=False).logits.float().log_softmax(-1) for text in texts]
    scores = torch.cat(logits)[:, :-1]
    return scores.gather(-1, texts[:, 1:, None])[..., 0], scores.argmax(-1)


def native_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of transformers with compressed-tensors, as where quantkit was not imported."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import auto
    from transformers.utils.quantization_config import CompressedTensorsConfig

    ours = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = CompressedTensorsConfig
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    finally:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = ours


def compare(a: Scores, b: Scores) -> dict[str, float]:
    return {
        "difference": round(float((a[0] - b[0]).abs().mean()), 4),
        "greedy": round(float((a[1] == b[1]).float().mean()), 4),
        "perplexity": round(float((-a[0].mean()).exp()), 3),
    }


class Run:
    """What was found, and what missed its bar."""

    def __init__(self, work: Path, recipes: Sequence[str]) -> None:
        self.work, self.texts, self.recipes = work, windows(), recipes
        self.rows: dict[str, Any] = {}
        self.missed: list[str] = []

    def checkpoint(self, recipe: str) -> Path:
        folder = self.work / recipe.replace(" ", "-")
        if not (folder / "config.json").is_file():
            name, *settings = recipe.split()
            quantize(str(bundled_path()), name, folder, overrides=settings, overwrite=True)
        return folder

    def note(self, part: str, name: str, **row: Any) -> None:
        self.rows.setdefault(part, {})[name] = row
        print(f"{part:9} {name:22} {json.dumps(row)}", flush=True)

    def demand(self, holds: bool, what: str) -> None:
        if not holds:
            self.missed.append(what)
            print(f"MISSED: {what}", flush=True)

    def demand_close(self, recipe: str, found: dict[str, float], how: str = "") -> None:
        """What was served is within the bars of quantkit.load."""
        bar = WEIGHT_BAR if recipe in WEIGHT_ONLY else ACTIVATION_BAR
        self.demand(
            found["difference"] <= bar, f"{recipe}{how}: difference {found['difference']} <= {bar}"
        )
        self.demand(
            found["greedy"] >= GREEDY_BAR,
            f"{recipe}{how}: greedy {found['greedy']} >= {GREEDY_BAR}",
        )


def agree(run: Run) -> None:
    """vLLM with the plugin beside quantkit.load, and beside what transformers alone makes of it.

    `own` is quantkit.load beside itself, its layers unfused and its attention over 16-bit keys the eager one: what
    another order of the same bf16 sums alone does.
    """
    for recipe in run.recipes:
        folder = run.checkpoint(recipe)
        own = model_scores(load(folder), run.texts)
        other = load(folder, fused=False)
        if other.config._attn_implementation == "sdpa":
            other.set_attn_implementation("eager")
        spread = compare(model_scores(other, run.texts), own)
        with Server(folder) as server:
            run.demand(server.ready(), f"{recipe}: the server starts")
            served = server.scores(run.texts)
            said = sorted(
                {line.partition("quantkit: ")[2] for line in server.output().splitlines()}
            )
        found = compare(served, own)
        row: dict[str, Any] = {"load": found, "own": spread, "log": [line for line in said if line]}
        report = json.loads((folder / "quantkit" / "report.json").read_text())
        if report["servers"][TRANSFORMERS].startswith(NATIVE):
            native = model_scores(native_model(folder), run.texts)
            row |= {"transformers": compare(served, native), "native": compare(own, native)}
        run.note("agree", recipe, **row)
        run.demand_close(recipe, found)
        if "native" in row:
            run.demand_close(recipe, row["transformers"], ", beside transformers alone")
            apart, order = row["native"]["difference"], spread["difference"]
            run.demand(
                apart <= ROUNDING * order,
                f"{recipe}: transformers alone {apart} from quantkit, bf16 rounds by {order}",
            )


def float32(run: Run) -> None:
    """All that rounds activations, keys or values, in float32 on both sides: without bf16 there is little left to differ."""
    for recipe in run.recipes:
        if recipe in WEIGHT_ONLY:
            continue
        folder = run.checkpoint(recipe)
        own = model_scores(load(folder, dtype=torch.float32), run.texts)
        with Server(folder, "--dtype", "float32") as server:
            run.demand(server.ready(), f"{recipe}: the server starts in float32")
            found = compare(server.scores(run.texts), own)
        run.note("float32", recipe, **found)
        run.demand_close(recipe, found, ", float32")


def stock(run: Run) -> None:
    """vLLM without the plugin does what `plan` says: refuses, in a line that names what to install, or serves."""
    original = model_scores(load("llama"), run.texts)
    for recipe in run.recipes:
        folder = run.checkpoint(recipe)
        report = json.loads((folder / "quantkit" / "report.json").read_text())
        planned = report["servers"][VLLM_CPU].rpartition("without it, ")[2]
        with Server(folder, plugin=False) as server:
            if not server.ready():
                said = server.output().splitlines()
                why = next((line for line in said if "Error" in line and "pip install" in line), "")
                run.note("stock", recipe, planned=planned, refused=why[-200:])
                run.demand(planned == REFUSED, f"{recipe}: refused, planned was {planned}")
                run.demand("quantkit" in why, f"{recipe}: no line of the refusal names the package")
                continue
            served = server.scores(run.texts)
        own = compare(served, model_scores(load(folder), run.texts))
        bf16 = compare(served, original)
        run.note("stock", recipe, planned=planned, load=own, bf16=bf16)
        run.demand(planned != REFUSED, f"{recipe}: served, it should be refused")
        if planned == NATIVE:
            run.demand_close(recipe, own, ", without the plugin")
        # What is served with activations, keys and values in 16 bits loses what four bits of the weights cost.
        lost = float((original[0] - served[0]).mean().exp()) - 1
        run.demand(lost < WEIGHTS_LOSE, f"{recipe}: {lost:.3f} of the perplexity lost")


def clients(run: Run) -> None:
    """The openai package: a stream, a chat, 32 requests at once, a client that stops, a prompt too long."""
    for recipe in ("fireq", "crossquant-w4a8"):
        with Server(run.checkpoint(recipe)) as server:
            run.demand(server.ready(), f"{recipe}: the server starts")
            done = subprocess.run(
                [vllm_python(), str(CLIENT), str(server.port)], capture_output=True, text=True, timeout=600
            )  # fmt: skip
            run.demand(
                done.returncode == 0, f"{recipe}: the client is content: {done.stderr[-400:]}"
            )
            if done.returncode == 0:
                run.note("clients", recipe, **json.loads(done.stdout))


def _without(folder: Path, name: str) -> None:
    checkpoint = Checkpoint(folder)
    tensors = {n: checkpoint.read(n) for n in checkpoint.tensors if n != name}
    save_tensors(tensors, folder / "model.safetensors")


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quantkit"] |= changes
    path.write_text(json.dumps(config))


def experts(run: Run) -> None:
    """A random mixture of experts in each kind of format, the experts on quantkit's kernels; over two ranks, too."""
    source = run.work / "experts"
    _random_experts(source)
    # The stream of a mixture of experts cannot be turned.
    settings = {"quest-hadamard": ["rotation={block: 128}"]}
    for recipe in ("int4", "crossquant", "crossquant-w4a8", "fireq", "quest-hadamard"):
        folder = run.work / f"experts-{recipe}"
        quantize(str(source), recipe, folder, overwrite=True, overrides=settings.get(recipe))
        wanted = model_scores(load(folder), run.texts)
        for ranks in (1, 2) if recipe in ("int4", "crossquant-w4a8") else (1,):
            with Server(folder, *(["--tensor-parallel-size", "2"] if ranks == 2 else [])) as server:
                ready = server.ready()
                found = compare(server.scores(run.texts), wanted) if ready else None
                told = "" if ready else server.output()[-2000:]
            run.note("experts", f"{recipe}, {ranks} ranks" if ranks > 1 else recipe, load=found)
            run.demand(ready, f"experts, {recipe}: the server starts {told}")
            if found:
                # Experts that give nothing make 0.038 and 0.73 of so small a model.
                least = GREEDY_BAR if recipe in WEIGHT_ONLY else 0.9
                close = found["difference"] <= WEIGHT_BAR and found["greedy"] >= least
                run.demand(close, f"experts, {recipe}: {found} within {WEIGHT_BAR}, {least}")


def _random_experts(folder: Path) -> None:
    """A Qwen3-MoE of two layers with the bundled model's vocabulary."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    tokenizer = load_tokenizer(bundled_path())
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=256, max_position_embeddings=1024,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def broken(run: Run) -> None:
    """A broken checkpoint ends the server with one line that says what is wrong."""
    layer = "model.layers.1"
    cases: dict[str, tuple[Any, str]] = {
        "cut file": (_cut, "corrupted safetensors file"),
        "no scale": (
            lambda f: _without(f, f"{layer}.mlp.up_proj.weight_scale"),
            "up_proj.weight_scale is missing",
        ),
        "no norm": (
            lambda f: _without(f, f"{layer}.input_layernorm.weight"),
            "input_layernorm.weight' is missing",
        ),
        "no key scales": (
            lambda f: (f / "quantkit" / "kv.safetensors").unlink(),
            "kv.safetensors: is missing",
        ),
        "unknown requirement": (
            lambda f: _change(f, requires=["time_travel"]),
            "requires time_travel; pip install --upgrade quantkit",
        ),
        "newer schema": (lambda f: _change(f, schema=99), "pip install --upgrade quantkit"),
    }
    for name, (breaks, expected) in cases.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "broken"
            shutil.copytree(run.checkpoint("fireq"), folder)
            breaks(folder)
            with Server(folder) as server:
                started = server.ready()
                lines = [line for line in server.output().splitlines() if expected in line]
                code = server.process.poll()
        run.note("broken", name, exit=code, line=lines[-1][-200:] if lines else None)
        run.demand(not started and code not in (0, None), f"{name}: the server ends with an error")
        run.demand(bool(lines), f"{name}: a line says {expected!r}")


def parallel(run: Run) -> None:
    """Two ranks are as near to quantkit.load as one has to be."""
    for recipe in ("int4", "crossquant-w4a8", "fireq", "quest-hadamard"):
        folder = run.checkpoint(recipe)
        with Server(folder, "--tensor-parallel-size", "2") as server:
            if not server.ready():
                run.note("parallel", recipe, log=server.output()[-600:])
                run.demand(False, f"{recipe}: two ranks start")
                continue
            served = server.scores(run.texts)
        found = compare(served, model_scores(load(folder), run.texts))
        run.note("parallel", recipe, **found)
        run.demand_close(recipe, found, ", two ranks")


def soak(run: Run) -> None:
    """A thousand requests in a row: none fails, memory grows by no more than 5 % after the first hundred."""
    with Server(run.checkpoint("fireq")) as server:
        run.demand(server.ready(), "the server starts")
        text = run.texts[0].tolist()
        failed, at_100, started = 0, 0, time.monotonic()
        for number in range(1000):
            begin = number % 300
            try:
                answer = server.post(prompt=text[begin : begin + 20 + number % 150], max_tokens=16)
                failed += not answer["choices"][0]["text"]
            except OSError:
                failed += 1
            if number == 99:
                at_100 = server.memory()
        growth = server.memory() / at_100 - 1
    seconds = round(time.monotonic() - started, 1)
    run.note(
        "soak",
        "fireq",
        failed=failed,
        growth=round(growth, 4),
        megabytes=at_100 >> 20,
        seconds=seconds,
    )
    run.demand(failed == 0, f"{failed} of 1000 requests failed")
    run.demand(growth <= 0.05, f"memory grew by {growth:.1%}")


PARTS = {
    part.__name__: part
    for part in (agree, float32, stock, clients, experts, broken, parallel, soak)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=", ".join(PARTS))
    parser.add_argument(
        "--work", type=Path, help="where checkpoints are kept (default: a new folder)"
    )
    parser.add_argument(
        "--recipe", action="append", help="one of those of agree, stock and float32"
    )
    parser.add_argument("-o", "--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    vllm_python()
    with tempfile.TemporaryDirectory() as place:
        run = Run(options.work or Path(place), options.recipe or RECIPES)
        for part in options.parts or PARTS:
            PARTS[part](run)
    if options.output:
        _keep(run, options.output, added=bool(options.recipe))
    return 1 if run.missed else 0


def _keep(run: Run, path: Path, added: bool) -> None:
    """Put the parts that ran into the file of results, beside those of earlier runs; or rows into the parts."""
    kept = json.loads(path.read_text()) if path.is_file() else {}
    version = subprocess.run(
        [vllm_python(), "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"],
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    for part, rows in run.rows.items():
        kept[part] = kept.get(part, {}) | rows if added else rows
    kept["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "vllm-cpu": version,
        "torch": torch.__version__,
    }
    path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
