"""`quantization_config` of config.json: written so that compressed-tensors, vLLM and SGLang can read it.

What their schema cannot say stands under the extra top-level key `quantkit`, which they ignore.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import quantkit
from quantkit.errors import QuantkitError
from quantkit.formats.scheme import ActivationFormat, KVFormat, Scheme

SCHEMA = 1
# Beside the weights: per layer, the factors on keys after RoPE.
KV_FILE = Path("quantkit") / "kv.safetensors"
# Layouts as compressed-tensors 0.17 wrote them; later versions read the same.
_CT_VERSION = "0.17.0"
# What a loader must be able to do, beyond reading the tensors, for the outputs to be right.
ONLINE_HADAMARD = "online_hadamard"
HALF_INTEGER_GRID = "half_integer_grid"
KNOWN_REQUIREMENTS = frozenset({ONLINE_HADAMARD, HALF_INTEGER_GRID})
# What a loader without our integration would compute wrongly in silence carries this as its format, which
# none knows: each refuses, and shows the value (of which pydantic shows 50 characters).
NEEDS_QUANTKIT = "pip install quantkit, import quantkit first"


_HOW_TO_SERVE = "quantkit beside vLLM: pip install 'quantkit[vllm]'"


@dataclass(frozen=True)
class QuantizationInfo:
    """What config.json says of a quantized checkpoint, as our own loaders need it.

    Attributes:
        schemes: module name -> its scheme; modules that are not in it are not quantized.
        kv_cache: the cache's format, or None for 16 bits.
        meta: the rest of the `quantkit` key (recipe, version, calibration, shards).
    """

    schemes: dict[str, Scheme]
    kv_cache: KVFormat | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def requirements(schemes: dict[str, Scheme]) -> list[str]:
    """What a loader needs beyond the packed layout, for these schemes."""
    needs = set()
    for scheme in schemes.values():
        if scheme.rotation:
            needs.add(ONLINE_HADAMARD)
        if scheme.weights.half or (scheme.activations and scheme.activations.half):
            needs.add(HALF_INTEGER_GRID)
    return sorted(needs)


def _layout(scheme: Scheme) -> str:
    if requirements({"": scheme}):
        return NEEDS_QUANTKIT
    return "pack-quantized" if scheme.packs else "int-quantized"


def _weight_args(scheme: Scheme) -> dict[str, Any]:
    weights = scheme.weights
    args: dict[str, Any] = {"num_bits": weights.bits, "type": "int", "symmetric": True}
    if weights.group_size:
        args |= {"strategy": "group", "group_size": weights.group_size}
    else:
        args |= {"strategy": "channel"}
    everywhere = (weights.bits, scheme.activations is None) in ((4, True), (8, False))
    if not everywhere or requirements({"": scheme}):
        # Not every vLLM has this scheme. Nothing reads it of weights that are packed already; the line in which vLLM says
        # that it has no such scheme shows it.
        args["observer_kwargs"] = {"needs": _HOW_TO_SERVE}
    return args | {"dynamic": False}


def _activation_args(activations: ActivationFormat | None) -> dict[str, Any] | None:
    if activations is None:
        return None
    return {
        "num_bits": activations.bits,
        "type": activations.type,
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }


def _transform_config(schemes: dict[str, Scheme]) -> dict[str, Any]:
    """Online rotations as compressed-tensors writes them: the input is rotated, the weight was.

    Its `hadamard` is Sylvester's matrix: a block that is no power of two stands in `quantkit` alone.
    """
    groups: dict[str, Any] = {}
    blocks = {s.rotation for s in schemes.values() if s.rotation}
    for block in sorted(b for b in blocks if not b & (b - 1)):
        targets = [name for name, s in schemes.items() if s.rotation == block]
        apply = [
            {"targets": targets, "location": "input", "inverse": False, "ignore": []},
            {"targets": targets, "location": "weight_input", "inverse": True, "ignore": []},
        ]
        groups[f"hadamard_{block}"] = {
            "type": "hadamard",
            "apply": apply,
            "randomize": False,
            "requires_grad": False,
            "head_dim": block,
            "precision": "torch.float32",
        }
    return {"config_groups": groups} if groups else {}


def build_quantization_config(
    schemes: dict[str, Scheme],
    unquantized_linears: list[str],
    kv_cache: KVFormat | None,
    meta: dict[str, Any],
) -> dict[str, Any]:
    """The dictionary that goes into config.json.

    Args:
        schemes: module name -> scheme, for every quantized linear.
        unquantized_linears: names of the linears that stay as they were (`ignore`).
        kv_cache: the cache's format, or None.
        meta: what else the `quantkit` key records.
    """
    distinct = list(dict.fromkeys(schemes.values()))
    groups: dict[str, Any] = {}
    for number, scheme in enumerate(distinct):
        names = [name for name, s in schemes.items() if s == scheme]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(distinct) == 1 else names,
            "format": _layout(scheme),
            "weights": _weight_args(scheme),
            "input_activations": _activation_args(scheme.activations),
            "output_activations": None,
        }
    formats = {group["format"] for group in groups.values()}
    ours = {
        "schema": SCHEMA,
        "requires": requirements(schemes),
        "schemes": {f"group_{n}": scheme.to_dict() for n, scheme in enumerate(distinct)},
        "modules": {
            f"group_{n}": [name for name, s in schemes.items() if s == scheme]
            for n, scheme in enumerate(distinct)
        },
        "kv_cache": kv_cache.to_dict() if kv_cache else None,
    }
    return {
        "quant_method": "compressed-tensors",
        # Without groups the linears are as they were: keys and values alone are quantized.
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "version": _CT_VERSION,
        "config_groups": groups,
        "ignore": sorted(unquantized_linears),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": _transform_config(schemes),
        "quantkit": ours | meta,
    }


def _check_schema(ours: dict[str, Any], where: str) -> None:
    """Refuse what has another meaning. A key that an older writer of the same schema did not know has a default."""
    schema, version = ours.get("schema"), str(ours.get("version", "unknown"))[:40]
    if type(schema) is not int or schema < 1:
        raise QuantkitError(
            f"{where}: quantization_config.quantkit.schema is {str(schema)[:40]!r}, which no version of quantkit "
            "wrote; quantize the original again"
        )
    if schema > SCHEMA:
        raise QuantkitError(
            f"{where}: written in schema {schema} by quantkit {version}, this is {quantkit.__version__} and reads up "
            f"to schema {SCHEMA}; update quantkit"
        )


def _names(modules: Any) -> list[str]:
    names: list[Any] = modules if isinstance(modules, list) else [modules]
    if odd := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"modules: {str(odd[0])[:40]} where a module's name is expected")
    if names is not modules:
        raise ValueError("modules: one name where a list is expected")
    return names


def parse_quantization_config(config: dict[str, Any], where: str) -> QuantizationInfo:
    """The inverse of `build_quantization_config`, from a whole config.json.

    Raises:
        QuantkitError: the checkpoint is not quantized, not by quantkit, of a newer schema, malformed, or
            needs something this version does not know.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise QuantkitError(
            f"{where}: not a quantized checkpoint; run `quantkit quantize` on it first"
        )
    ours = quantization.get("quantkit")
    if not isinstance(ours, dict):
        method = quantization.get("quant_method", "an unknown tool")
        raise QuantkitError(
            f"{where}: quantized by {method}, not by quantkit; load it with transformers"
        )
    _check_schema(ours, where)
    requires = ours.get("requires", [])
    if not isinstance(requires, list) or not all(isinstance(each, str) for each in requires):
        raise QuantkitError(f"{where}: malformed quantization_config.quantkit.requires")
    unknown = set(requires) - KNOWN_REQUIREMENTS
    if unknown:
        raise QuantkitError(f"{where}: requires {', '.join(sorted(unknown))}; update quantkit")
    try:
        schemes = {
            module: Scheme.from_dict(ours["schemes"][group])
            for group, modules in ours["modules"].items()
            for module in _names(modules)
        }
        kv_cache = KVFormat(**ours["kv_cache"]) if ours.get("kv_cache") else None
        for scheme in set(schemes.values()):
            scheme.check()
        if kv_cache is not None:
            kv_cache.check()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = error if isinstance(error, ValueError) else repr(error)
        raise QuantkitError(f"{where}: malformed quantization_config.quantkit ({why})") from None
    rest = {k: v for k, v in ours.items() if k not in ("schema", "schemes", "modules", "kv_cache")}
    return QuantizationInfo(schemes, kv_cache, rest)
