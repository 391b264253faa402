"""Planting the outliers that large models have and small ones lack, without changing the model's function.

Quantization methods exist because of outliers: a few residual channels, a few channels of the gated product
and a few RoPE pairs of the keys are tens of times larger than the rest. A small trained model has none, so
every method looks the same on it. Each factor here is undone by the weight that reads what it scales.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


class _Draw:
    """Seeded choices of channels and factors."""

    def __init__(self, factor: tuple[float, float], seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._low, self._high = (math.log(f) for f in factor)

    def channels(self, size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=self._generator)[:count]

    def factors(self, count: int) -> Tensor:
        """float64 [count], log-uniform."""
        unit = torch.rand(count, dtype=torch.float64, generator=self._generator)
        return torch.exp(self._low + unit * (self._high - self._low))


def plant_outliers(
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    *,
    factor: tuple[float, float] = (20.0, 60.0),
    channels: int = 4,
    pairs: int = 2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A Llama-like state dict with outliers planted in every layer; the model computes what it did.

    Args:
        tensors: `model.layers.N...` weights and biases, norms included, as in a checkpoint.
        config: config.json's content (heads, layers).
        factor: the range of the factors, drawn log-uniformly.
        channels: outlier channels per norm and per gated product.
        pairs: outlier RoPE pairs per KV head.
        seed: of the choice.

    Returns:
        A new dictionary; tensors that changed are back in their own types.

    Raises:
        ValueError: a tensor that a factor must be undone in is missing, or the family is Gemma's, whose norms
            multiply by 1 + weight and follow the projections too.
    """
    if "gemma" in str(config.get("model_type", "")):
        raise ValueError(f"{config['model_type']} is not a Llama-like model")
    if not 0 < factor[0] <= factor[1]:
        raise ValueError(f"factor: {factor} is no range of positive numbers")
    draw = _Draw(factor, seed)
    # Everything in float64 until the end, so that each tensor is rounded once.
    wide = {name: t.double() for name, t in tensors.items() if ".layers." in name}
    for layer in range(config["num_hidden_layers"]):
        view = _Layer(wide, f"model.layers.{layer}.")
        for norm, readers in _READERS.items():
            chosen = draw.channels(view.get(f"{norm}.weight").numel(), channels)
            up = draw.factors(len(chosen))
            view.scale_rows(norm, chosen, up)
            for reader in readers:
                view.scale_columns(reader, chosen, 1 / up)
        rows = view.get("mlp.up_proj.weight").shape[0]
        chosen = draw.channels(rows, channels)
        up = draw.factors(len(chosen))
        view.scale_rows("mlp.up_proj", chosen, up)
        view.scale_columns("mlp.down_proj", chosen, 1 / up)
        _plant_keys(view, config, draw, pairs)
    changed = {name: t.to(tensors[name].dtype) for name, t in wide.items()}
    return tensors | changed


def _plant_keys(view: _Layer, config: dict[str, Any], draw: _Draw, pairs: int) -> None:
    """RoPE pairs of the keys up, of the queries that meet them down: both members by one factor, so RoPE agrees."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or config["hidden_size"] // heads
    if view.has("self_attn.k_norm.weight"):
        # A norm after the projection would undo a factor before it; its own weight is shared by all heads.
        chosen = draw.channels(dim // 2, pairs)
        up = draw.factors(len(chosen))
        both, ups = torch.cat([chosen, chosen + dim // 2]), torch.cat([up, up])
        view.scale_rows("self_attn.k_norm", both, ups)
        view.scale_rows("self_attn.q_norm", both, 1 / ups)
        return
    for head in range(kv_heads):
        chosen = draw.channels(dim // 2, pairs)
        up = draw.factors(len(chosen))
        both, ups = torch.cat([chosen, chosen + dim // 2]), torch.cat([up, up])
        view.scale_rows("self_attn.k_proj", head * dim + both, ups)
        group = heads // kv_heads
        for query in range(head * group, (head + 1) * group):
            view.scale_rows("self_attn.q_proj", query * dim + both, 1 / ups)


class _Layer:
    """The tensors of one decoder layer, changed in place."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def has(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def get(self, name: str) -> Tensor:
        if not self.has(name):
            raise ValueError(f"{self._prefix + name} is missing: not a Llama-like checkpoint")
        return self._tensors[self._prefix + name]

    def scale_rows(self, module: str, rows: Tensor, by: Tensor) -> None:
        """A linear's output channels (bias included), or a norm's channels."""
        weight = self.get(f"{module}.weight")
        weight[rows] *= by[:, None] if weight.ndim == 2 else by
        if self.has(f"{module}.bias"):
            self.get(f"{module}.bias")[rows] *= by

    def scale_columns(self, module: str, columns: Tensor, by: Tensor) -> None:
        self.get(f"{module}.weight")[:, columns] *= by
