"""Who can serve a checkpoint, and how: the one source of what `plan`, `inspect`, model cards and docs/serving.md say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.formats.config import requirements

if TYPE_CHECKING:
    from quantkit.formats.scheme import KVFormat, Scheme

# How a server runs a checkpoint. Where a plugin is needed it is quantkit itself, installed beside the server.
NATIVE = "native"  # the server's own kernels, every number as the scheme says
WEIGHTS_ONLY = "weights only"  # the server's own kernels; activations stay in 16 bits
PLUGIN = "plugin"  # by our integration
REFUSED = "refused"  # with a line that says why

TRANSFORMERS = "transformers"
VLLM_CPU = "vLLM on CPU"
VLLM_HOPPER = "vLLM on Hopper"
VLLM_GPU = "vLLM, other GPUs"
SGLANG = "SGLang"
SERVERS = (TRANSFORMERS, VLLM_CPU, VLLM_HOPPER, VLLM_GPU, SGLANG)

_HALF_CACHE = "keys and values in 16 bits"
_EXPORT = "`quantkit export` makes one for it"

# Kind of checkpoint -> what each of SERVERS does with its linears. The kinds are those of `_kind`.
_LINEARS: dict[str, tuple[str, ...]] = {
    "plain": (NATIVE, NATIVE, NATIVE, NATIVE, NATIVE),
    "int4 with fp8": (NATIVE, REFUSED, NATIVE, REFUSED, WEIGHTS_ONLY),
    "int4 with int": (NATIVE, WEIGHTS_ONLY, WEIGHTS_ONLY, WEIGHTS_ONLY, WEIGHTS_ONLY),
    "other widths": (NATIVE, REFUSED, WEIGHTS_ONLY, WEIGHTS_ONLY, REFUSED),
    "ours alone": (PLUGIN, REFUSED, REFUSED, REFUSED, REFUSED),
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
    for server, how in zip(SERVERS, _LINEARS[_kind(schemes)], strict=True):
        found[server] = _words(server, how, kv_cache)
    return found


def _words(server: str, how: str, kv_cache: KVFormat | None) -> str:
    if server == TRANSFORMERS and how == PLUGIN:
        return f"{PLUGIN}: import quantkit; without it, refused"
    if server == TRANSFORMERS and kv_cache:
        return f"{PLUGIN}: import quantkit; without it, {how} with {_HALF_CACHE}"
    if how == REFUSED:
        return f"{REFUSED}; {_EXPORT}"
    notes = ["activations in 16 bits"] if how == WEIGHTS_ONLY else []
    if kv_cache:
        notes.append(_HALF_CACHE)
    return f"{how}: {', '.join(notes)}" if notes else how
