from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import make_model

from quantkit import load, pipeline, quantize, step
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.scheme import ActivationFormat, KVFormat, Scheme, WeightFormat
from quantkit.layer import simulate
from quantkit.methods.rounding import Grid, dequantize
from quantkit.methods.rounding import quantize as quantize_weight
from quantkit.recipe import Recipe, Refine
from quantkit.refinement import LearnedLinear, Task, refine_layer
from quantkit.runtime.attention import KVQuantizer, register
from quantkit.solve import solve

SCHEMES = {
    "w4a16": Scheme(WeightFormat(4, 32)),
    "fp8": Scheme(WeightFormat(4, 32, "fp8_channel"), ActivationFormat(8, "float")),
    "w8a8": Scheme(WeightFormat(8, None), ActivationFormat(8)),
    "half": Scheme(WeightFormat(4, 32, half=True), ActivationFormat(4, half=True), rotation=64),
}


def quantized_layer(scheme: Scheme):
    """A layer of simulated linears, its function, and what the original layer gives."""
    model = make_model("llama")
    layer = model.model.layers[0].requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    # Of few directions, as hidden states are: what is learned from some tokens holds for others.
    inputs = torch.randn(9, 32, 24, generator=generator) @ torch.randn(24, 256, generator=generator)
    positions = model.model.rotary_emb(inputs, torch.arange(32)[None])

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        out = layer(hidden, position_embeddings=positions)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        targets = forward(inputs)
    settings = Recipe.load("int4").weights
    solved = {}
    for name in [n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)]:
        weight = layer.get_submodule(name).weight
        solved[name], _ = solve(
            weight, scheme, settings, Recipe.load("int4").gptq, None, keep_target=True
        )
        simulate(layer, name, solved[name], scheme)
    return layer, solved, Task(forward, inputs, targets)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_refined_layer_is_nearer_to_the_original(name: str):
    layer, solved, task = quantized_layer(SCHEMES[name])
    schemes = dict.fromkeys(solved, SCHEMES[name])
    norms = ("input_layernorm", "post_attention_layernorm")
    start = task.held_out_loss(torch.device("cpu"))
    found, figures = refine_layer(
        layer, solved, schemes, norms, torch.bfloat16, task, Refine(steps=24, blocks=4, rate=0.02)
    )
    assert figures["before"] == pytest.approx(start, rel=5e-2)
    if name == "w8a8":
        # Rounding to nearest at eight bits leaves these few steps nothing to gain: the start is kept.
        assert figures["after"] <= figures["before"]
    else:
        assert figures["after"] < 0.99 * start
        assert figures["changed_codes"] > 0.001
    # What is returned is what now stands in the layer, and what the figures speak of.
    assert task.held_out_loss(torch.device("cpu")) == pytest.approx(figures["after"], rel=1e-4)
    grid = Grid(SCHEMES[name].weights.bits, SCHEMES[name].weights.half)
    for linear, result in found.items():
        values = dequantize(result.codes, result.scale, grid)
        assert torch.equal(layer.get_submodule(linear).weight, values)
        assert torch.equal(result.scale, result.scale.bfloat16().float())
        # The codes are the nearest of the target, but where it lies on a boundary.
        nearest = quantize_weight(result.target, result.scale, grid)
        assert float((nearest != result.codes).float().mean()) < 1e-3
    for norm in norms:
        weight = layer.get_submodule(norm).weight
        assert torch.equal(weight, weight.bfloat16().float())


def test_narrow_products_are_for_the_steps_alone():
    """They learn as much; what is held out, which says what is kept, is measured in float32."""
    layer, solved, task = quantized_layer(SCHEMES["w4a16"])
    schemes = dict.fromkeys(solved, SCHEMES["w4a16"])
    seen: set[tuple[bool, bool]] = set()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return task.forward(hidden)

    narrow = replace(task, forward=forward, products=torch.bfloat16)
    settings = Refine(steps=24, blocks=4, rate=0.02)
    _, figures = refine_layer(layer, solved, schemes, (), torch.float32, narrow, settings)
    assert seen == {(True, True), (False, False)}
    assert figures["after"] < 0.99 * figures["before"]


