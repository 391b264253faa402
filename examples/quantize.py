"""Quantize a model, load the result and let it speak.

python examples/quantize.py llama int4 llama-int4
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import quantkit
from quantkit.models.names import find_model


def main(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or `llama`.")],
    recipe: Annotated[str, typer.Argument(help="A recipe's name or YAML file.")],
    output: Annotated[Path, typer.Argument(help="The folder to make.")],
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")] = "In the beginning",
) -> None:
    """Quantize, load, generate."""
    from transformers import AutoTokenizer

    try:
        report = quantkit.quantize(str(find_model(model)), recipe, output)
        quantized = quantkit.load(output)
    except quantkit.QuantkitError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    before, after = report["linear_bytes"]["before"], report["linear_bytes"]["after"]
    typer.echo(f"{output}: linears {after / before:.3f} of their size")
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = quantized.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        max_new_tokens=16, do_sample=False,
    )  # fmt: skip
    typer.echo(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    typer.run(main)
