"""Stream a completion from a server: `quantkit serve MODEL`, or `vllm serve MODEL` with quantkit beside it.

python examples/openai_client.py llama-fireq "In the beginning" --address http://localhost:8000/v1
"""

from __future__ import annotations

from typing import Annotated

import openai
import typer


def main(
    model: Annotated[str, typer.Argument(help="As the server calls it.")],
    prompt: Annotated[str, typer.Argument(help="What the model goes on from.")],
    address: Annotated[str, typer.Option(help="The server's.")] = "http://localhost:8000/v1",
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 16,
) -> None:
    """Print a completion as it comes."""
    client = openai.OpenAI(base_url=address, api_key="none")
    try:
        stream = client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True
        )
        for chunk in stream:
            typer.echo(chunk.choices[0].text, nl=False)
    except openai.APIError as error:
        typer.echo(f"error: {address}: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo()


if __name__ == "__main__":
    typer.run(main)
