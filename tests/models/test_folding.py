"""Every transform leaves the model's function as it is: logits before and after, in float64."""

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, make_model

from quantkit.models.folding import fold_factor, fold_rope_factor
from quantkit.models.groups import PLACES
from quantkit.models.structure import find_structure


def logits(model) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return make_model(request.param).double()


def same(after: torch.Tensor, before: torch.Tensor) -> bool:
    return float((after - before).norm() / before.norm()) < 1e-11


@pytest.mark.parametrize("place", PLACES)
def test_channel_factors(model, place):
    structure, before = find_structure(model, "m"), logits(model)
    generator = torch.Generator().manual_seed(4)
    for number, layer in enumerate(model.model.layers):
        (group,) = structure.layer(number).place(place)
        columns = layer.get_submodule(group.linears[0]).weight.shape[1]
        d = torch.empty(columns, dtype=torch.float64).uniform_(0.05, 20, generator=generator)
        d = group.feeder.shared(d)
        weight = layer.get_submodule(group.linears[0]).weight.clone()
        applied = fold_factor(layer, group, d, torch.float64)
        assert torch.allclose(applied, d)
        assert not torch.allclose(layer.get_submodule(group.linears[0]).weight, weight), (
            "nothing was folded"
        )
    assert same(logits(model), before)


def test_a_norm_in_bf16_takes_only_what_it_can_hold(model):
    """The factor is adjusted to the norm's rounding, so that the function is still exactly the same."""
    structure = find_structure(model, "m")
    for layer in model.model.layers:
        norm = layer.input_layernorm.weight
        norm.data = norm.data.bfloat16().double()
        norm.data[3] = 0.0
    before = logits(model)
    for number, layer in enumerate(model.model.layers):
        d = torch.linspace(0.1, 9.7, 256, dtype=torch.float64)
        fold_factor(layer, structure.groups(number)[0], d, torch.bfloat16)
        stored = layer.input_layernorm.weight
        assert torch.equal(stored, stored.bfloat16().double())
    assert same(logits(model), before)


def test_a_factor_of_o_proj_is_one_for_all_query_heads_of_a_kv_head(model):
    (o,) = find_structure(model, "m").layer(0).place("o")
    d = o.feeder.shared(torch.rand(256, dtype=torch.float64) + 0.1).view(2, 2, 64)
    assert torch.equal(d[:, 0], d[:, 1])


def test_rope_factors(model):
    structure, before = find_structure(model, "m"), logits(model)
    a = torch.empty(2, 32, dtype=torch.float64).uniform_(
        0.05, 20, generator=torch.Generator().manual_seed(5)
    )
    a = torch.cat([a, a], 1)
    shape = structure.layer(0).attention
    for layer in model.model.layers:
        applied = fold_rope_factor(layer, a, shape)
        assert torch.equal(applied[:, :32], applied[:, 32:]), (
            "both members of a RoPE pair need one factor"
        )
        if shape.key_norm:
            assert torch.equal(applied.log2(), applied.log2().round()), (
                "q_norm and k_norm are stored in 16 bits"
            )
    assert same(logits(model), before)
