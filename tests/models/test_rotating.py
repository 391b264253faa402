"""Rotations into the weights leave the model's function as it is: logits before and after, in float64."""

from types import MethodType

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, make_config, make_model
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.models.rotating import residual_basis, turn_values
from quantkit.models.structure import build_skeleton, find_structure


def logits(model) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def same(after: torch.Tensor, before: torch.Tensor) -> bool:
    return float((after - before).norm() / before.norm()) < 1e-11


def in_float64(model):
    """transformers' RMS norms compute in float32 whatever they are given: a turned stream would round otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.double().modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(forward, module)
    return model


def turn_model(model, basis) -> None:
    """As the pipeline does it, tensor by tensor, with the head on its own."""
    embedding, norm = model.get_submodule(basis.embedding), model.get_submodule(basis.norm)
    head = model.get_submodule(basis.head)
    with torch.no_grad():
        head.weight = nn.Parameter(basis.turn_rows(head.weight, norm.weight))
        embedding.weight = nn.Parameter(basis.turn_rows(embedding.weight))
        norm.weight.fill_(1.0)
    structure = find_structure(model, "m")
    for number, layer in enumerate(model.model.layers):
        basis.turn_layer(layer, structure.layer(number))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "phi3"])
def test_the_residual_stream(model_type: str, tied: bool):
    # 320 = 20 * 16: no power of two.
    model = in_float64(make_model(model_type, tie_word_embeddings=tied, hidden_size=320))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    structure, before = find_structure(model, "m"), logits(model)
    basis = residual_basis(model, structure, "m")
    assert (basis.block, basis.tied, basis.head) == (320, tied, "lm_head")
    turn_model(model, basis)
    assert same(logits(model), before)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            assert torch.equal(parameter, torch.ones_like(parameter))


@pytest.mark.parametrize("config", [{"attention_bias": True, "mlp_bias": True}])
def test_biases_that_write_the_residual_stream(config):
    model = in_float64(make_model("llama", **config))
    before = logits(model)
    turn_model(model, residual_basis(model, find_structure(model, "m"), "m"))
    assert same(logits(model), before)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "phi3"])
@pytest.mark.parametrize("block", [64, 16])
def test_values(model_type: str, block: int):
    """Query heads that share a KV head read one rotated value."""
    model = make_model(model_type).double()
    structure, before = find_structure(model, "m"), logits(model)
    # Phi-3's values come from the last rows of one matrix.
    name = "qkv_proj" if model_type == "phi3" else "v_proj"
    linear = model.model.layers[0].self_attn.get_submodule(name)
    weight = linear.weight[-64:].clone()
    for layer in model.model.layers:
        turn_values(layer, structure.layer(0), block)
    assert same(logits(model), before)
    assert not torch.allclose(linear.weight[-64:], weight)


def test_no_block_reaches_over_two_heads():
    model = make_model("llama")
    with pytest.raises(ValueError, match="head_dim 64"):
        turn_values(model.model.layers[0], find_structure(model, "m").layer(0), 128)


def test_outliers_of_the_residual_stream_are_spread():
    basis = residual_basis(
        build_skeleton(make_config("llama"), "m"),
        find_structure(build_skeleton(make_config("llama"), "m"), "m"),
        "m",
    )
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 60
    crest = (basis.turn(x).abs().amax(-1) / basis.turn(x).square().mean(-1).sqrt()).mean()
    # A mean that all channels share would all land in one channel, were it not for the signs.
    assert crest < 3
    mean = basis.turn(torch.ones(1, 256) + 0.1 * x[:1])
    assert float(mean.abs().max() / mean.square().mean().sqrt()) < 6


def test_a_stream_that_something_else_touches_is_refused():
    model = build_skeleton(make_config("llama"), "m")
    structure = find_structure(model, "m")
    model.model.norm = nn.LayerNorm(256)
    with pytest.raises(QuantkitError, match=r"rotation\.residual needs .* is built otherwise"):
        residual_basis(model, structure, "m")
