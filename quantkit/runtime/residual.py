"""Decoder layers whose two additions are done by the products before them, on a GPU.

    h = h + attention(norm(h)); h = h + mlp(norm(h)): each block ends with a linear layer, whose kernel can
add h to what it writes. That leaves out one pass over memory and one launch per addition. On a CPU
an addition is a few microseconds beside products of milliseconds, and stays.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from quantkit.kernels.dispatch import runs_triton
from quantkit.runtime.attention import PackedAttention
from quantkit.runtime.cache import PackedLayer
from quantkit.runtime.linear import QuantLinear

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_LAST = {"self_attn": "o_proj", "mlp": "down_proj"}


class AddingBlock:
    """A block of a decoder layer, called with what its output is added to.

    Args:
        block: a module of ours whose `forward` takes a `residual`, or any whose output is that of its
            linear layer `last`, or another, whose output is added behind it.
        last: the linear layer's name.
    """

    def __init__(self, block: nn.Module, last: str) -> None:
        self.takes_it = getattr(block, "adds_residual", False)
        linear = getattr(block, last, None)
        self.linear = linear if isinstance(linear, QuantLinear) and not self.takes_it else None
        self.block = block if self.linear is None else _without(block, last)

    @property
    def adds(self) -> bool:
        """Whether a product does the addition."""
        return self.takes_it or self.linear is not None

    def __call__(self, residual: torch.Tensor, *inputs: torch.Tensor, **named: Any) -> torch.Tensor:
        if self.takes_it:
            named["residual"] = residual
        output = self.block(*inputs, **named)
        output = output[0] if isinstance(output, tuple) else output
        if self.linear is not None:
            return self.linear(output, residual)
        return output if self.takes_it else residual + output


def add_in_products(model: nn.Module) -> None:
    """Give the decoder layers of a model on a GPU a `forward` that adds in products; a second call changes nothing.

    Layers are found by their parts, and each is changed only where it then gives what it gave before.
    Their classes, names and children stay. Whoever hooks a block sees its output with the addition done,
    or what its last linear layer reads.
    """
    for layer in model.modules():
        if _may_add(layer):
            blocks = tuple(AddingBlock(getattr(layer, name), last) for name, last in _LAST.items())
            if any(block.adds for block in blocks) and _same(layer, blocks):
                layer._adding = blocks  # type: ignore[assignment]
                layer.forward = MethodType(_forward, layer)


def _may_add(layer: Any) -> bool:
    parts = {
        name for name, child in layer.named_children()
        if not (isinstance(child, nn.Dropout) and child.p == 0)
    }  # fmt: skip
    # A forward of its own is somebody's hook, or ours.
    if parts != _PARTS or "forward" in vars(layer) or not hasattr(layer.self_attn, "head_dim"):
        return False
    found = next((m for m in layer.modules() if isinstance(m, QuantLinear)), None)
    return found is not None and runs_triton(found.weight_scale.device)


def _forward(self: Any, hidden_states: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
    if others or self.training:
        output: torch.Tensor = type(self).forward(self, hidden_states, *others, **named)
        return output
    return _run(self, self._adding, hidden_states, named)


def _run(
    layer: Any, blocks: tuple[AddingBlock, ...], x: torch.Tensor, named: dict[str, Any]
) -> torch.Tensor:
    attend, feed = blocks
    x = attend(x, hidden_states=layer.input_layernorm(x), **named)
    return feed(x, layer.post_attention_layernorm(x))


def _without(block: nn.Module, name: str) -> nn.Module:
    """A twin of a block with the same children but for one, whose place an identity takes."""
    twin = copy.copy(block)
    twin._modules = block._modules | {name: nn.Identity()}
    return twin


@torch.inference_mode()
def _same(layer: Any, blocks: tuple[AddingBlock, ...]) -> bool:
    """Whether the layer gives the same for three tokens, and then for a fourth, either way."""
    weight = layer.post_attention_layernorm.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, weight.numel(), generator=generator).to(weight.device, weight.dtype)
    angles = torch.rand(1, 4, layer.self_attn.head_dim // 2, generator=generator) * 6
    angles = torch.cat((angles, angles), dim=-1).to(weight.device)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    outputs: list[torch.Tensor] = []
    for run in (layer.forward, lambda given, **named: _run(layer, blocks, given, named)):
        cache = _cache(layer.self_attn)
        for tokens in (slice(0, 3), slice(3, 4)):
            try:
                y = run(
                    x[:, tokens],
                    attention_mask=None,
                    position_ids=torch.arange(4, device=x.device)[None, tokens],
                    past_key_values=cache,
                    use_cache=cache is not None,
                    position_embeddings=(cos[:, tokens], sin[:, tokens]),
                )
            except (TypeError, ValueError, RuntimeError, AttributeError):
                return False  # it wants other arguments, or turns other parts of a head
            if not isinstance(y, torch.Tensor):
                return False
            outputs.append(y)
    expected, actual = torch.cat(outputs[:2], 1).float(), torch.cat(outputs[2:], 1).float()
    # Beside what the layer adds, which is little where the weights are small.
    return bool((expected - actual).norm() <= 1e-2 * (expected - x.float()).norm())


def _cache(attention: Any) -> Cache | None:
    if not isinstance(attention, PackedAttention):
        return None
    quantizer: Any = attention.kv_quantizer
    return Cache(layers=[PackedLayer(quantizer) for _ in range(attention.layer_idx + 1)])
