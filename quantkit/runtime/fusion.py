"""Layers that do the work of several: q, k and v as one product, gate and up as one, and what lies between.

Everything is found by role, not by class: siblings `q_proj, k_proj, v_proj` (or `gate_proj, up_proj`)
of one scheme become one product over their stacked rows, computed when the first of them is called and
handed out in parts. A gated MLP and an RMS norm are replaced only where the replacement was seen to give
what the original gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from quantkit.formats.scheme import ActivationFormat
from quantkit.kernels.dispatch import runs_triton
from quantkit.kernels.int4_fp8_linear import int4_fp8_linear
from quantkit.kernels.int4_int8_linear import int4_int8_linear
from quantkit.kernels.rmsnorm_quantize import rmsnorm_quantize
from quantkit.kernels.silu_mul_quantize import silu_mul_quantize
from quantkit.runtime.activations import Quantized, form_name, quantize_activation
from quantkit.runtime.attention import PackedAttention
from quantkit.runtime.cache import PackedLayer
from quantkit.runtime.linear import QuantLinear, stack

_ATTENTION = ("layer_idx", "head_dim", "scaling")
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_GATED = (int4_fp8_linear, int4_int8_linear)
_GATED_ROWS = 128
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class LinearPart(nn.Module):
    """Some of the outputs of a product that its siblings share.

    Args:
        whole: the product over all siblings' rows; registered once, in the parent module.
        index: which of the siblings this is.
        original: the layer whose place it takes.
    """

    def __init__(self, whole: SharedLinear, index: int, original: QuantLinear) -> None:
        super().__init__()
        # In a tuple, so that the weight is not a second time in state_dict and parameters.
        self._whole = (whole,)
        self.index = index
        self.in_features, self.out_features = original.in_features, original.out_features
        self.scheme = original.scheme

    @property
    def whole(self) -> SharedLinear:
        return self._whole[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole.part(x, self.index)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, part {self.index}"


class _State:
    """What a shared product keeps between calls; not in the module, whose attributes are slow to set."""

    def __init__(self) -> None:
        self.last: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        self.carried: tuple[torch.Tensor, Quantized] | None = None


class SharedLinear(nn.Module):
    """One product for sibling layers, which read the same input.

    Args:
        linears: the siblings, of one scheme and one input size.
    """

    def __init__(self, linears: list[QuantLinear]) -> None:
        super().__init__()
        self.linear = stack(linears)
        self.sizes = [linear.out_features for linear in linears]
        self._state = _State()

    def carry(self, x: torch.Tensor, codes: Quantized) -> None:
        """Take the codes of x, made on the way, for when x comes; x must not be changed until then."""
        self._state.carried = (x, codes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All siblings' outputs, [..., sum of out_features]."""
        carried, self._state.carried = self._state.carried, None
        if carried is not None and carried[0] is x:
            return self.linear.product(carried[1], x.dtype)
        return self.linear(x)

    def gated(self, x: torch.Tensor) -> torch.Tensor | None:
        """silu(first half) * second half of the outputs, by the product itself; None where that does not pay.

        It does on a GPU from so many rows on that the outputs' way through memory counts, which this
        halves; with fewer a pass of its own quantizes what it gates.
        """
        form, rows = self.linear.input_form, x.numel() // max(1, x.shape[-1])
        if rows < _GATED_ROWS or form is None or self.linear.op not in _GATED:
            return None
        if not runs_triton(x.device):
            return None
        carried, self._state.carried = self._state.carried, None
        if carried is not None and carried[0] is x:
            return self.linear.product(carried[1], x.dtype, gate=True)
        return self.linear.product(Quantized(*quantize_activation(x, form)), x.dtype, gate=True)

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The outputs of one sibling, [..., out_features]; computed with all others' at the first call."""
        # One read of the attribute: another thread may be in the same layer.
        last = self._state.last
        if last is None or last[0] is not x:
            last = (x, self(x).split(self.sizes, dim=-1))
        # The last sibling's turn: nothing outlives the layer.
        self._state.last = None if index == len(self.sizes) - 1 else last
        return last[1][index]


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), with the activation and down's quantization in one pass where they can be.

    Args:
        mlp: the module whose layers these are; its children keep their names.
    """

    adds_residual = True

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.gate_up_proj: SharedLinear = mlp.gate_up_proj
        self.act_fn = mlp.act_fn

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The output [..., out_features], with `residual` of that shape added where one is given."""
        hidden = self.gate_up_proj.gated(x) if _is_silu(self.act_fn) else None
        if hidden is not None:
            return self.down_proj(hidden, residual)
        gate_up = self.gate_up_proj(x)
        form = self.down_proj.input_form
        if form is not None and _is_silu(self.act_fn):
            codes = Quantized(*silu_mul_quantize(gate_up, form_name(form), form.bits))
            return self.down_proj.product(codes, gate_up.dtype, residual=residual)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up, residual)


