"""`quantkit plan`: what a quantization would do; nothing is loaded but headers."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from quantkit.cli.output import (
    JsonOption,
    TrustOption,
    duration,
    out,
    print_json,
    print_servers,
    size,
)


def command(
    model: Annotated[
        str, typer.Argument(help="A folder, a hub id, or `llama`, the bundled model.")
    ],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name or YAML file.")],
    samples: Annotated[
        int | None, typer.Option(help="Calibration blocks; the recipe's if left out.")
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens in a block; the recipe's if left out.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Change the recipe: path=value.")
    ] = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every module.")] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what `quantize` would do: schemes, bytes, memory, who can serve the result."""
    from quantkit.plan import default_output, make_plan
    from quantkit.recipe import Recipe

    plan = make_plan(
        model,
        Recipe.load(recipe, sets),
        samples=samples,
        seqlen=seqlen,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(plan.to_dict())
        return
    structure = plan.structure
    out.print(
        f"{model}: {structure.architecture}, {structure.num_layers} layers, recipe {plan.recipe.name}"
    )
    for scheme, count in Counter(str(s) for s in plan.schemes.values()).items():
        out.print(f"  {count} linears     {scheme}")
    if plan.recipe.kv_cache:
        out.print(
            f"  keys, values   INT{plan.recipe.kv_cache.bits} per token and head, {plan.recipe.kv_cache.scale} scale"
        )
    kept = plan.unquantized_linears
    more = f" and {len(kept) - 3} more" if len(kept) > 4 else ""
    names = ", ".join(kept[:3] if more else kept) or "nothing"
    out.print(f"  kept           {names}{more}, embeddings, norms")
    if modules:
        for name, each in plan.module_bytes().items():
            out.print(
                f"    {name}  {each['scheme']}  {size(each['before'])} -> {size(each['after'])}",
                markup=False,
            )
    for note in plan.notes:
        out.print(f"  left out       {note}", markup=False)
    before, after = plan.linear_bytes
    if before:
        out.print(f"  linears        {size(before)} -> {size(after)} ({after / before:.3f})")
    out.print(f"  checkpoint     {size(plan.total_bytes[0])} -> {size(plan.total_bytes[1])}")
    need = plan.estimate
    offload = f", {size(need.activation_bytes)} of it activations that can be on disk (--offload)"
    out.print(
        f"  peak memory    about {size(need.host_bytes)}{offload if need.activation_bytes else ''}"
    )
    if need.device_bytes:
        out.print(f"  on a GPU       about {size(need.device_bytes)} (--device cuda)")
    more = f", {size(need.activation_bytes)} more with --offload" if need.activation_bytes else ""
    out.print(f"  disk           {size(need.disk_bytes)}{more}")
    out.print(f"  time           about {duration(need.seconds)} here")
    out.print(
        "  tensor parallel "
        + ", ".join(f"{n}: {f'no ({why})' if why else 'yes'}" for n, why in plan.whole.items())
    )
    print_servers(plan.servers)
    out.print(f"  would write    {default_output(model, plan.recipe)}")
