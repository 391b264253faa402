"""Fused layers compute what the single ones do, for every recipe, thread and caller."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB

from quantkit.formats.scheme import ActivationFormat, Scheme, WeightFormat
from quantkit.recipe import recipe_names
from quantkit.runtime.activations import Quantized, quantize_activation
from quantkit.runtime.attention import PackedAttention
from quantkit.runtime.cache import packed_cache
from quantkit.runtime.fusion import GatedMLP, LinearPart, QuantNorm, SharedLinear
from quantkit.runtime.linear import QuantLinear, stack
from quantkit.runtime.load import load
from quantkit.runtime.patch import patch


def ids(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


# Every recipe, and every architecture with one recipe for each kind of fused layer; the rest is slow.
_KINDS = ("fireq", "crossquant", "quest-hadamard")


@pytest.mark.parametrize(
    ("recipe", "model_type"),
    [
        pytest.param(
            recipe,
            model_type,
            marks=() if model_type == "llama" or recipe in _KINDS else pytest.mark.slow,
        )
        for recipe in recipe_names()
        if recipe != "kv4"
        for model_type in ARCHITECTURES
    ],
)
def test_fused_equals_single(quantized, recipe: str, model_type: str):
    folder = quantized(recipe, model_type)
    fused, single = (load(folder, dtype=torch.float32, fused=f) for f in (True, False))
    assert isinstance(fused.model.layers[0].mlp, GatedMLP)
    assert isinstance(fused.model.layers[0].self_attn.k_proj, LinearPart)
    got, want = (logits(model, ids()).float().log_softmax(-1) for model in (fused, single))
    # Sums of another order may move a code over an edge; a wrong part or scale is off by far more.
    assert float((got - want).abs().mean()) < 0.02


@pytest.mark.parametrize("recipe", ["fireq", "crossquant-w4a8", "quest-hadamard-w4a4"])
def test_sums_round_once_whoever_makes_them(quantized, recipe: str):
    """In 16 bits too: a product that rounds before its scale and bias moves nearly every output."""
    model, other = (load(quantized(recipe, "qwen2"), fused=fused) for fused in (True, False))
    qkv, q = (m.model.layers[0].self_attn for m in (model, other))
    assert q.q_proj.bias is not None
    x = torch.randn(1, 24, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.inference_mode():
        got, want = qkv.q_proj(x), q.q_proj(x)
    assert float((got != want).float().mean()) < 0.01


def test_norms_quantize_once(quantized, monkeypatch):
    """The linears behind a norm take the codes that it made."""
    model = load(quantized("crossquant"))
    assert isinstance(model.model.layers[0].input_layernorm, QuantNorm)
    counted = []

    def count(x, form):
        counted.append(tuple(x.shape))
        return quantize_activation(x, form)

    monkeypatch.setattr("quantkit.runtime.linear.quantize_activation", count)
    logits(model, ids())
    assert len(counted) == 2  # o_proj's input in each of two layers; all others come quantized


def test_codes_of_another_input_are_not_taken():
    shared = SharedLinear([_linear(16, W8A8, 1), _linear(48, W8A8, 2)])
    x, other = torch.randn(2, 3, 64).unbind()
    want = shared(x)
    shared.carry(other, Quantized(*quantize_activation(other, ActivationFormat(8))))
    assert torch.equal(shared(x), want)


def test_threads_do_not_get_each_others_outputs(quantized):
    model = load(quantized("int4"), dtype=torch.float32)
    inputs = [ids(1, 16, seed) for seed in range(8)]
    wanted = [logits(model, tokens) for tokens in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(lambda t: logits(model, t), inputs), wanted):
                assert torch.allclose(got, want, atol=1e-4)


def test_nothing_is_held_twice_or_after_a_forward(quantized):
    folder = quantized("fireq")
    model = load(folder)
    packed = sum(
        t.numel() * t.element_size()
        for m in load(folder, fused=False).modules()
        if isinstance(m, QuantLinear)
        for t in m.buffers()
    )
    held = sum(
        t.numel() * t.element_size()
        for m in model.modules()
        if isinstance(m, QuantLinear)
        for t in m.buffers()
    )
    assert held <= 1.05 * packed
    logits(model, ids())
    assert all(m._state.last is None for m in model.modules() if isinstance(m, SharedLinear))


def test_a_second_patch_changes_nothing_and_copies_stand_alone(quantized):
    model = load(quantized("crossquant"), dtype=torch.float32)
    want = logits(model, ids())
    assert torch.equal(logits(patch(model), ids()), want)
    twin = copy.deepcopy(model)
    for buffer in model.buffers():
        buffer.zero_()
    assert torch.equal(logits(twin, ids()), want)


def _linear(out: int, scheme: Scheme, seed: int = 0) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    linear = QuantLinear(64, out, True, scheme)
    linear.weight = torch.randint(-127, 128, (out, 64), generator=generator).to(torch.int8)
    linear.weight_scale = torch.rand(out, 1, generator=generator).bfloat16()
    linear.bias = torch.randn(out, generator=generator)
    return linear


class _Scaled(torch.nn.Module):
    """A gated MLP that is not quite one."""

    def __init__(self, factor: float, up_bits: int = 8) -> None:
        super().__init__()
        self.gate_proj, self.down_proj = _linear(64, W8A8, 1), _linear(64, W8A8, 2)
        self.up_proj = _linear(64, Scheme(WeightFormat(8, None), ActivationFormat(up_bits)), 3)
        self.act_fn, self.factor = torch.nn.SiLU(), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.factor


W8A8 = Scheme(WeightFormat(8, None), ActivationFormat(8))


def test_what_is_built_otherwise_stays():
    x = torch.randn(2, 3, 64)
    for factor, taken in ((1.0, True), (0.7, False)):
        holder = torch.nn.ModuleDict({"mlp": _Scaled(factor)})
        want = holder["mlp"](x)
        patch(holder)
        assert isinstance(holder["mlp"], GatedMLP) == taken
        assert torch.allclose(holder["mlp"](x), want, rtol=1e-2, atol=1e-2)
    mixed = torch.nn.ModuleDict({"mlp": _Scaled(1.0, up_bits=4)})
    want = mixed["mlp"](x)
    patch(mixed)
    assert isinstance(mixed["mlp"].up_proj, QuantLinear)
    assert torch.equal(mixed["mlp"](x), want)


def test_stacking_keeps_every_row_and_a_missing_bias():
    first, second = _linear(16, W8A8, 1), _linear(48, W8A8, 2)
    second.bias = None
    x = torch.randn(5, 64)
    want = torch.cat((first(x), second(x)), dim=-1)
    assert torch.equal(stack([first, second])(x), want)


@pytest.mark.parametrize("recipe", ["fireq", "crossquant"])
def test_compiled_decode_equals_eager(quantized, recipe: str):
    """One graph without breaks over a static cache: what CUDA graphs need."""
    from transformers import StaticCache

    from quantkit.runtime.cache import packed_cache, quantizers

    model = load(quantized(recipe), dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def decode(run) -> torch.Tensor:
        cache = packed_cache(model, 32) if quantizers(model) else StaticCache(model.config, 32)
        outputs = [model(ids(2, 10), past_key_values=cache, use_cache=True).logits[:, -1]]
        for step in range(3):
            token = ids(2, 1, seed=step)
            outputs.append(run(token, past_key_values=cache, use_cache=True).logits[:, -1])
        return torch.stack(outputs)

    with torch.no_grad():
        torch.testing.assert_close(decode(compiled), decode(model), rtol=1e-3, atol=1e-3)


def test_generate_with_a_static_cache(quantized):
    model = load(quantized("fireq"), dtype=torch.float32)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    growing = model.generate(ids(), **settings)
    static = model.generate(ids(), cache_implementation="static", **settings)
    assert torch.equal(growing, static)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_attention_with_rope_in_the_append(quantized, model_type: str, static: bool):
    """Decoding through the packed cache gives what it gives with RoPE in the model's own code."""
    folder = quantized("fireq", model_type)
    tokens, outputs = ids(length=12), []
    models = [load(folder, dtype=torch.float32, fused=f) for f in (True, False)]
    # A model with norms between the projections and RoPE keeps its own attention.
    own = hasattr(models[1].model.layers[0].self_attn, "q_norm")
    assert own != isinstance(models[0].model.layers[0].self_attn, PackedAttention)
    for model in models:
        cache = packed_cache(model, 16 if static else None)
        with torch.inference_mode():
            steps = [model(tokens[:, :8], past_key_values=cache).logits]
            steps += [
                model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)
            ]
        outputs.append(torch.cat(steps, 1).log_softmax(-1))
    assert float((outputs[0] - outputs[1]).abs().mean()) < 0.02
