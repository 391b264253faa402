"""A probed layer -> its structure: who shares an input, who feeds whom, and which factors may pass between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quantkit.models.attention import find_attention
from quantkit.models.experts import Expert
from quantkit.models.groups import Feeder, InputGroup, LayerStructure, Place
from quantkit.models.probe import TOKENS, ProbedLayer, Run


class Unsupported(Exception):
    """A layer is not built as any that can be quantized; the message says what differs."""


@dataclass
class _Flow:
    """Who feeds whom.

    Attributes:
        readers: norm's name, or "" for the layer's own input -> what reads it.
        fed: a linear fed by others -> those.
        mixed: the linears whose input mixes tokens: attention's outputs.
    """

    readers: dict[str, list[str]]
    fed: dict[str, list[str]]
    mixed: list[str]


def find_layer(probe: ProbedLayer, head_dim: int) -> LayerStructure:
    """The structure of a layer.

    Args:
        head_dim: of its attention.

    Raises:
        Unsupported: with what differs.
    """
    if not probe.linears:
        raise Unsupported(f"it has no linear, but {probe.matrices()}")
    base = probe.run()
    flow = _find_flow(probe, base)
    if len(flow.mixed) != 1:
        raise Unsupported(f"attention has {len(flow.mixed)} output projections, not one")
    o = flow.mixed[0]
    groups = [_by_norm(probe, base, flow, norm, o) for norm in flow.readers]
    groups = [group for group in groups if group.linears]
    qkv = flow.fed[o]
    attention = find_attention(probe, qkv, o, head_dim)
    first = [InputGroup("o", "o", (o,), *_from_values(probe, qkv, o))]
    pairs = {down: sources for down, sources in flow.fed.items() if down != o}
    downs = [_down(probe, down, sources, len(pairs) > 1) for down, sources in pairs.items()]
    downs += [group for name in probe.experts for group in _expert_downs(probe, name)]
    fused = [tuple(qkv), *(tuple(sources) for sources in pairs.values())]
    fused += [tuple(_expert_linears(probe, name)) for name in probe.experts]
    by_place = {g.place: g for g in groups}
    if "qkv" not in by_place or not downs:
        raise Unsupported("no attention and MLP that read a norm or the layer's input were found")
    before = [g for g in groups if g.place == "qkv"]
    after = [g for g in groups if g.place != "qkv"]
    ordered = (*before, *first, *after, *downs)
    names = [name for group in ordered for name in group.linears]
    return LayerStructure(
        groups=ordered,
        shapes={name: probe.shape(name) for name in probe.linears if name in names},
        fused=tuple(names for names in fused if len(names) > 1),
        attention=attention,
        mlp=_common_parent([g.linears[0] for g in downs] + [n for g in after for n in g.linears]),
    )


def _find_flow(probe: ProbedLayer, base: Run) -> _Flow:
    readers: dict[str, list[str]] = {}
    for name, seen in base.inputs.items():
        for norm, output in [("", probe.inputs[0]), *base.norms.items()]:
            if _proportional(seen, output, exactly=name not in probe.experts):
                readers.setdefault(norm, []).append(name)
                break
    direct = {name for names in readers.values() for name in names}
    missing = [n for n in probe.constants if n not in base.inputs]
    if missing:
        raise Unsupported(f"{missing[0]} is not used")
    fed: dict[str, list[str]] = {}
    mixed = []
    for source in [n for n in probe.constants if n in direct and n not in probe.experts]:
        constant = probe.constants[source]
        before = constant.output
        constant.output = before.clone()
        constant.output[1] = probe.random(constant.out_features)
        changed = probe.run()
        constant.output = before
        for name, seen in base.inputs.items():
            if name in direct or name not in probe.constants:
                continue
            moved = (changed.inputs[name] - seen).abs().amax(-1) > 1e-5
            if bool(moved[0]):
                raise Unsupported("attention looks ahead: it is no decoder")
            if bool(moved.any()):
                fed.setdefault(name, []).append(source)
                if bool(moved[2]) and name not in mixed:
                    mixed.append(name)
    lost = [n for n in probe.constants if n not in direct and n not in fed]
    if lost:
        raise Unsupported(f"what {lost[0]} reads comes neither from a norm nor from such linears")
    twice = [n for n in direct if sum(n in sources for sources in fed.values()) > 1]
    if twice:
        raise Unsupported(f"{twice[0]} feeds more than one linear")
    return _Flow(readers, fed, mixed)


def _by_norm(probe: ProbedLayer, base: Run, flow: _Flow, norm: str, o: str) -> InputGroup:
    """The group of what reads one norm's output, or the layer's own input."""
    read = flow.readers[norm]
    sources = {name for names in flow.fed.values() for name in names}
    linears = [name for name in probe.constants if name in read and name in sources]
    experts = [name for name in probe.experts if name in read]
    others = [name for name in read if name not in linears and name not in experts]
    for name in others:
        if name in probe.constants and not probe.experts:
            raise Unsupported(f"{name} feeds no other linear")
    parts = tuple(
        InputGroup(f"{name}.{number}.gate_up", "gate_up", (f"{stem}.{e.names[0]}", f"{stem}.{e.names[1]}"), None)
        for name in experts
        for number, e in enumerate(_experts(probe, name))
        for stem in (f"{name}.{number}",)
    )  # fmt: skip
    place: Place = "qkv" if any(name in flow.fed[o] for name in linears) else "gate_up"
    names = (*linears, *(name for part in parts for name in part.linears))
    feeder, why = None, "it is the layer's own input"
    if norm:
        feeder, why = _norm_feeder(probe, norm, read, others)
    if not linears and not others:
        feeder, why = None, "nothing reads it for all tokens"
    return InputGroup(place, place, names, feeder, tuple(others), parts, why)


def _norm_feeder(
    probe: ProbedLayer, norm: str, read: list[str], others: list[str]
) -> tuple[Feeder | None, str]:
    """Whether a factor can go into a norm: tried, with its inverse in the routers that read it too."""
    offset = probe.norms[norm]
    module = probe.module(norm)
    base = probe.run()
    d = torch.rand(module.weight.numel(), generator=torch.Generator().manual_seed(1)) + 0.5
    weights: list[Any] = [
        module.weight, *([module.bias] if getattr(module, "bias", None) is not None else []),
        *(probe.module(name).weight for name in others if name not in probe.constants),
    ]  # fmt: skip
    kept = [w.clone() for w in weights]
    module.weight.copy_((module.weight + offset) / d - offset)
    for weight in weights[1:]:
        weight.copy_(weight / d if weight.ndim == 1 else weight * d)
    changed = probe.run()
    for weight, before in zip(weights, kept):
        weight.copy_(before)
    same = _same(changed.output, base.output) and all(
        _same(changed.inputs[name], seen / d if name in read else seen)
        for name, seen in base.inputs.items()
    )
    if same:
        return Feeder(norm, True, offset), ""
    return None, f"what {norm} gives goes elsewhere too"


def _from_values(
    probe: ProbedLayer, qkv: list[str], o: str
) -> tuple[Feeder | None, tuple[()], tuple[()], str]:
    """The rows that o_proj's input comes from: with one value for all tokens, attention only copies."""
    for name in qkv:
        constant = probe.constants[name]
        found = []
        for seed in (0, 1):
            order = torch.randperm(
                constant.out_features, generator=torch.Generator().manual_seed(seed)
            )
            constant.output = (order + 1.0).repeat(TOKENS, 1)
            seen = probe.run().inputs[o][0]
            values = seen.round()
            inverse = torch.zeros(constant.out_features + 1, dtype=torch.int64)
            inverse[order + 1] = torch.arange(constant.out_features)
            whole = bool(((seen - values).abs() < 0.2).all()) and bool(
                ((values >= 1) & (values <= constant.out_features)).all()
            )
            if whole:
                found.append(inverse[values.long()])
        probe.randomize()
        if len(found) == 2 and torch.equal(*found) and _passes(probe, name, o, found[0]):
            return Feeder(name, False, rows=found[0]), (), (), ""
    return None, (), (), f"{o} reads no plain copy of a linear's outputs"


