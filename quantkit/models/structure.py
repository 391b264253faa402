"""What a decoder model is made of, found by looking at its modules rather than by a file per architecture.

A model is taken if each decoder layer is two residual branches, `norm -> attention` and `norm -> gated MLP`,
with the linears below. Anything else is refused by name: a transform applied to a structure it was not
made for would change the function in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.models.groups import Attention, Feeder, InputGroup, LayerStructure

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LINEARS = tuple(f"self_attn.{n}" for n in _ATTENTION) + tuple(f"mlp.{n}" for n in _MLP)
SUPPORTED = "Llama, Mistral, Qwen2, Qwen3 and models built like them"


@dataclass(frozen=True, eq=False)
class Structure:
    """The shape of a decoder model.

    Attributes:
        layers: path of the decoder layers' ModuleList, e.g. `model.layers`.
        layer_structures: one per decoder layer.
    """

    model_type: str
    architecture: str
    layers: str
    layer_structures: tuple[LayerStructure, ...]
    max_positions: int

    @property
    def num_layers(self) -> int:
        return len(self.layer_structures)

    def layer(self, number: int) -> LayerStructure:
        return self.layer_structures[number]

    def groups(self, number: int) -> tuple[InputGroup, ...]:
        """The input groups of a decoder layer."""
        return self.layer(number).groups

    def prefix(self, number: int) -> str:
        """What names in a decoder layer begin with, with a dot at its end."""
        return f"{self.layers}.{number}."

    def modules(self) -> Iterator[tuple[str, str]]:
        """(full name, name within the layer) of every linear of every decoder layer."""
        for number, layer in enumerate(self.layer_structures):
            for linear in layer.shapes:
                yield self.prefix(number) + linear, linear

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Full name -> (out, in) of every linear of every decoder layer."""
        return {
            self.prefix(number) + linear: shape
            for number, layer in enumerate(self.layer_structures)
            for linear, shape in layer.shapes.items()
        }


def load_config(config: dict[str, Any], where: str) -> Any:
    """A transformers config object from config.json's content; no remote code is ever run."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise QuantkitError(f"{where}: config.json names no model_type")
    if model_type not in CONFIG_MAPPING:
        raise QuantkitError(
            f"{where}: model_type {model_type!r} is unknown to transformers; {SUPPORTED} work"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(
            {k: v for k, v in config.items() if k != "quantization_config"}
        )
    except Exception as error:  # transformers validates with errors of many classes
        raise QuantkitError(
            f"{where}: config.json is not valid for {model_type!r} ({_one_line(error)})"
        ) from None


def build_skeleton(config: Any, where: str, *, attention: str = "sdpa") -> nn.Module:
    """The model with its parameters on the meta device and its buffers (RoPE's frequencies) real."""
    from accelerate import init_empty_weights
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(
        config, "is_encoder_decoder", False
    ):
        raise QuantkitError(
            f"{where}: {config.model_type!r} is not a causal language model; {SUPPORTED} work"
        )
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention
            )
    except Exception as error:
        raise QuantkitError(
            f"{where}: transformers cannot build this {config.model_type!r} ({_one_line(error)})"
        ) from None
    return model.eval()


def find_structure(model: nn.Module, where: str) -> Structure:
    """The structure of a model built by `build_skeleton`.

    Raises:
        QuantkitError: the model is not built as this module's docstring says, with what differs.
    """
    config: Any = model.config
    name = type(model).__name__

    def refuse(why: str) -> QuantkitError:
        return QuantkitError(
            f"{where}: {name} ({config.model_type}) is not supported: {why}; {SUPPORTED} work"
        )

    layers = [
        (path, module) for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", -1)
    ]  # fmt: skip
    if len(layers) != 1 or not layers[0][1]:
        raise refuse("no single list of decoder layers was found")
    path, blocks = layers[0][0], list[Any](layers[0][1])
    expected = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    for number, block in enumerate(blocks):
        children = dict(block.named_children())
        if set(children) != expected:
            raise refuse(
                f"layer {number} has {', '.join(sorted(children))}, not {', '.join(sorted(expected))}"
            )
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        if set(linears) != set(_LINEARS):
            raise refuse(
                f"layer {number} has linears {', '.join(sorted(linears)) or 'of another kind'}"
            )
        for norm in ("input_layernorm", "post_attention_layernorm"):
            if not _is_rms_norm(children[norm]):
                raise refuse(
                    f"layer {number}'s {norm} is not a plain RMSNorm (weight * normalised input)"
                )
    block = blocks[0]
    norms = {n for n, _ in block.self_attn.named_children()} - set(_ATTENTION) - {"rotary_fn"}
    if norms not in (set(), {"q_norm", "k_norm"}) or not set(_MLP) <= {
        n for n, _ in block.mlp.named_children()
    }:
        raise refuse(f"its attention has {', '.join(sorted(norms))}")
    if getattr(config, "partial_rotary_factor", None) not in (None, 1.0):
        raise refuse("RoPE turns only a part of each head")
    shapes = {n: tuple(block.get_submodule(n).weight.shape) for n in _LINEARS}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if shapes["self_attn.k_proj"][0] != config.num_key_value_heads * head_dim:
        raise refuse(f"k_proj has {shapes['self_attn.k_proj'][0]} rows, not KV heads x head_dim")
    attention = Attention(
        "self_attn",
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        key_norm=bool(norms),
    )
    layer = _layer(attention, {n: (int(s[0]), int(s[1])) for n, s in shapes.items()})
    return Structure(
        model_type=config.model_type,
        architecture=name,
        layers=path,
        layer_structures=(layer,) * len(blocks),
        max_positions=int(getattr(config, "max_position_embeddings", 2048)),
    )


def _layer(attention: Attention, shapes: dict[str, tuple[int, int]]) -> LayerStructure:
    qkv, gate_up = _LINEARS[:3], _LINEARS[4:6]
    channels = torch.arange(attention.heads * attention.head_dim)
    repeats = attention.heads // attention.kv_heads
    head, channel = channels // attention.head_dim, channels % attention.head_dim
    from_v = head // repeats * attention.head_dim + channel
    from_up = torch.arange(shapes["mlp.up_proj"][0])
    return LayerStructure(
        groups=(
            InputGroup("qkv", "qkv", qkv, Feeder("input_layernorm", True)),
            InputGroup(
                "o", "o", ("self_attn.o_proj",), Feeder("self_attn.v_proj", False, rows=from_v)
            ),
            InputGroup("gate_up", "gate_up", gate_up, Feeder("post_attention_layernorm", True)),
            InputGroup(
                "down", "down", ("mlp.down_proj",), Feeder("mlp.up_proj", False, rows=from_up)
            ),
        ),
        shapes=shapes,
        fused=(qkv, gate_up),
        attention=attention,
        mlp="mlp",
    )


def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether norm(x) = weight * x / rms(x), found by trying it: Gemma's is (1 + weight) under the same name."""
    parameters = dict(norm.named_parameters())
    if set(parameters) != {"weight"}:
        return False
    x = torch.linspace(-1.0, 2.0, parameters["weight"].shape[0])
    weight = torch.linspace(0.5, 3.0, x.numel())
    try:
        got = torch.func.functional_call(norm, {"weight": weight}, (x[None],))
    except (RuntimeError, TypeError, AttributeError):
        return False
    want = weight * x / x.square().mean().sqrt()
    return bool(torch.allclose(got[0].float(), want, rtol=1e-2, atol=1e-3))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
