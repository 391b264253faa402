"""Tiny random models that every part of the library is tested on; offline, made in a second."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

VOCAB = 512
_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_HEADS = {"num_key_value_heads": 4}
# Name -> (model_type, what differs from _SIZES; None leaves a size out). Every structure that quantkit knows.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "phi3": ("phi3", {}),
    "opt": ("opt", {"ffn_dim": 512, "word_embed_proj_dim": 256} | _HEADS),
    "opt-350m": (
        "opt",
        {"ffn_dim": 512, "word_embed_proj_dim": 128, "do_layer_norm_before": False} | _HEADS,
    ),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.25} | _HEADS),
    "falcon": (
        "falcon",
        {"alibi": False, "bias": True, "head_dim": None, "intermediate_size": None},
    ),
    "falcon-40b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    ),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2-moe": ("qwen2_moe", _MOE | {"shared_expert_intermediate_size": 128}),
    "qwen3-moe": ("qwen3_moe", _MOE),
    "llama4": (
        "llama4_text",
        {"num_local_experts": 4, "intermediate_size_mlp": 384, "interleave_moe_layer_step": 2},
    ),
}


@functools.cache
def skeleton_of(variant: str) -> Any:
    """A variant on the meta device, made once."""
    from quantkit.models.structure import build_skeleton

    return build_skeleton(make_config(variant), variant)


@functools.cache
def structure_of(variant: str) -> Any:
    """The structure of a variant, found once."""
    from quantkit.models.structure import find_structure

    return find_structure(skeleton_of(variant), variant)


def make_config(variant: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    model_type, differences = VARIANTS.get(variant, (variant, {}))
    sizes = _SIZES | differences | changes
    return CONFIG_MAPPING[model_type](
        **{k: v for k, v in sizes.items() if v is not None or k == "sliding_window"}
    )


def make_model(variant: str, **changes: Any) -> Any:
    """A random model in float32 whose norms and biases are random too: at 1 and 0 they hide mistakes."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(variant, **changes)).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith("bias"):
            # Gemma's norms multiply by 1 + weight.
            low = -0.5 if "gemma" in variant else 0.5
            torch.nn.init.uniform_(parameter, low, low + 1.0)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            # Where it is the output layer too, a larger one makes a model that knows less than nothing.
            tied = "embed" in name and variant in ("gemma", "bloom")
            torch.nn.init.normal_(parameter, std=0.01 if tied else 0.05)
    return model


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer over the same vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(str(folder))


def save_model(
    folder: Path, variant: str = "llama", *, shard_size: str = "5GB", **changes: Any
) -> Path:
    import torch

    make_model(variant, **changes).to(torch.bfloat16).save_pretrained(
        str(folder), max_shard_size=shard_size
    )
    save_tokenizer(folder)
    return folder
