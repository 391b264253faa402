"""Run a quantized checkpoint by transformers' own classes; `import quantkit` is all it takes.

python examples/with_transformers.py llama-fireq "In the beginning"
"""

from __future__ import annotations

from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit


def main(
    model: Annotated[str, typer.Argument(help="A folder that quantkit wrote, or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="What the model goes on from.")],
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 16,
) -> None:
    """Generate from a prompt."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model)
    except quantkit.QuantkitError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = loaded.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens, do_sample=False,
    )  # fmt: skip
    typer.echo(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    typer.run(main)
