"""`quantkit export`: a checkpoint rewritten for servers without our plugin, with what that costs."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from quantkit.cli.models import model_or_last, tokenizer_of
from quantkit.cli.output import JsonOption, out, print_json, print_servers, progress_bar
from quantkit.errors import QuantkitError


def command(
    model: Annotated[
        str | None, typer.Argument(help="Left out: the one quantized last in this folder.")
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            help="compressed-tensors-native (w4a8-fp8), w4a8-fp8, w4a16, w8a8; bf16 unpacks."
        ),
    ] = "compressed-tensors-native",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder; ./<model>-<to> if left out.")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(help="Calibration text, where weights are quantized again; as in quantize."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration blocks.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a block.")] = None,
    limit: Annotated[
        int, typer.Option(help="Windows of the sample on which the loss is measured; 0: none.")
    ] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output of quantkit.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a checkpoint for stock servers: no INT4 cache, no online rotation; say what it costs."""
    from quantkit.calibration.sources import BUNDLED_CALIBRATION
    from quantkit.export import export, record

    if limit < 0:
        raise QuantkitError(f"--limit {limit}: may not be negative")
    started = time.monotonic()
    name = model_or_last(model)
    with progress_bar() as progress:
        result = export(
            name,
            to,
            output,
            calib=calib or BUNDLED_CALIBRATION,
            samples=samples,
            seqlen=seqlen,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    if limit:
        result["ppl"] = {
            "before": _perplexity(name, limit, device),
            "after": _perplexity(result["output"], limit, device),
        }
        if result["servers"]:
            from pathlib import Path

            record(Path(result["output"]), export_ppl=result["ppl"])
    result["seconds"] = round(time.monotonic() - started, 2)
    if as_json:
        print_json({"model": name} | result)
    else:
        _print(name, result)


def _perplexity(model: str, limit: int, device: str) -> dict[str, Any]:
    """On the bundled sample, as `quantkit eval --ppl sample` measures it."""
    from quantkit.calibration.data import read_text, tokenize
    from quantkit.evaluate.perplexity import DEFAULT_SEQLEN, perplexity
    from quantkit.runtime.load import load

    tokens = tokenize(tokenizer_of(model), read_text("sample", split="test"))
    loaded = load(model, device=device)
    seqlen = min(DEFAULT_SEQLEN, int(getattr(loaded.config, "max_position_embeddings", 2048)))
    with progress_bar() as bar:
        return perplexity(
            loaded, tokens, seqlen, limit=limit, progress=lambda d, t: bar(d, t, "windows")
        ).to_dict()


def _print(name: str, result: dict[str, Any]) -> None:
    again = result["requantized"]
    how = f"quantized again from {again}" if again else "the same packed weights"
    if not result["servers"]:
        how = "unpacked"
    out.print(
        f"{result['output']}: {result['scheme']}, {how}, {result['seconds']:.1f} s", markup=False
    )
    if "ppl" in result:
        before, after = result["ppl"]["before"], result["ppl"]["after"]
        out.print(
            f"  perplexity        {before['ppl']:.4f} in {name} -> {after['ppl']:.4f} "
            f"({after['ppl'] / before['ppl']:.4f}); sample, {after['windows']} windows of {after['seqlen']} tokens",
            markup=False,
        )
    if result["servers"]:
        print_servers(result["servers"])
