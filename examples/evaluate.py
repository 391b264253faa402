"""Perplexity of a quantized model beside its original, on a text of yours.

python examples/evaluate.py llama llama-fireq book.txt
"""

from __future__ import annotations

from typing import Annotated

import typer

import quantkit
from quantkit.calibration.data import read_text, tokenize
from quantkit.evaluate.perplexity import perplexity
from quantkit.models.names import find_model
from quantkit.models.tokenizer import load_tokenizer


def main(
    original: Annotated[str, typer.Argument(help="A folder, a hub id, or `llama`.")],
    model: Annotated[str, typer.Argument(help="What was made of it.")],
    text: Annotated[str, typer.Argument(help="sample, wikitext, or a UTF-8 file.")],
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    limit: Annotated[int, typer.Option(help="At most so many windows.")] = 32,
) -> None:
    """Measure both."""
    try:
        content = read_text(text, split="test")
        found = []
        for name in (original, model):
            tokens = tokenize(load_tokenizer(find_model(name)), content)
            result = perplexity(quantkit.load(name), tokens, seqlen, limit=limit)
            typer.echo(f"{name}  {result.ppl:.4f}")
            found.append(result.ppl)
    except quantkit.QuantkitError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"ratio  {found[1] / found[0]:.4f}")


if __name__ == "__main__":
    typer.run(main)
