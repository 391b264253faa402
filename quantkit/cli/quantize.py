"""`quantkit quantize`: the main job."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantkit.cli.output import (
    JsonOption,
    TrustOption,
    err,
    hush,
    note,
    out,
    print_json,
    print_servers,
    progress_bar,
    say_error,
    size,
)
from quantkit.cli.push import tell
from quantkit.errors import QuantkitError


def command(
    model: Annotated[
        str, typer.Argument(help="A folder, a hub id, or `llama`, the bundled model.")
    ],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name or YAML file.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder; ./<model>-<recipe> if left out.")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration data: bundled, wikitext, c4, pile-val, ultrachat (the last four through `datasets`), a "
            "text, .jsonl, .json or .parquet file, or a mixture with samples from each: c4:64,chats.jsonl:64. "
            "Conversations go through the model's chat template. The recipe's if left out."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Calibration blocks: windows of a text, or records laid end to end. The recipe's, or a mixture's sum, "
            "if left out; given, a mixture's numbers are shares of it."
        ),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens in a block; the recipe's if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change the recipe: path=value, as weights.group_size=64."),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Mixed precision: at most so many bits per weight, scales included."),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(help="Mixed precision: a checkpoint of at most this size, as 3GB."),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(help="Bits that mixed precision chooses from, as 4,8; all if left out."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of calibration blocks.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output of quantkit.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Upload the result to ORG/NAME on the hub.")
    ] = None,
    offload: Annotated[
        bool | None,
        typer.Option(help="Activations on disk; left out: where memory has no room for them."),
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a checkpoint into a packed one."""
    from quantkit import hub
    from quantkit.calibration.sources import BUNDLED_CALIBRATION
    from quantkit.models.names import BUNDLED
    from quantkit.pipeline import quantize
    from quantkit.ranks import joined
    from quantkit.recipe import Recipe

    with joined(device, say_error) as ranks:
        if not ranks.leads:
            hush()
        resolved = Recipe.load(recipe, sets)
        if push is not None and ranks.leads:
            hub.check_target(push, overwrite=overwrite)
        if model == BUNDLED:
            note(
                "llama: the small Llama that comes with quantkit; name a folder or a hub id to quantize another"
            )
        elif (
            calib is None
            and resolved.calibration.source == BUNDLED_CALIBRATION
            and (resolved.needs_calibration or target_bits or target_size)
        ):
            note(
                "calibrating on the bundled King James text; --calib c4, or a file, suits other models better"
            )
        with progress_bar() as progress:
            report = quantize(
                model,
                resolved,
                output,
                calib=calib,
                samples=samples,
                seqlen=seqlen,
                device=device,
                seed=seed,
                overwrite=overwrite,
                target_bits=target_bits,
                target_size=target_size,
                widths=_widths(widths),
                offload=offload,
                trust_remote_code=trust_remote_code,
                progress=progress,
                ranks=ranks,
            )
    if not ranks.leads:
        return
    if push is not None:
        report["pushed"] = hub.push(report["output"], push, overwrite=overwrite)
    if as_json:
        print_json(report)
        return
    _print(report)


def _widths(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise QuantkitError(f"--widths {text}: numbers of bits are expected, as 4,8") from None


def _print_allocation(allocation: dict[str, Any], output: str) -> None:
    bits = [part["bits"] for part in allocation["parts"].values()]
    counts = ", ".join(f"{bits.count(width)} at {width}" for width in sorted(set(bits)))
    out.print(
        f"  mixed precision    {allocation['bits']:.3f} bits per weight with scales; parts: {counts}"
    )
    out.print(f"  its rules          {output}/{allocation['recipe_file']}, for --recipe")


def _print(report: dict[str, Any]) -> None:
    linear, total = report["linear_bytes"], report["total_bytes"]
    if report.get("unchanged"):
        note(f"{report['output']} is there already, made from the same inputs; nothing was done")
    out.print(
        f"{report['output']}: {report['recipe']['name']}, {report['seconds']:.1f} s, verified"
    )
    if linear["before"]:
        out.print(
            f"  quantized linears  {size(linear['before'])} -> {size(linear['after'])}  "
            f"({linear['after'] / linear['before']:.3f})"
        )
    out.print(
        f"  whole checkpoint   {size(total['before'])} -> {size(total['after'])}  "
        f"({total['after'] / total['before']:.3f})"
    )
    if "allocation" in report:
        _print_allocation(report["allocation"], report["output"])
    errors = [layer["output_error"] for layer in report["layers"] if "output_error" in layer]
    if errors:
        out.print(
            f"  layer output error {min(errors):.2%} to {max(errors):.2%} (squared, relative)"
        )
    for line in report.get("left_out", []):
        err.print(f"  left out: {line}", markup=False)
    few = [figures["fallback"] for layer in report["layers"]
           for figures in layer["linears"].values() if figures.get("fallback")]  # fmt: skip
    if few:
        err.print(
            f"  {len(few)} linears of experts saw too few tokens: {few.count('shared')} used those of all experts, "
            f"{few.count('nearest')} were rounded to nearest; more --samples help",
            markup=False,
        )
    fell = [f"layer {n}: {name}" for n, layer in enumerate(report["layers"])
            for name, figures in layer["linears"].items() if figures.get("fell_back")]  # fmt: skip
    if fell:
        err.print(
            f"  GPTQ fell back to plain rounding in {len(fell)} linears: {', '.join(fell[:3])}",
            markup=False,
        )
    print_servers(report["servers"])
    if "pushed" in report:
        tell(report["pushed"])
    out.print(f"next: quantkit eval {report['output']} --ppl sample")
