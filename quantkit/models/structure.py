"""What a decoder model is made of, found by trying its layers rather than by a file per architecture.

Each kind of decoder layer is run without its weights (`probe`), and the numbers show how data flows
(`discover`). What cannot be understood is refused by name: a transform applied to a structure it was not made for
would change the function in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.models.discover import Unsupported, find_layer
from quantkit.models.entry import LayerCall, layer_calls, outside
from quantkit.models.experts import unstack_experts
from quantkit.models.groups import InputGroup, LayerStructure, Place
from quantkit.models.probe import NAME, TOKENS, ProbedLayer, register

SUPPORTED = "decoders such as Llama, Gemma, OPT or Mixtral"


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

    @property
    def kinds(self) -> tuple[LayerStructure, ...]:
        """The different ones among the layers."""
        return tuple({id(layer): layer for layer in self.layer_structures}.values())

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

    def places(self) -> dict[str, Place]:
        """Full name -> place of every linear of every decoder layer."""
        return {
            self.prefix(number) + linear: group.place
            for number, layer in enumerate(self.layer_structures)
            for group in layer.groups
            for linear in group.linears
        }

    def others(self) -> list[str]:
        """Full names of what reads the inputs of linears and is never quantized: routers."""
        return [
            self.prefix(number) + name
            for number in range(self.num_layers)
            for group in self.groups(number)
            for name in group.others
        ]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Full name -> (out, in) of every linear of every decoder layer."""
        return {
            self.prefix(number) + linear: shape
            for number, layer in enumerate(self.layer_structures)
            for linear, shape in layer.shapes.items()
        }


def load_config(config: dict[str, Any], where: str, *, code: Path | None = None) -> Any:
    """A transformers config object from config.json's content.

    Args:
        code: the checkpoint's folder, where the user said that its own code may run (`--trust-remote-code`).
            Only a model type that transformers does not know is then read with it.

    Raises:
        QuantkitError: it is not valid, or needs code of its own that may not run.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise QuantkitError(f"{where}: config.json names no model_type")
    if model_type not in CONFIG_MAPPING:
        own = config.get("auto_map")
        if own and code is None:
            raise QuantkitError(
                f"{where}: model_type {model_type[:60]!r} needs Python code that comes with the checkpoint (auto_map); "
                "read it, and if you trust it use --trust-remote-code"
            )
        if not own:
            raise QuantkitError(
                f"{where}: model_type {model_type[:60]!r} is unknown to transformers; {SUPPORTED} work"
            )
    try:
        if model_type not in CONFIG_MAPPING:
            return AutoConfig.from_pretrained(str(code), trust_remote_code=True)
        return CONFIG_MAPPING[model_type].from_dict(
            {k: v for k, v in config.items() if k != "quantization_config"}
        )
    except Exception as error:  # transformers validates with errors of many classes
        raise QuantkitError(
            f"{where}: config.json is not valid for {model_type!r} ({_one_line(error)})"
        ) from None


def build_skeleton(config: Any, where: str, *, attention: str = "sdpa") -> nn.Module:
    """The model with its parameters on the meta device and its buffers (RoPE's frequencies) real.

    Experts are single linears. Where the model's own attention cannot be exchanged for `attention`, it keeps its own.
    """
    from accelerate import init_empty_weights
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    own = type(config).__module__.startswith("transformers_modules.")
    if not own and (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or getattr(config, "is_encoder_decoder", False)
    ):
        raise QuantkitError(
            f"{where}: {config.model_type!r} is not a causal language model; {SUPPORTED} work"
        )
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if attention != "sdpa" and not getattr(made, "_supports_attention_backend", False):
        attention = "sdpa"
    if not getattr(made, "_supports_sdpa", False):
        attention = "eager"
    try:
        with init_empty_weights(include_buffers=False):
            # A config of a class of the checkpoint's own is there only if the user trusts its code.
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=own
            )
    except Exception as error:
        raise QuantkitError(
            f"{where}: transformers cannot build this {config.model_type!r} ({_one_line(error)})"
        ) from None
    unstack_experts(model)
    return model.eval()


@torch.no_grad()
def find_structure(model: nn.Module, where: str) -> Structure:
    """The structure of a model built by `build_skeleton`.

    Raises:
        QuantkitError: the model is not built as `discover` understands, with what differs.
    """
    config: Any = model.config
    name = type(model).__name__

    def refuse(why: str) -> QuantkitError:
        return QuantkitError(f"{where}: {name} ({config.model_type}) is not supported: {why}")

    layers = [
        (path, module) for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", -1)
    ]  # fmt: skip
    layers = [
        found for found in layers
        if not any(found[0].startswith(f"{other}.") for other, _ in layers)
    ]  # fmt: skip
    if len(layers) != 1 or not layers[0][1]:
        raise refuse("no single list of decoder layers was found")
    path, blocks = layers[0][0], list[Any](layers[0][1])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = [_kind(block) for block in blocks]
    known: dict[Any, LayerStructure] = {}
    number = 0
    with _probing(model):
        try:
            calls = _calls(model, path, int(config.hidden_size))
            for number, (kind, block) in enumerate(zip(kinds, blocks)):
                if kind not in known:
                    probe = ProbedLayer(block, calls[number], int(config.hidden_size))
                    known[kind] = find_layer(probe, int(head_dim))
        except Unsupported as error:
            raise refuse(f"layer {number}: {error}") from None
        except Exception as error:  # a model may fail in any way on what others take
            raise refuse(f"layer {number} cannot be run alone ({_one_line(error)})") from None
    return Structure(
        model_type=config.model_type,
        architecture=name,
        layers=path,
        layer_structures=tuple(known[kind] for kind in kinds),
        max_positions=int(getattr(config, "max_position_embeddings", None) or 2048),
    )


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What layers of one structure have in common: modules, shapes, and switches such as RoPE or none."""
    return tuple(
        (
            name,
            type(module),
            tuple((n, tuple(p.shape)) for n, p in module._parameters.items() if p is not None),
            tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, str)))),
        )
        for name, module in block.named_modules()
    )


@contextmanager
def _probing(model: Any) -> Iterator[None]:
    """Within the context, attention layers hand what they attend over to `probe`, where they can."""
    register()
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME if model._supports_attention_backend else "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _calls(model: Any, layers: str, hidden: int) -> list[LayerCall]:
    """What a model calls each layer with, found on a model whose other weights are zeros that take no memory."""

    def zeros(_: str, parameter: nn.Parameter) -> torch.Tensor:
        return torch.zeros(()).expand(parameter.shape)

    with outside(model, layers, zeros) as embedding:
        size = getattr(embedding, "embedding_dim", hidden)
        return layer_calls(model, layers, torch.zeros(1, TOKENS, size))[1]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
