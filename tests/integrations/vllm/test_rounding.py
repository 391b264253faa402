"""Norms, RoPE and attention of an emulated model round as transformers' do, bit for bit. Run by an interpreter with vLLM.

/path/to/vllm/bin/python -m pytest tests/integrations/vllm/test_rounding.py
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from transformers.integrations.sdpa_attention import sdpa_attention_forward
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
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from quantkit.formats.config import build_quantization_config
from quantkit.formats.scheme import ActivationFormat, Scheme, WeightFormat
from quantkit.integrations.vllm.config import QuantkitConfig
from quantkit.integrations.vllm.prompts import attend_as_transformers

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


def attention_of(**changes) -> CPUAttentionBackendImpl:
    settings = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"} | changes
    asked = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attn, "get_current_vllm_config", lambda: asked)
        return CPUAttentionBackendImpl(HEADS, HEAD, HEAD**-0.5, 2, **settings)


@pytest.mark.parametrize("window", [None, 50])
def test_a_prompt_that_comes_whole_attends_as_transformers(monkeypatch, window):
    """What is left to vLLM's kernel: the rest of a prompt that was cached, a new token, a prompt beyond the window."""
    impl = attention_of(sliding_window=window)
    attend_as_transformers(SimpleNamespace(impl=impl))
    given, seen = [], [40, 60, 1, 30, 1]
    lengths = [40, 60, 90, 35, 1]  # the third and fourth have keys in the cache
    for heads in (HEADS, 2, 2):
        given.append(torch.randn(sum(seen), heads, HEAD).bfloat16())
    starts = torch.tensor([0, *seen]).cumsum(0)
    batch = SimpleNamespace(
        query_start_loc=starts, seq_lens=torch.tensor(lengths), causal=True, dynamic_causal=None
    )
    monkeypatch.setattr(
        CPUAttentionBackendImpl, "forward", lambda self, *args: args[6].fill_(torch.nan)
    )
    output = impl.forward(None, *given, None, batch, torch.empty(sum(seen), HEADS, HEAD).bfloat16())
    theirs = SimpleNamespace(is_causal=True, num_key_value_groups=HEADS // 2, training=False)
    for number, rows in enumerate(slice(a, b) for a, b in itertools.pairwise(starts.tolist())):
        if number == 0 or (number == 1 and window is None):
            shaped = (t[rows].transpose(0, 1)[None] for t in given)
            want, _ = sdpa_attention_forward(theirs, *shaped, None, scaling=HEAD**-0.5)
            assert torch.equal(output[rows], want[0])
        else:
            assert output[rows].isnan().all()


@pytest.mark.parametrize(
    "changes",
    [{"alibi_slopes": [0.5] * HEADS}, {"logits_soft_cap": 30.0}, {"kv_cache_dtype": "fp8"}],
)
def test_attention_that_torchs_kernel_does_not_know_stays_vllms(changes):
    impl = attention_of(**changes)
    attend_as_transformers(SimpleNamespace(impl=impl))
    assert type(impl) is CPUAttentionBackendImpl


@pytest.mark.parametrize(
    ("scheme", "replaced"), [(W4A8, True), (W8A8, False)], ids=["emulated", "vLLM's"]
)
def test_an_emulated_models_layers_attend_so(monkeypatch, scheme: Scheme, replaced: bool):
    model_of(W8A8, CompilationMode.NONE, monkeypatch)
    made = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    quant = QuantkitConfig.from_config(
        build_quantization_config({"linear": scheme}, ["lm_head"], None, {})
    )
    layer = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.impl = attention_of()
    with set_current_vllm_config(made):
        quant.get_quant_method(layer, "model.layers.0.self_attn.attn")
    assert (type(layer.impl) is not CPUAttentionBackendImpl) == replaced
