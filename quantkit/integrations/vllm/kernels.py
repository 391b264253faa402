"""Which kernel serves a scheme under vLLM, and whether a tensor-parallel split keeps its groups whole.

Plain code: nothing of vLLM is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.errors import QuantkitError
from quantkit.formats.scheme import Scheme

NATIVE = "vLLM"  # vLLM's own kernel, through its compressed-tensors support
OURS = "quantkit"
# `quantkit` runs every linear on quantkit's kernels: exact FireQ scales on Hopper, say.
LINEAR_ENV = "QUANTKIT_VLLM_LINEAR"
_HOPPER = 90
OLDEST_GPU = 80  # of quantkit's Triton kernels


@dataclass(frozen=True)
class Platform:
    """Where vLLM runs: `cpu`, `cuda` or another name, and the compute capability (90: Hopper)."""

    device: str
    capability: int | None = None


@dataclass(frozen=True)
class Choice:
    """Who runs a scheme, and what a user should know about it."""

    kernel: str
    note: str

    @property
    def emulated(self) -> bool:
        return "EMULATED" in self.note


def choose(scheme: Scheme, platform: Platform) -> Choice:
    """The kernel for one scheme.

    Raises:
        QuantkitError: nobody has one for it here, or `QUANTKIT_VLLM_LINEAR` names none.
    """
    wish = os.environ.get(LINEAR_ENV, "")
    if wish not in ("", OURS):
        raise QuantkitError(f"{LINEAR_ENV}={wish}: unknown; use {OURS}, or leave it out")
    if not wish and _is_native(scheme, platform):
        return Choice(NATIVE, "vLLM's own kernel")
    if platform.device == "cpu":
        return _on_cpu(scheme)
    if platform.device == "cuda":
        if platform.capability is None or platform.capability < OLDEST_GPU:
            raise QuantkitError(
                f"{scheme}: quantkit's kernels need compute capability 8.0, this GPU has "
                f"{(platform.capability or 0) / 10}; use another recipe, int4 or int8"
            )
        return Choice(OURS, "quantkit's Triton kernel")
    raise QuantkitError(
        f"{scheme}: vLLM has no kernel for it on {platform.device}, and quantkit's run on cpu and cuda"
    )


def choices_for(schemes: Mapping[str, Scheme], platform: Platform) -> set[Choice]:
    """The kernels that a checkpoint's modules of these names and schemes need.

    Raises:
        QuantkitError: one of them has none.
    """
    experts = {scheme for name, scheme in schemes.items() if is_expert(name)}
    linears = {scheme for name, scheme in schemes.items() if not is_expert(name)}
    return {choose(scheme, platform) for scheme in linears} | {
        choose_for_experts(scheme, platform) for scheme in experts
    }


def is_expert(name: str) -> bool:
    """Whether a module is one of a mixture's routed experts."""
    return ".experts." in name


def choose_for_experts(scheme: Scheme, platform: Platform) -> Choice:
    """The kernel for a mixture's experts of one scheme.

    vLLM 0.32 has some for quantized experts on CPUs with AMX alone, and its INT4 one rounds their activations to
    INT8: on a CPU they run on quantkit's kernels for linears, one expert after the other.

    Raises:
        QuantkitError: nobody has one for it here.
    """
    if platform.device == "cpu":
        return _on_cpu(scheme)
    if not _is_native(scheme, platform):
        raise QuantkitError(
            f"{scheme}: vLLM has no kernel for experts of this format here; "
            "use quantkit.load, or a W4A16 or W8A8 recipe"
        )
    return Choice(NATIVE, "vLLM's own kernel")


def _on_cpu(scheme: Scheme) -> Choice:
    if scheme.activations is None:
        return Choice(OURS, "quantkit's CPU kernel")
    return Choice(OURS, "EMULATED on the CPU: the numbers of this format, no claim about its speed")


def _is_native(scheme: Scheme, platform: Platform) -> bool:
    """Whether vLLM's own kernel computes this scheme, as read in vLLM 0.32."""
    weights, acts = scheme.weights, scheme.activations
    if weights.half or scheme.rotation:
        return False
    if acts is None:
        return weights.bits == 4  # W4A16, by groups or channels
    if acts.half:
        return False
    if weights.bits == acts.bits == 8:
        return weights.group_size is None  # W8A8 per channel
    # W4A8-FP8: on Hopper alone, its kernel rounds q * s to e4m3 as FireQ's does.
    return (
        (weights.bits, acts.bits, acts.type, weights.group_size) == (4, 8, "float", 128)
        and platform.device == "cuda"
        and platform.capability == _HOPPER
    )


