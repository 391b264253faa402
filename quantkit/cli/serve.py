"""`quantkit serve`: transformers' own server, with our integration loaded."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.models import model_or_last, tokenizer_of
from quantkit.cli.output import note, out
from quantkit.errors import InternalError, QuantkitError


def command(
    model: Annotated[
        str | None, typer.Argument(help="Left out: the one quantized last in this folder.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 lets others in.")
    ] = "localhost",
    port: Annotated[int, typer.Option(help="The port.")] = 8000,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of the activations: float16, bfloat16, float32; auto: the model's.")
    ] = "auto",
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it; needs quantkit[serving]."""
    name = model_or_last(model)
    _check_installed()
    _check_port(host, port)
    folder, chats = _check_model(name, device)
    server = _start(folder, host, port, device, dtype)
    code = 0
    try:
        _tell(name, folder, host, port, chats)
        while server._thread.is_alive():
            server._thread.join(1)
        code = 1
        note(f"error: the server at {host}:{port} stopped by itself; start it again")
    except KeyboardInterrupt:
        note("stopped")
    # Once a client has left amid its answer, transformers' server does not end by itself; it holds nothing to lose.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_installed() -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise QuantkitError("serve needs transformers' server: pip install 'quantkit[serving]'")


def _check_port(host: str, port: int) -> None:
    """Said before a model is loaded for nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise QuantkitError(
            f"--host {host} --port {port}: cannot listen there ({reason}); choose another --port"
        ) from None


def _check_model(name: str, device: str) -> tuple[str, bool]:
    """(what transformers calls it, whether it has a chat template); everything that can be known before loading."""
    from quantkit.device import find_device
    from quantkit.formats.checkpoint import Checkpoint
    from quantkit.formats.config import parse_quantization_config
    from quantkit.models.names import BUNDLED, find_model

    find_device(device)
    path = find_model(name)
    if "@" in str(path):
        raise QuantkitError(f"{path}: transformers' server takes what follows @ for a revision; move it")  # fmt: skip
    checkpoint = Checkpoint(path)
    if "quantization_config" in checkpoint.config:
        parse_quantization_config(checkpoint.config, name)
    tokenizer = tokenizer_of(name)
    return (str(path) if name == BUNDLED else name), bool(tokenizer.chat_template)


def _start(folder: str, host: str, port: int, device: str, dtype: str) -> Any:
    """The running server, model loaded."""
    from transformers.cli.serve import Serve
    from transformers.utils import logging

    _make_hub_cache()
    logging.disable_progress_bar()
    note(f"loading {folder}")
    try:
        server = Serve(
            folder, host=host, port=port, device=device, dtype=dtype,
            log_level="error", non_blocking=True,
        )  # fmt: skip
    except ValueError as error:
        raise QuantkitError(" ".join(str(error).split())) from None
    while not server.server.started:
        if not server._thread.is_alive():
            raise InternalError(f"the server at {host}:{port} stopped as it started")
        time.sleep(0.05)
    return server


def _make_hub_cache() -> None:
    """`GET /v1/models` looks into it, and fails where it is not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        note(f"{HF_HUB_CACHE}: cannot be made ({error.strerror}); GET /v1/models will fail")


def _tell(name: str, model: str, host: str, port: int, chats: bool) -> None:
    address = f"http://{host}:{port}/v1"
    where = "chat/completions" if chats else "completions"
    content = '"messages": [{"role": "user", "content": "Hello"}]' if chats else '"prompt": "Hello"'
    out.print(f"{name}: at {address} (Ctrl-C ends it)", markup=False)
    if not chats:
        out.print("  its tokenizer has no chat template: /completions alone works")
    out.print(
        f"  curl {address}/{where} -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{model}", {content}}}\'',
        markup=False,
    )
    out.print(
        f'  openai.OpenAI(base_url="{address}", api_key="none"), model="{model}"', markup=False
    )
    out.file.flush()
