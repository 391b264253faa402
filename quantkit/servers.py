"""Who can serve a checkpoint, and how: the one source of what `plan`, `inspect`, model cards and docs/serving.md say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.formats.config import requirements
from quantkit.integrations.vllm.kernels import OURS, Platform, choices_for, is_expert

if TYPE_CHECKING:
    from quantkit.formats.scheme import KVFormat, Scheme

# How a server runs a checkpoint. Where a plugin is needed it is quantkit itself, installed beside the server.
NATIVE = "native"  # the server's own kernels, every number as the scheme says
WEIGHTS_ONLY = "weights only"  # the server's own kernels; activations stay in 16 bits
PLUGIN = "plugin"  # by our integration
EMULATED = "emulated"  # by our integration: the right numbers, without kernels for them
REFUSED = "refused"  # with a line that says why

TRANSFORMERS = "transformers"
VLLM_CPU = "vLLM on CPU"
VLLM_HOPPER = "vLLM on Hopper"
VLLM_GPU = "vLLM, other GPUs"
SGLANG = "SGLang"
SERVERS = (TRANSFORMERS, VLLM_CPU, VLLM_HOPPER, VLLM_GPU, SGLANG)
_VLLM = {
    VLLM_CPU: Platform("cpu"),
    VLLM_HOPPER: Platform("cuda", 90),
    VLLM_GPU: Platform("cuda", 80),
}
_INSTALL = {
    TRANSFORMERS: "import quantkit",
    **dict.fromkeys(_VLLM, "pip install 'quantkit[vllm]'"),
}

_HALF_CACHE = "keys and values in 16 bits"
_OTHER_CODES = "other codes of negative maxima"
_EXPORT = "`quantkit export` writes what it takes"

# Kind of checkpoint -> what each of SERVERS does with its linears, without quantkit. The kinds are those of `_kind`.
_STOCK: dict[str, tuple[str, ...]] = {
    "plain": (NATIVE, NATIVE, NATIVE, NATIVE, NATIVE),
    "int4 with fp8": (NATIVE, REFUSED, NATIVE, REFUSED, WEIGHTS_ONLY),
    "int4 with int": (NATIVE, WEIGHTS_ONLY, WEIGHTS_ONLY, WEIGHTS_ONLY, WEIGHTS_ONLY),
    "other widths": (NATIVE, REFUSED, WEIGHTS_ONLY, WEIGHTS_ONLY, REFUSED),
    "ours alone": (REFUSED, REFUSED, REFUSED, REFUSED, REFUSED),
}


def _kind(schemes: dict[str, Scheme]) -> str:
    if requirements(schemes):
        return "ours alone"
    pairs = {
        (s.weights.bits, s.activations.bits if s.activations else 16) for s in schemes.values()
    }
    if any(s.weights.bits != 4 and s.packs for s in schemes.values()):
        return "other widths"
    if pairs <= {(4, 16), (8, 8)}:
        return "plain"
    floats = any(s.activations and s.activations.type == "float" for s in schemes.values())
    return "int4 with fp8" if floats else "int4 with int"


def who_serves(schemes: dict[str, Scheme], kv_cache: KVFormat | None) -> dict[str, str]:
    """Server -> what it does with a checkpoint of these schemes: one of the words above, and what goes with it."""
    found = {"quantkit": "all of it"}
    for server, stock in zip(SERVERS, _STOCK[_kind(schemes)], strict=True):
        if server == TRANSFORMERS and stock == NATIVE and _has_byte_experts(schemes):
            stock = REFUSED
        if server == VLLM_CPU and _of_experts(schemes):
            stock = REFUSED  # vLLM 0.32 has such kernels with AMX alone, and dies of the INT4 one
        notes = _notes(server, stock, schemes, kv_cache)
        how = _with_quantkit(server, stock, notes, schemes, kv_cache)
        found[server] = _words(server, how, stock, notes)
    return found


def _rounds_otherwise(schemes: dict[str, Scheme]) -> bool:
    """Activations whose codes compressed-tensors leaves to the last bit of a row's largest number (`quantize_int8`)."""
    activations = (scheme.activations for scheme in schemes.values())
    return any(a and a.type == "int" and a.bits < 8 for a in activations)


def _has_byte_experts(schemes: dict[str, Scheme]) -> bool:
    """transformers 5.23 stacks experts from packed and from FP8 files, not from INT8 ones."""
    return any(not scheme.packs for scheme in _of_experts(schemes))


def _of_experts(schemes: dict[str, Scheme]) -> set[Scheme]:
    return {scheme for name, scheme in schemes.items() if is_expert(name)}


def _with_quantkit(
    server: str,
    stock: str,
    notes: list[str],
    schemes: dict[str, Scheme],
    kv_cache: KVFormat | None,
) -> str:
    """What the server does with quantkit beside it."""
    if server == SGLANG:
        return stock
    if server == TRANSFORMERS:
        return NATIVE if stock == NATIVE and not notes else PLUGIN
    try:
        choices = choices_for(schemes, _VLLM[server])
    except QuantkitError:
        return REFUSED
    if server == VLLM_CPU and (kv_cache or any(choice.emulated for choice in choices)):
        return EMULATED
    return PLUGIN if kv_cache or any(choice.kernel == OURS for choice in choices) else NATIVE


def _notes(
    server: str, stock: str, schemes: dict[str, Scheme], kv_cache: KVFormat | None
) -> list[str]:
    """What else the server does otherwise where quantkit is not beside it."""
    notes = ["activations in 16 bits"] if stock == WEIGHTS_ONLY else []
    if server == TRANSFORMERS and stock == NATIVE and _rounds_otherwise(schemes):
        notes.append(_OTHER_CODES)
    if kv_cache and stock != REFUSED:
        notes.append(_HALF_CACHE)
    return notes


def _words(server: str, how: str, stock: str, notes: list[str]) -> str:
    if how in (PLUGIN, EMULATED):
        alone = " with ".join([stock, " and ".join(notes)]) if notes else stock
        return f"{how}: {_INSTALL[server]}; without it, {alone}"
    if how == REFUSED:
        return f"{REFUSED}; {_EXPORT}"
    return f"{how}: {', '.join(notes)}" if notes else how
