import pytest
import torch
from tiny_models import ARCHITECTURES, make_config

from quantkit.errors import QuantkitError
from quantkit.models.groups import PLACES
from quantkit.models.structure import build_skeleton, find_structure, load_config

_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_supported(model_type: str):
    model = build_skeleton(make_config(model_type), model_type)
    found = find_structure(model, model_type)
    assert found.num_layers == 2
    layer = found.layer(0)
    attention = layer.attention
    assert (attention.path, attention.heads, attention.kv_heads) == ("self_attn", 4, 2)
    assert (attention.head_dim, attention.key_norm) == (64, model_type == "qwen3")
    assert layer.mlp == "mlp"
    assert layer.fused == (layer.groups[0].linears, layer.groups[2].linears)
    assert [group.name for group in layer.groups] == list(PLACES)
    assert set(layer.shapes) == {name for group in layer.groups for name in group.linears}
    assert layer.shapes["mlp.down_proj"] == (256, 384)
    assert found.shapes()["model.layers.1.mlp.down_proj"] == (256, 384)
    assert len(list(found.modules())) == 14
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers()), "RoPE's frequencies must be real"


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("deepseek_v3", "self_attn.q_a_proj feeds no other linear"),
        ("olmo2", "what mlp.gate_proj reads comes neither from a norm"),
        ("gpt2", "no linear, but Conv1D"),
        ("bert", "attention looks ahead"),
        ("mamba", "cannot be run alone"),
        ("t5", "not a causal language model"),
        ("vit", "not a causal language model"),
    ],
)
def test_refused_with_what_differs(model_type: str, says: str):
    with pytest.raises(QuantkitError) as error:
        find_structure(
            build_skeleton(load_config({"model_type": model_type} | _TINY, "m"), "m"), "m"
        )
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "names no model_type"),
        ({"model_type": "nonesuch"}, "unknown"),
        ({"model_type": 3}, "model_type"),
    ],
)
def test_configs_that_are_none(config: dict, says: str):
    with pytest.raises(QuantkitError, match=says):
        load_config(config, "m")


def test_many_layers_of_a_model_that_takes_the_first_of_a_tuple():
    config = make_config("bloom", n_layer=None, num_hidden_layers=6)
    assert find_structure(build_skeleton(config, "m"), "m").num_layers == 6


def test_remote_code_is_not_asked_for():
    config = load_config(
        make_config("llama").to_dict() | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, "m"
    )
    assert type(build_skeleton(config, "m")).__name__ == "LlamaForCausalLM"
    assert torch.is_tensor(torch.ones(1))
