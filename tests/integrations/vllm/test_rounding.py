"""Norms and RoPE of an emulated model round as transformers' do, bit for bit. Run by an interpreter with vLLM.

/path/to/vllm/bin/python -m pytest tests/integrations/vllm/test_rounding.py
"""

import pytest
import torch

pytest.importorskip("vllm")

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from vllm import ir
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope

from quantkit.formats.config import build_quantization_config
from quantkit.formats.scheme import ActivationFormat, Scheme, WeightFormat
from quantkit.integrations.vllm.config import QuantkitConfig

W4A8 = Scheme(WeightFormat(4, 128), ActivationFormat(8))
W8A8 = Scheme(WeightFormat(8, None), ActivationFormat(8))
HIDDEN, HEADS, HEAD, TOKENS = 256, 4, 64, 200


def model_of(scheme: Scheme, mode: CompilationMode, monkeypatch) -> VllmConfig:
    """A vLLM in which the first linear of a model of ours was made."""
    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    ir.ops.fused_add_rms_norm.set_default(["native"])
    made = VllmConfig(compilation_config=CompilationConfig(mode=mode, custom_ops=["all"]))
    quant = QuantkitConfig.from_config(
        build_quantization_config({"linear": scheme}, ["lm_head"], None, {})
    )
    with set_current_vllm_config(made):
        linear.ReplicatedLinear(HIDDEN, HIDDEN, bias=False, quant_config=quant, prefix="linear")
    return made


def ours() -> bool:
    return ir.ops.fused_add_rms_norm.get_priority()[0] == "quantkit"


def test_an_emulated_model_rounds_as_transformers(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16() * scale for scale in (1, 7)
    )
    query, key = (
        torch.randn(TOKENS, heads * HEAD, generator=generator).bfloat16() for heads in (HEADS, 2)
    )
    positions = torch.arange(TOKENS)
    theirs = LlamaRMSNorm(HIDDEN, 1e-5).bfloat16()
    torch.nn.init.uniform_(theirs.weight, 0.5, 1.5)
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=HEAD)
    cos_sin = LlamaRotaryEmbedding(config)(x[None], positions[None])
    shaped = (t.view(1, TOKENS, -1, HEAD).transpose(1, 2) for t in (query, key))
    turned = [
        t.transpose(1, 2).reshape(TOKENS, -1) for t in apply_rotary_pos_emb(*shaped, *cos_sin)
    ]

    with (
        set_current_vllm_config(model_of(W4A8, CompilationMode.NONE, monkeypatch)),
        torch.no_grad(),
    ):
        assert ours()
        norm = RMSNorm(HIDDEN, 1e-5, dtype=torch.bfloat16)
        norm.weight.copy_(theirs.weight)
        got, hidden = norm(x.clone(), residual.clone())
        rope = get_rope(HEAD, 512, True, {"rope_type": "default", "rope_theta": 10000.0},
                        dtype=torch.bfloat16)  # fmt: skip
        rotated = rope(positions, query.clone(), key.clone())
    assert torch.equal(hidden, x + residual)
    assert torch.equal(got, theirs(x + residual))
    assert all(torch.equal(a, b) for a, b in zip(rotated, turned))


@pytest.mark.parametrize(
    ("scheme", "mode"), [(W8A8, CompilationMode.NONE), (W4A8, CompilationMode.VLLM_COMPILE)]
)
def test_what_vllm_computes_itself_or_compiles_stays_as_it_is(monkeypatch, scheme, mode):
    made = model_of(scheme, mode, monkeypatch)
    assert not ours()
    assert "-rotary_embedding" not in made.compilation_config.custom_ops
