"""`quantkit generate`: text, streamed; a chat when no prompt is given."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from quantkit.cli.models import model_or_last, tokenizer_of
from quantkit.cli.output import JsonOption, note, print_json
from quantkit.errors import QuantkitError


def command(
    model: Annotated[
        str | None, typer.Argument(help="Left out: the one quantized last in this folder.")
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help="Left out: a chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, or chat."""
    if max_new_tokens < 1:
        raise QuantkitError(f"--max-new-tokens {max_new_tokens}: at least 1 is needed")
    if temperature < 0:
        raise QuantkitError(f"--temperature {temperature}: may not be negative")
    name = model_or_last(model)
    import torch

    from quantkit.runtime.load import load

    tokenizer = tokenizer_of(name)
    loaded = load(name, device=device)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    if prompt is None:
        _chat(loaded, tokenizer, settings)
        return
    text = _continue(
        loaded, tokenizer, tokenizer(prompt, return_tensors="pt"), settings, stream=not as_json
    )
    if as_json:
        print_json({"model": name, "prompt": prompt, "text": text})


def _continue(
    model: Any, tokenizer: Any, inputs: Any, settings: dict[str, Any], *, stream: bool
) -> str:
    """Generate after `inputs`, printing as it comes if `stream`; the new text."""
    from transformers import TextStreamer

    ids = inputs["input_ids"].to(model.device)
    longest = int(getattr(model.config, "max_position_embeddings", 0))
    if longest and ids.shape[1] >= longest:
        raise QuantkitError(
            f"prompt of {ids.shape[1]} tokens: the model takes fewer than {longest}; shorten it"
        )
    if longest:
        settings = settings | {
            "max_new_tokens": min(settings["max_new_tokens"], longest - ids.shape[1])
        }
    streamer = (
        TextStreamer(tokenizer, skip_special_tokens=True, skip_prompt=False) if stream else None
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=inputs["attention_mask"].to(model.device),
        streamer=streamer,
        **settings,
    )
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def _chat(model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
    if not tokenizer.chat_template:
        raise QuantkitError("the tokenizer has no chat template; give a PROMPT")
    note("a chat: one message a line; an empty line or Ctrl-D ends it")
    messages: list[dict[str, str]] = []
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        messages.append({"role": "user", "content": line})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        text = _continue(model, tokenizer, inputs, settings, stream=False)
        print(text.strip(), flush=True)
        messages.append({"role": "assistant", "content": text})
