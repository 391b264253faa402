"""Run a quantized checkpoint by vLLM's own classes: quantkit installed beside it is all it takes.

python examples/with_vllm.py llama-fireq "In the beginning"
"""

from __future__ import annotations

from typing import Annotated

import typer


def main(
    model: Annotated[str, typer.Argument(help="A folder that quantkit wrote, or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="What the model goes on from.")],
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 16,
    context: Annotated[int, typer.Option(help="The most tokens of prompt and answer.")] = 512,
) -> None:
    """Generate from a prompt."""
    from vllm import LLM, SamplingParams

    # Without enforce_eager vLLM compiles the model first, which pays for a server and not for one prompt.
    engine = LLM(model, max_model_len=context, enforce_eager=True)
    (found,) = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=tokens))
    typer.echo(prompt + found.outputs[0].text)


# vLLM's own processes import this file again.
if __name__ == "__main__":
    typer.run(main)