def test_what_helps_nothing_is_not_kept():
    """Steps far too large: the start is the best, and it stays as it was."""
    layer, solved, task = quantized_layer(SCHEMES["w4a16"])
    schemes = dict.fromkeys(solved, SCHEMES["w4a16"])
    norms = ("input_layernorm",)
    before = layer.input_layernorm.weight.clone()
    found, figures = refine_layer(
        layer, solved, schemes, norms, torch.float32, task, Refine(steps=4, rate=1.0)
    )
    assert figures["after"] == figures["before"]
    assert figures["changed_codes"] == 0
    assert all(torch.equal(found[n].codes, solved[n].codes) for n in solved)
    assert torch.equal(layer.input_layernorm.weight, before)


def test_a_learned_linear_starts_as_the_simulation():
    layer, solved, _ = quantized_layer(SCHEMES["half"])
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    name = "self_attn.q_proj"
    learned = LearnedLinear(solved[name], None, SCHEMES["half"])
    assert torch.allclose(learned(x), layer.get_submodule(name)(x), atol=1e-5)


@pytest.mark.parametrize("scale", ["bf16", "fp8"])
def test_attention_over_int4_keys_can_be_learned_through(scale: str):
    """With gradients, attention gives what the packed one does, and its inputs get gradients."""
    register()
    model = make_model("llama")
    model.set_attn_implementation("quantkit")
    attention = model.model.layers[0].self_attn
    post = torch.rand(2, 64, generator=torch.Generator().manual_seed(2)) + 0.5
    attention.kv_quantizer = KVQuantizer(KVFormat(scale=scale), post)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
    got = model(tokens, use_cache=False).logits
    assert got.grad_fn is not None
    assert torch.allclose(got, want, atol=2e-3 * float(want.abs().max()))
    got.sum().backward()
    assert float(attention.k_proj.weight.grad.abs().max()) > 0


@pytest.mark.parametrize(("recipe", "kind"), [("fireq", "llama"), ("gptq-refined", "qwen2")])
def test_the_whole_job_with_refinement(
    recipe: str, kind: str, tiny, text: Path, tmp_path: Path, monkeypatch
):
    # As refinement has it: what it starts from is then what there is without it.
    monkeypatch.setattr(step, "product_dtype", lambda device, bits: torch.float32)
    settings = ['refine={"steps": 24}', "calibration={samples: 8, seqlen: 64}"]
    for name, more in (("plain", ["refine=null"]), ("a", []), ("b", [])):
        report = quantize(
            str(tiny(kind)), recipe, tmp_path / name, calib=str(text), overrides=[*settings, *more]
        )
    for layer in report["layers"]:
        figures = layer["refinement"]
        assert figures["unit"] == "nats"
        assert figures["after"] <= figures["before"]
    outputs = [Checkpoint(tmp_path / name) for name in ("plain", "a", "b")]
    plain, first, again = ({n: o.load(n) for n in o.tensors} for o in outputs)
    assert all(torch.equal(first[n], again[n]) for n in first)
    if kind == "qwen2":
        # Value heads are rotated, and their biases with them.
        name = "model.layers.0.self_attn.v_proj.bias"
        assert not torch.equal(first[name], Checkpoint(tiny(kind)).load(name))
    learned = any(f["refinement"]["after"] < f["refinement"]["before"] for f in report["layers"])
    assert learned == any(not torch.equal(first[n], plain[n]) for n in first)
    assert learned or recipe != "fireq"
    with torch.no_grad():
        logits = load(tmp_path / "a")(torch.arange(30)[None]).logits
    assert bool(torch.isfinite(logits).all())


def test_where_products_are_narrow(tiny, text: Path, tmp_path: Path, monkeypatch):
    """Those that are learned from, in a run that refines; what goes from layer to layer stays in float32."""
    streams: list[torch.dtype] = []
    tasks: list[torch.dtype] = []
    run, refine = step.run_layer, step.refine_layer

    def spy_run(plan, stream, *rest):
        streams.append(stream.products)
        return run(plan, stream, *rest)

    def spy_refine(layer, solved, schemes, norms, dtype, task, settings):
        tasks.append(task.products)
        return refine(layer, solved, schemes, norms, dtype, task, settings)

    monkeypatch.setattr(pipeline, "run_layer", spy_run)
    monkeypatch.setattr(step, "refine_layer", spy_refine)
    monkeypatch.setattr(step, "product_dtype", lambda device, bits: torch.bfloat16)
    for name, steps in (("without", "null"), ("with", "{steps: 2}")):
        settings = [f"refine={steps}", "calibration={samples: 4, seqlen: 32}"]
        out = tmp_path / name
        quantize(str(tiny("llama")), "gptq-refined", out, calib=str(text), overrides=settings)
    assert streams == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert tasks == [torch.bfloat16] * 2
