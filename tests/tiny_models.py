"""Tiny random models that every part of the library is tested on; offline, made in a second."""

from __future__ import annotations

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


def make_config(model_type: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    sizes = _SIZES | ({"sliding_window": None} if model_type == "mistral" else {}) | changes
    return CONFIG_MAPPING[model_type](**sizes)


def make_model(model_type: str, **changes: Any) -> Any:
    """A random model in float32 whose norms and biases are random too: at 1 and 0 they hide mistakes."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(model_type, **changes)).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=0.05)
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
    folder: Path, model_type: str = "llama", *, shard_size: str = "5GB", **changes: Any
) -> Path:
    import torch

    make_model(model_type, **changes).to(torch.bfloat16).save_pretrained(
        str(folder), max_shard_size=shard_size
    )
    save_tokenizer(folder)
    return folder
