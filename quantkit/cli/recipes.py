"""`quantkit recipes`: the recipes there are; one, resolved."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.output import JsonOption, out, print_json


def command(
    name: Annotated[
        str | None, typer.Argument(help="A recipe's name or YAML file: shown resolved.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Change the recipe: path=value.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the recipes, or show one with everything it inherits and every default."""
    import yaml

    from quantkit.recipe import Recipe, recipe_names

    if name is None:
        described = {n: Recipe.load(n).description for n in recipe_names()}
        if as_json:
            print_json(described)
            return
        for recipe, description in described.items():
            out.print(f"{recipe:<21}{description}", markup=False)
        return
    data = Recipe.load(name, sets).model_dump()
    if as_json:
        print_json(data)
    else:
        print(yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100), end="")
