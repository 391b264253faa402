"""`quantkit verify`: whether an output is whole."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.models import model_or_last
from quantkit.cli.output import JsonOption, TrustOption, out, print_json, print_servers


def command(
    model: Annotated[
        str | None, typer.Argument(help="Left out: the one quantized last in this folder.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The original: every tensor of it must be there.")
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check hashes, that every target is quantized, scales, names and shapes, and a sanity text."""
    from quantkit.formats.checkpoint import Checkpoint
    from quantkit.formats.config import parse_quantization_config
    from quantkit.models.names import find_model
    from quantkit.servers import who_serves
    from quantkit.verify import verify

    name = model_or_last(model)
    result = verify(name, against=against, trust_remote_code=trust_remote_code)
    info = parse_quantization_config(Checkpoint(find_model(name)).config, name)
    servers = who_serves(info.schemes, info.kv_cache)
    if as_json:
        print_json({"model": name} | result.to_dict() | {"servers": servers})
    else:
        for check in result.checks:
            out.print(f"  checked  {check}", markup=False)
        for problem in result.problems:
            out.print(f"  WRONG    {problem}", markup=False)
        wrong = len(result.problems)
        out.print(
            f"{name}: {'whole' if not wrong else f'{wrong} problem' + ('s' if wrong > 1 else '')}"
        )
        print_servers(servers)
    if result.problems:
        raise typer.Exit(2)
