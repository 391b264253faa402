"""A decoder layer whose products add the residual gives what the layer gave, bit for bit, or is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import VOCAB
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from quantkit.runtime.cache import packed_cache, quantizers
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.load import load
from quantkit.runtime.patch import patch
from quantkit.runtime.residual import add_in_products


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("quantkit.runtime.residual.runs_triton", lambda device: True)


def _ids(length: int = 9) -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def _run(model) -> torch.Tensor:
    """The logits of a prompt, and of two steps after it."""
    cache = packed_cache(model, None) if quantizers(model) else None
    first = model(_ids(), past_key_values=cache, use_cache=True)
    steps = [first.logits]
    for _ in range(2):
        steps.append(model(_ids(1), past_key_values=first.past_key_values).logits)
    return torch.cat(steps, 1)


def _both(folder, monkeypatch, **settings):
    """The model with its additions in products, and as it is."""
    adding = load(folder, **settings)
    with monkeypatch.context() as patched:
        patched.setattr("quantkit.runtime.residual.runs_triton", lambda device: False)
        return adding, load(folder, **settings)


def _changed(model) -> list[bool]:
    return ["forward" in vars(layer) for layer in model.model.layers]


# Keys and values packed or not; a model's own MLP, whose gate and up are one layer; experts; biases.
MODELS = [
    ("fireq", "llama"),
    ("crossquant", "llama"),
    ("quest-hadamard", "llama"),
    ("int4", "phi3"),
    ("int4", "mixtral"),
    ("int8", "llama-biases"),
]


@pytest.mark.parametrize(("recipe", "model_type"), MODELS)
def test_the_same_bits(recipe, model_type, quantized, monkeypatch) -> None:
    adding, plain = _both(quantized(recipe, model_type), monkeypatch)
    assert (_changed(adding), _changed(plain)) == ([True, True], [False, False])
    added: list[tuple[int, ...]] = []
    for name in ("forward", "product"):
        _count(monkeypatch, name, added)
    got = _run(adding)
    # Three forwards of two layers; experts are many products, whose sum the layer adds.
    assert len(added) == 3 * 2 * (1 if model_type == "mixtral" else 2)
    assert torch.equal(got, _run(plain))


def _count(monkeypatch, name: str, added: list) -> None:
    method = getattr(QuantLinear, name)

    def counting(self, *given, **named):
        residual = named.get("residual", given[1] if name == "forward" and given[1:] else None)
        if residual is not None:
            added.append(tuple(residual.shape))
        return method(self, *given, **named)

    monkeypatch.setattr(QuantLinear, name, counting)


@pytest.mark.parametrize(("recipe", "model_type"), [("int4", "gemma2"), ("int4", "gpt-neox")])
def test_other_layers_stay(recipe, model_type, quantized) -> None:
    """Norms behind the blocks; both blocks of one input."""
    model = load(quantized(recipe, model_type))
    assert not any("_adding" in vars(module) for module in model.modules())


class _Scaled(LlamaDecoderLayer):
    """The parts of a Llama's, but what the blocks give is halved, as Granite does."""

    def forward(self, hidden_states, **named):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        hidden_states = hidden_states + 0.5 * attended
        return hidden_states + 0.5 * self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_layer_that_adds_otherwise_stays(quantized) -> None:
    model = load(quantized("crossquant"), fused=False)
    model.model.layers[1].__class__ = _Scaled
    patch(model)
    assert _changed(model) == [True, False]


def test_once_is_enough_copies_stand_alone_and_training_is_the_models_own(quantized) -> None:
    model = load(quantized("fireq"))
    layer = model.model.layers[0]
    before = layer.forward
    add_in_products(model)
    assert layer.forward == before
    want, twin = _run(model), copy.deepcopy(model)
    for buffer in model.buffers():
        buffer.zero_()
    assert torch.equal(_run(twin), want)
    layer.train()
    layer._adding = None
    assert layer(torch.randn(1, 2, 256).bfloat16(), position_embeddings=_turned()) is not None


def _turned() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, 2, 64).bfloat16(), torch.zeros(1, 2, 64).bfloat16()


def test_hidden_states_are_still_recorded(quantized, monkeypatch) -> None:
    adding, plain = _both(quantized("crossquant"), monkeypatch)
    with torch.inference_mode():
        got, want = (m(_ids(), output_hidden_states=True).hidden_states for m in (adding, plain))
    assert len(got) == 3
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("recipe", [pytest.param("fireq", marks=pytest.mark.slow), "int4"])
def test_it_compiles_to_one_graph(recipe, quantized) -> None:
    from transformers import StaticCache

    model = load(quantized(recipe))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        outputs = []
        for run in (compiled, model):
            cache = packed_cache(model, 16) if quantizers(model) else StaticCache(model.config, 16)
            model(_ids(), past_key_values=cache, use_cache=True)
            outputs.append(run(_ids(1), past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-2, atol=2e-2)
