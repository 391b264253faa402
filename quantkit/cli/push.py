"""`quantkit push`: a verified output, with its model card, to the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantkit.cli.output import JsonOption, out, print_json, size


def command(
    model: Annotated[str, typer.Argument(help="A folder that quantize or export wrote.")],
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Of a new repository.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Add a commit to a repository that is there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify an output and upload it in one commit."""
    from quantkit.hub import push

    result = push(model, repo, private=private, overwrite=overwrite)
    if as_json:
        print_json({"model": model} | result)
    else:
        tell(result)


def tell(result: dict[str, Any]) -> None:
    out.print(
        f"{result['url']}: {result['files']} files, {size(result['bytes'])}, verified before",
        markup=False,
    )
