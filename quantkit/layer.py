"""One decoder layer: statistics -> factors folded -> weights quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantkit.calibration.few_tokens import is_starved, statistics_of
from quantkit.calibration.outliers import input_outliers
from quantkit.calibration.simulate import SimulatedLinear
from quantkit.calibration.statistics import InputStatistics, KeyStatistics
from quantkit.factors import choose_factor, zero_fractions
from quantkit.formats.scheme import Scheme
from quantkit.keys import scale_keys
from quantkit.methods.rounding import Grid, dequantize
from quantkit.models.folding import fold_factor
from quantkit.models.groups import InputGroup, LayerStructure
from quantkit.models.rotating import turn_values, value_block
from quantkit.ranks import ALONE, Found, Ranks
from quantkit.recipe import Recipe
from quantkit.solve import Inputs, Solved, solve


@dataclass
class QuantizedLayer:
    """What came of a decoder layer.

    Attributes:
        weights: linear's name within the layer -> its codes and scales.
        post_scale: factor on keys after RoPE, float32 [KV heads, head_dim], or None.
        report: per linear and per layer figures, plain data.
    """

    weights: dict[str, Solved] = field(default_factory=dict)
    post_scale: torch.Tensor | None = None
    report: dict[str, Any] = field(default_factory=dict)


def quantize_layer(
    layer: nn.Module,
    prefix: str,
    recipe: Recipe,
    schemes: dict[str, Scheme],
    structure: LayerStructure,
    inputs: dict[str, InputStatistics],
    keys: KeyStatistics | None,
    norm_dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> QuantizedLayer:
    """Transform a layer in place, quantize its linears and put simulations in their place.

    Args:
        layer: weights in float32.
        prefix: the layer's full name with a dot at its end.
        structure: the layer's.
        inputs: statistics per input group; empty when the recipe needs no calibration.
        keys: statistics of the keys, or None.
        norm_dtype: the type norms are stored in.
        ranks: the processes that share the searches and solves out; each ends with all of the layer.
    """
    result = QuantizedLayer(
        report={"linears": {}, "factors": {}, "zero_fraction": {}, "outliers": {}}
    )
    turned = value_block(structure) if recipe.rotation and recipe.rotation.values else None
    work = _Work(layer, prefix, recipe, schemes, structure, inputs, turned, ranks)
    if keys is not None and recipe.rope_scaling and not structure.attention.why_no_factors:
        stored = {prefix + name for name in structure.shapes} - schemes.keys()
        result.post_scale, result.report["keys"], result.report["outliers"]["keys"] = scale_keys(
            layer, recipe, structure.attention, keys, exact=bool(stored)
        )
    factors: dict[str, torch.Tensor] = {}
    for group, factor, figures in work.choose_factors():
        result.report["factors"][group.name] = figures
        if factor is not None:
            factors[group.name] = fold_factor(layer, group, factor, norm_dtype)
    if turned:
        turn_values(layer, structure, turned)
    for group in structure.groups:
        if group.name in inputs and inputs[group.name].tokens:
            stats, factor = inputs[group.name], factors.get(group.name)
            scheme = schemes.get(prefix + group.linears[0])
            shares = zero_fractions(stats, factor, scheme)
            result.report["zero_fraction"] |= {group.name: shares} if shares else {}
            rotation = work.rotation(group, scheme)
            result.report["outliers"][group.name] = input_outliers(stats, factor, rotation)
    for name, solved, figures in work.solve(factors):
        result.report["linears"][name] = figures
        result.weights[name] = solved
        simulate(layer, name, solved, schemes[prefix + name])
    return result


@dataclass(frozen=True)
class _Work:
    """What of a layer's work processes share out; arguments as `quantize_layer`'s."""

    layer: nn.Module
    prefix: str
    recipe: Recipe
    schemes: dict[str, Scheme]
    structure: LayerStructure
    inputs: dict[str, InputStatistics]
    turned: int | None
    ranks: Ranks

    def rotation(self, group: InputGroup, scheme: Scheme | None) -> int | None:
        """The block by which a group's input is rotated, in the weights or at run time."""
        if self.turned and group.place == "o":
            return self.turned
        return scheme.rotation if scheme else None

    def choose_factors(self) -> list[tuple[InputGroup, torch.Tensor | None, dict[str, Any]]]:
        """Factors and figures of the groups that can take one, before any is folded: a choice depends on the columns
        of the group's own weights alone, which the factors of the others leave as they are."""
        scaling, shapes = self.recipe.channel_scaling, self.structure.shapes
        groups = [
            group
            for group in self.structure.groups
            if scaling
            and self.prefix + group.linears[0] in self.schemes
            and group.place in scaling.places
            and group.feeder is not None
            and not is_starved(group, self.inputs)
        ]

        def choose(group: InputGroup) -> Found:
            scheme, stats = self.schemes[self.prefix + group.linears[0]], self.inputs[group.name]
            factor, figures = choose_factor(
                self.layer, group, self.recipe, self.prefix, scheme, stats, self.rotation(group, scheme)
            )  # fmt: skip
            return () if factor is None else (factor,), figures

        costs = [sum(shapes[name][0] * shapes[name][1] for name in g.linears) for g in groups]
        return [
            (group, tensors[0] if tensors else None, figures)
            for group, (tensors, figures) in self.ranks.share_out(groups, costs, choose)
        ]

    def solve(
        self, factors: dict[str, torch.Tensor]
    ) -> Iterator[tuple[str, Solved, dict[str, Any]]]:
        """Each linear quantized, one by one, with figures; `factors` are those that were folded."""
        # Linears with one input come one after the other: what is made of it is kept for the next.
        last: dict[tuple[int, int, int | None], Inputs | None] = {}

        def inputs_of(
            seen: InputStatistics, factor: torch.Tensor | None, rotation: int | None
        ) -> Inputs | None:
            key = (id(seen), id(factor), rotation)
            if key not in last:
                last.clear()
                hessian = seen.hessian_after(factor, rotation)
                last[key] = None if hessian is None else Inputs(hessian, self.recipe.gptq)
            return last[key]

        def quantize(job: tuple[InputGroup, str]) -> Found:
            group, name = job
            scheme, weights = (
                self.schemes[self.prefix + name],
                self.recipe.weights_of(self.prefix + name),
            )
            seen, figures = statistics_of(group, name, self.inputs)
            factor, rotation = factors.get(group.name), self.rotation(group, scheme)
            inputs = inputs_of(seen, factor, rotation) if seen else None
            assert weights
            if figures.get("fallback") == "nearest":
                weights = weights.model_copy(update={"rounding": "nearest"})
            linear: Any = self.layer.get_submodule(name)
            # Only refinement goes on from what was rounded.
            solved, measured = solve(
                linear.weight.detach(),
                scheme,
                weights,
                self.recipe.gptq,
                inputs,
                keep_target=self.recipe.refine is not None,
            )
            target = () if solved.target is None else (solved.target,)
            return (solved.codes, solved.scale, *target), measured | figures

        jobs = [
            (group, name)
            for group in self.structure.groups
            for name in group.linears
            if self.prefix + name in self.schemes
        ]
        shapes = [self.structure.shapes[name] for _, name in jobs]
        # The rounding of a weight's columns, and the factor of its Hessian.
        costs = [rows * columns**2 + columns**3 for rows, columns in shapes]
        for (_, name), (tensors, figures) in self.ranks.share_out(jobs, costs, quantize):
            yield name, Solved(*tensors), figures


def simulate(layer: nn.Module, name: str, solved: Solved, scheme: Scheme) -> None:
    """Put a simulation of a quantized linear in its place."""
    grid = Grid(scheme.weights.bits, scheme.weights.half)
    parent, _, child = name.rpartition(".")
    values = dequantize(solved.codes, solved.scale, grid)
    bias: Any = layer.get_submodule(name).bias
    setattr(layer.get_submodule(parent), child, SimulatedLinear(values, bias, scheme))