def find_scheme(
    name: str, schemes: Mapping[str, Scheme], fused: Mapping[str, Sequence[str]]
) -> Scheme | None:
    """The scheme of a vLLM module, or None where it is not quantized.

    Args:
        name: vLLM's name, in which q, k and v are one module.
        schemes: checkpoint's module name -> scheme.
        fused: `qkv_proj` -> [`q_proj`, `k_proj`, `v_proj`], as each vLLM model says it.

    Raises:
        QuantkitError: the parts of a fused module differ.
    """
    if name in schemes:
        return schemes[name]
    parent, _, last = name.rpartition(".")
    parts = [f"{parent}.{part}" if parent else part for part in fused.get(last, ())]
    found = {schemes.get(part) for part in parts}
    if len(found) > 1:
        kinds = ", ".join(f"{p.rpartition('.')[2]}: {schemes.get(p) or '16 bits'}" for p in parts)
        raise QuantkitError(
            f"{name}: vLLM runs {len(parts)} linears as one, which needs one format ({kinds}); "
            "quantize them alike, or use quantkit.load"
        )
    return found.pop() if found else None


def find_expert_schemes(
    name: str, schemes: Mapping[str, Scheme], parts: Mapping[str, Sequence[str]]
) -> dict[str, Scheme]:
    """The scheme of each part of a layer's experts, which vLLM runs as one; empty where none is quantized.

    Args:
        name: the layer's, in front of the experts' numbers.
        schemes: module name -> scheme.
        parts: `w13` -> [`gate_proj`, `up_proj`], `w2` -> [`down_proj`]: the linears that vLLM stacks.

    Raises:
        QuantkitError: the linears of a part differ.
    """
    inside = {key: scheme for key, scheme in schemes.items() if key.startswith(f"{name}.")}
    experts = {key[len(name) + 1 :].partition(".")[0] for key in inside}
    found = {}
    for part, linears in parts.items():
        kinds = {inside.get(f"{name}.{expert}.{last}") for expert in experts for last in linears}
        if len(kinds) > 1 or None in kinds:
            raise QuantkitError(
                f"{name}: vLLM runs a layer's experts as one, which needs one format for gate and up and one "
                "for down; quantize them alike, or use quantkit.load"
            )
        (scheme,) = kinds or {None}
        if scheme:
            found[part] = scheme
    return found


def check_split(name: str, scheme: Scheme, inputs: int, inputs_per_rank: int) -> None:
    """Whether each rank's part of the inputs holds whole groups and whole rotation blocks.

    Raises:
        QuantkitError: it does not.
    """
    units = {
        "groups of {}": scheme.weights.group_size or 1,
        "rotation blocks of {}": scheme.rotation or 1,
    }
    for what, size in units.items():
        if inputs_per_rank % size:
            ranks = inputs // inputs_per_rank
            raise QuantkitError(
                f"{name}: {inputs} inputs over {ranks} ranks cut {what.format(size)}; "
                "use a smaller --tensor-parallel-size"
            )


def head_slice(
    kv_heads: int, rank: int, ranks: int, heads_per_rank: int | None = None
) -> tuple[int, int]:
    """The KV heads [first, last) that a rank holds: its share, or, with fewer heads than ranks, the one it repeats.

    Raises:
        QuantkitError: the heads do not divide so.
    """
    if kv_heads >= ranks and kv_heads % ranks == 0:
        first, count = rank * (kv_heads // ranks), kv_heads // ranks
    elif kv_heads < ranks and ranks % kv_heads == 0:
        first, count = rank // (ranks // kv_heads), 1
    else:
        raise QuantkitError(
            f"{kv_heads} KV heads over {ranks} ranks: neither divides the other; "
            "use another --tensor-parallel-size"
        )
    if heads_per_rank is not None and heads_per_rank != count:
        raise QuantkitError(
            f"{kv_heads} KV heads over {ranks} ranks: vLLM gives this rank {heads_per_rank}, not {count}; "
            "the scales of quantkit/kv.safetensors do not fit"
        )
    return first, first + count
