"""`quantkit inspect`: what is in a checkpoint, and which implementation would run each module."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.models import model_or_last
from quantkit.cli.output import JsonOption, out, print_json, print_servers, size

if TYPE_CHECKING:
    from quantkit.formats.config import QuantizationInfo


def command(
    model: Annotated[
        str | None, typer.Argument(help="Left out: the one quantized last in this folder.")
    ] = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every module.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show schemes, sizes, and the backend that runs each module here."""
    from quantkit.formats.checkpoint import Checkpoint
    from quantkit.formats.config import parse_quantization_config
    from quantkit.models.files import ModelCheckpoint, in_model_names
    from quantkit.models.names import find_model
    from quantkit.models.structure import build_skeleton, load_config
    from quantkit.servers import who_serves

    name = model_or_last(model)
    source = Checkpoint(find_model(name))
    info = parse_quantization_config(source.config, name)
    checkpoint = ModelCheckpoint(source, build_skeleton(load_config(source.config, name), name))
    info = in_model_names(info, checkpoint)
    backends = _backends(name)
    table: dict[str, dict[str, Any]] = {
        module: {
            "scheme": str(scheme),
            "bytes": sum(
                i.bytes for n, i in checkpoint.tensors.items() if n.startswith(module + ".")
            ),
            **backends[module],
        }
        for module, scheme in info.schemes.items()
    }
    kept = checkpoint.bytes - sum(entry["bytes"] for entry in table.values())
    servers = who_serves(info.schemes, info.kv_cache)
    if as_json:
        print_json(
            {
                "model": name,
                "modules": table,
                "kv_cache": info.kv_cache.to_dict() if info.kv_cache else None,
                "bytes": checkpoint.bytes,
                "kept_bytes": kept,
                "requires": info.meta.get("requires", []),
                "version": info.meta.get("version"),
                "calibration": info.meta.get("calibration"),
                "servers": servers,
            }
        )
        return
    _print(name, info, table, checkpoint.bytes, kept, modules)
    print_servers(servers)


def _print(
    name: str,
    info: QuantizationInfo,
    table: dict[str, dict[str, Any]],
    total: int,
    kept: int,
    modules: bool,
) -> None:
    recipe = info.meta.get("recipe", {}).get("name", "?")
    out.print(f"{name}: recipe {recipe}, quantkit {info.meta.get('version')}, {size(total)}")
    groups: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for entry in table.values():
        groups[(entry["scheme"], entry["op"], entry["decode"], entry["prefill"])].append(
            entry["bytes"]
        )
    for (scheme, op, decode, prefill), sizes in groups.items():
        out.print(
            f"  {len(sizes)} linears  {scheme}  {size(sum(sizes))}  op {op} (decode: {decode}, prefill: {prefill})"
        )
    if modules:
        for module, entry in table.items():
            out.print(f"    {module}  {entry['scheme']}  {size(entry['bytes'])}", markup=False)
    out.print(f"  kept as they were  {size(kept)}")
    if info.kv_cache:
        out.print(
            f"  keys, values  INT{info.kv_cache.bits}, {info.kv_cache.scale} scale, queries {info.kv_cache.query or '16-bit'}"
        )
    for needed in info.meta.get("requires", []):
        out.print(f"  requires {needed}: quantkit.load, or a server with its integration")
    calibration = info.meta.get("calibration")
    if calibration:
        out.print(
            f"  calibrated on {calibration['name']}: {calibration['samples']} x {calibration['seqlen']} tokens"
        )


def _backends(name: str) -> dict[str, dict[str, str]]:
    """Module -> the op and the implementation that runs for one token and for many, on this machine."""
    import torch

    from quantkit.runtime.linear import QuantLinear
    from quantkit.runtime.load import load

    model = load(name, fused=False)
    for linear in model.modules():
        if isinstance(linear, QuantLinear):
            linear.prepare()
    result = {}
    for module, linear in model.named_modules():
        if isinstance(linear, QuantLinear):
            x = torch.zeros(1, linear.in_features, dtype=model.dtype)
            result[module] = {
                "op": linear.op.name,
                "decode": linear.op.backend(*linear.arguments(x)),
                "prefill": linear.op.backend(*linear.arguments(x.expand(64, -1).contiguous())),
            }
    return result
