"""Every transform leaves the model's function as it is: logits before and after, in float64."""

import pytest
import torch
from tiny_models import VARIANTS, VOCAB, make_model, structure_of

from quantkit.models.experts import unstack_experts
from quantkit.models.folding import fold_factor, fold_rope_factor
from quantkit.models.groups import PLACES

# What no factor can reach, by place; all else can.
UNREACHED = {
    "opt-350m": {"qkv", "gate_up"},  # norms after the residual sum
    "gpt-neox": {"down"},  # a function that is not linear, no gate
    "falcon": {"gate_up", "down"},  # one norm for both: that of qkv
    "falcon-40b": {"down"},
    "bloom": {"down"},
}
NO_KEY_FACTORS = {
    "gemma3", "opt", "opt-350m", "gpt-neox", "falcon", "falcon-40b", "bloom", "llama4",
}  # fmt: skip


def logits(model) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def same(after: torch.Tensor, before: torch.Tensor, variant: str = "llama") -> bool:
    # Gemma's and Llama 4's norms, Bloom's and Falcon's softmax compute in float32 whatever they are given.
    wide = not variant.startswith(("gemma", "llama4", "bloom", "falcon"))
    return float((after - before).norm() / before.norm()) < (1e-11 if wide else 1e-6)


def make(variant: str):
    """A model in float64 with one linear for each matrix, its structure, its layers."""
    model = make_model(variant).double()
    model.config._experts_implementation = "eager"  # grouped products have no float64
    before = logits(model)
    unstack_experts(model)
    assert same(logits(model), before, variant)
    structure = structure_of(variant)
    return model, structure, model.get_submodule(structure.layers)


def _rope_factors(variant: str, structure, layers) -> None:
    shape = structure.layer(0).attention
    assert bool(shape.why_no_factors) == (variant in NO_KEY_FACTORS), shape.why_no_factors
    if shape.why_no_factors:
        return
    a = torch.empty(shape.kv_heads, 32, dtype=torch.float64)
    a.uniform_(0.05, 20, generator=torch.Generator().manual_seed(5))
    a = torch.cat([a, a], 1)
    for layer in layers:
        applied = fold_rope_factor(layer, a, shape)
        assert torch.equal(applied[:, :32], applied[:, 32:]), (
            "both members of a RoPE pair need one factor"
        )
        if shape.key_norm:
            assert torch.equal(applied.log2(), applied.log2().round()), (
                "q_norm and k_norm are stored in 16 bits"
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors(variant: str):
    model, structure, layers = make(variant)
    before = logits(model)
    _rope_factors(variant, structure, layers)
    assert same(logits(model), before, variant)
    generator = torch.Generator().manual_seed(4)
    for place in PLACES:
        folded = 0
        for number, layer in enumerate(layers):
            for group in structure.layer(number).place(place):
                if group.feeder is None:
                    continue
                linear = layer.get_submodule(group.linears[0])
                d = torch.empty(linear.weight.shape[1], dtype=torch.float64)
                d = group.feeder.shared(d.uniform_(0.05, 20, generator=generator))
                weight = linear.weight.clone()
                assert torch.allclose(fold_factor(layer, group, d, torch.float64), d)
                assert not torch.allclose(linear.weight, weight), "nothing was folded"
                folded += 1
        assert bool(folded) == (place not in UNREACHED.get(variant, ())), place
        assert same(logits(model), before, variant), place


@pytest.mark.parametrize("variant", ["llama", "gemma2", "opt"])
def test_a_norm_in_bf16_takes_only_what_it_can_hold(variant: str):
    """The factor is adjusted to the norm's rounding, so that the function is still exactly the same."""
    model, structure, layers = make(variant)
    offset = structure.groups(0)[0].feeder.offset
    for number, layer in enumerate(layers):
        norm = layer.get_submodule(structure.groups(number)[0].feeder.module)
        norm.weight.data = norm.weight.data.bfloat16().double()
        norm.weight.data[3] = -offset
    before = logits(model)
    for number, layer in enumerate(layers):
        group = structure.groups(number)[0]
        d = torch.linspace(0.1, 9.7, 256, dtype=torch.float64)
        fold_factor(layer, group, d, torch.bfloat16)
        stored = layer.get_submodule(group.feeder.module).weight
        assert torch.equal(stored, stored.bfloat16().double())
    assert same(logits(model), before, variant)


def test_a_factor_of_o_proj_is_one_for_all_query_heads_of_a_kv_head():
    (o,) = make("llama")[1].layer(0).place("o")
    d = o.feeder.shared(torch.rand(256, dtype=torch.float64) + 0.1).view(2, 2, 64)
    assert torch.equal(d[:, 0], d[:, 1])