class QuantNorm(nn.Module):
    """An RMS norm that quantizes its output on the way, for the layers that read it.

    Args:
        norm: the original; it has `weight` and `variance_epsilon`.
        reader: the layers that read the output.
        form: the format in which they take it.
    """

    def __init__(self, norm: Any, reader: SharedLinear, form: ActivationFormat) -> None:
        super().__init__()
        self._reader = (reader,)  # a tuple: it is registered where it belongs
        self.weight = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon
        self.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, codes, scale, _ = rmsnorm_quantize(
            x, self.weight, self.variance_epsilon, form_name(self.form), self.form.bits
        )
        self._reader[0].carry(y, Quantized(codes, scale))
        return y


def fuse(model: nn.Module) -> None:
    """Put the layers of this module in place; a second call changes nothing."""
    for parent in list(model.modules()):
        for names in SIBLINGS:
            _share(parent, names)
    checked: dict[type, bool] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = _replacement(parent, name, child)
            if replacement is None:
                continue
            kind = type(child)
            if kind not in checked:
                attends = isinstance(replacement, PackedAttention)
                checked[kind] = (_attends_the_same if attends else _same)(child, replacement)
            if checked[kind]:
                setattr(parent, name, replacement)


def _share(parent: nn.Module, names: tuple[str, ...]) -> None:
    linears = [getattr(parent, name, None) for name in names]
    if not all(isinstance(linear, QuantLinear) for linear in linears):
        return
    found: list[Any] = linears
    if len({(linear.scheme, linear.in_features) for linear in found}) > 1:
        return
    whole = SharedLinear(found)
    joined = "".join(name[0] for name in names) if len(names) == 3 else "gate_up"
    setattr(parent, f"{joined}_proj", whole)
    for index, name in enumerate(names):
        setattr(parent, name, LinearPart(whole, index, found[index]))


def _replacement(parent: nn.Module, name: str, child: Any) -> nn.Module | None:
    children = set(dict(child.named_children()))
    if isinstance(getattr(child, "gate_up_proj", None), SharedLinear):
        if children <= {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn"}:
            return GatedMLP(child) if isinstance(child.down_proj, QuantLinear) else None
    elif isinstance(getattr(child, "qkv_proj", None), SharedLinear):
        known = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "kv_quantizer"}
        ours = children == known and isinstance(child.o_proj, QuantLinear)
        if ours and all(hasattr(child, name) for name in _ATTENTION):
            return PackedAttention(child)
    elif hasattr(child, "variance_epsilon") and hasattr(child, "weight") and not children:
        reader = _reader_of(parent, name)
        form = reader.linear.input_form if reader is not None else None
        if reader is not None and form is not None:
            return QuantNorm(child, reader, form)
    return None


def _reader_of(layer: nn.Module, norm: str) -> SharedLinear | None:
    """The one product that reads what a layer's norm gives."""
    try:
        linears: list[Any] = [layer.get_submodule(name) for name in _READERS.get(norm, ())]
    except AttributeError:
        return None
    readers = {linear.whole for linear in linears if isinstance(linear, LinearPart)}
    return readers.pop() if len(readers) == 1 else None


def _is_silu(activation: Any) -> bool:
    return (
        isinstance(activation, nn.SiLU)
        or activation is F.silu
        or "silu" in type(activation).__name__.lower()
    )


@torch.inference_mode()
def _attends_the_same(original: Any, replacement: nn.Module) -> bool:
    """Whether both give the same for three tokens and then a fourth."""
    weight = original.o_proj.packed
    generator = torch.Generator().manual_seed(0)
    features = original.qkv_proj.linear.in_features
    dtype = torch.bfloat16
    x = torch.randn(1, 4, features, generator=generator).to(weight.device, dtype)
    angles = torch.rand(1, 4, original.head_dim // 2, generator=generator) * 6
    angles = torch.cat((angles, angles), dim=-1).to(weight.device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    outputs = []
    for module in (original, replacement):
        layers = [PackedLayer(original.kv_quantizer) for _ in range(original.layer_idx + 1)]
        cache = Cache(layers=layers)
        for tokens in (slice(0, 3), slice(3, 4)):
            arguments = {
                "position_embeddings": (cos[:, tokens], sin[:, tokens]),
                "attention_mask": None,
                "past_key_values": cache,
            }
            try:
                outputs.append(module(x[:, tokens], **arguments)[0])
            except (TypeError, ValueError, RuntimeError):
                return False  # it wants other arguments, or turns other parts of a head
    expected, actual = torch.cat(outputs[:2], 1).float(), torch.cat(outputs[2:], 1).float()
    return bool((expected - actual).norm() <= 1e-2 * expected.norm())


@torch.inference_mode()
def _same(original: Any, replacement: nn.Module) -> bool:
    """Whether both give the same on random input, up to the rounding of one code in a hundred."""
    weight = next((t for t in (*replacement.parameters(), *replacement.buffers())), None)
    gate: Any = getattr(replacement, "gate_proj", None)
    features = original.weight.numel() if gate is None else gate.in_features
    device = weight.device if weight is not None else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    dtype = next(
        (t.dtype for t in replacement.parameters() if t.dtype.is_floating_point), torch.bfloat16
    )
    x = torch.randn(1, 3, features, generator=generator).to(device, dtype)
    expected, actual = original(x).float(), replacement(x).float()
    return bool((expected - actual).norm() <= 1e-2 * expected.norm())