def _down(probe: ProbedLayer, down: str, sources: list[str], several: bool) -> InputGroup:
    columns = probe.constants[down].in_features
    name = f"{down.rpartition('.')[0]}.down" if several else "down"
    for source in sources:
        rows = probe.constants[source].out_features
        every = torch.arange(rows)
        halves = [every[:columns], every[columns:], every[0::2], every[1::2]]
        for candidate in [every] if rows == columns else halves if rows == 2 * columns else []:
            if _passes(probe, source, down, candidate):
                return InputGroup(name, "down", (down,), Feeder(source, False, rows=candidate))
    why = f"the function between {sources[0]} and {down} is not linear in any of its inputs"
    return InputGroup(name, "down", (down,), None, why_not=why)


def _passes(probe: ProbedLayer, source: str, reader: str, rows: torch.Tensor) -> bool:
    """Whether a factor on a linear's outputs shows in the reader's input, and nowhere else."""
    feeder = Feeder(source, False, rows=rows)
    for seed in (1, 2):
        probe.randomize()
        d = torch.rand(rows.numel(), generator=torch.Generator().manual_seed(seed)) + 0.5
        d = feeder.shared(d)
        base = probe.run()
        with probe.scaled(source, rows, d):
            changed = probe.run()
        same = _same(changed.output, base.output) and all(
            _same(changed.inputs[name], seen * d if name == reader else seen)
            for name, seen in base.inputs.items()
        )
        if not same:
            return False
    return True


def _experts(probe: ProbedLayer, name: str) -> list[Expert]:
    module = probe.experts[name]
    return [module.expert(number) for number in range(module.num_experts)]


def _expert_linears(probe: ProbedLayer, name: str) -> list[str]:
    return [f"{name}.{n}.{kind}" for n, e in enumerate(_experts(probe, name)) for kind in e.names]


def _expert_downs(probe: ProbedLayer, name: str) -> list[InputGroup]:
    groups = []
    for number, expert in enumerate(_experts(probe, name)):
        _, up, down = (f"{name}.{number}.{kind}" for kind in expert.names)
        rows = torch.arange(probe.shape(up)[0])
        groups.append(
            InputGroup(f"{name}.{number}.down", "down", (down,), Feeder(up, False, rows=rows))
        )
    return groups


def _proportional(seen: torch.Tensor, output: torch.Tensor, exactly: bool) -> bool:
    """Whether the rows read are those given, or (experts) multiples of them."""
    if seen.shape[-1] != output.shape[-1]:
        return False
    if exactly:
        return seen.shape == output.shape and _same(seen, output)
    given = output.repeat(seen.shape[0] // output.shape[0], 1)
    ratio = (seen * given).sum(-1, keepdim=True) / given.square().sum(-1, keepdim=True)
    return bool((ratio > 0).any()) and _same(seen, ratio * given)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 1e-4 * b.norm() + 1e-6)


def _common_parent(names: list[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)
