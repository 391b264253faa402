"""`quantkit serve`: what is refused before anything is loaded, and the real client against the real server."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interrupts import hear_interrupts

from quantkit import load, quantize
from quantkit.cli import serve
from quantkit.errors import QuantkitError
from quantkit.models.tokenizer import load_tokenizer

MISSING = [n for n in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(n) is None]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_missing_extra_is_one_line(monkeypatch):
    import transformers.utils.import_utils as utils

    monkeypatch.setattr(utils, "is_serve_available", lambda: False)
    with pytest.raises(QuantkitError, match=r"pip install 'quantkit\[serving\]'"):
        serve.command("llama")


def test_bad_input_is_one_line_before_anything_is_loaded(monkeypatch, tmp_path: Path, tiny):
    monkeypatch.setattr(serve, "_check_installed", lambda: None)
    monkeypatch.setattr(serve, "_start", lambda *_: pytest.fail("something was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(QuantkitError, match="cannot listen there"):
            serve.command("llama", host="127.0.0.1", port=taken.getsockname()[1], device="cpu")
    port = free_port()
    for model, says in [
        ("no-such-model", "no such model"),
        (str(tmp_path), "no config.json"),
    ]:
        with pytest.raises(QuantkitError, match=says):
            serve.command(model, host="127.0.0.1", port=port, device="cpu")
    with pytest.raises(QuantkitError, match="--device warp"):
        serve.command("llama", host="127.0.0.1", port=port, device="warp")


@pytest.mark.parametrize(("stops", "code"), [(lambda _: None, 1), (None, 0)])
def test_a_server_that_ends_by_itself_is_a_failure(monkeypatch, capsys, stops, code):
    class Thread:
        alive = True

        def is_alive(self) -> bool:
            return self.alive

        def join(self, seconds: float) -> None:
            if stops is None:
                raise KeyboardInterrupt
            self.alive = False

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(serve, "_check_installed", lambda: None)
    monkeypatch.setattr(serve, "_start", lambda *_: SimpleNamespace(_thread=Thread()))
    monkeypatch.setattr(serve.os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        serve.command("llama", host="127.0.0.1", port=free_port(), device="cpu")
    assert left.value.code == code
    assert ("stopped by itself" in capsys.readouterr().err) == bool(code)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "llama-fireq"
    quantize("llama", "fireq", folder, samples=4, seqlen=128)
    return folder


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "quantkit", "serve", str(model), "--host", "127.0.0.1"]
    cache = {"HF_HUB_CACHE": str(tmp_path_factory.mktemp("hub") / "not there")}
    with subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | cache,
        preexec_fn=hear_interrupts,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in first
        try:
            yield f"http://127.0.0.1:{port}/v1"
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
class TestTheServer:
    def client(self, address: str):
        import openai

        return openai.OpenAI(base_url=address, api_key="none", max_retries=0)

    def test_completions_stream_what_the_model_says(self, model: Path, address: str):
        prompt = "In the beginning God"
        stream = self.client(address).completions.create(
            model=str(model), prompt=prompt, max_tokens=24, temperature=0, stream=True
        )
        chunks = [chunk.choices[0].text for chunk in stream]
        assert len(chunks) > 5
        tokenizer = load_tokenizer(model)
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = load(model).generate(**inputs, max_new_tokens=24, do_sample=False)
        said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert "".join(chunks).strip() == said.strip()

    def test_a_chat_streams(self, model: Path, address: str):
        stream = self.client(address).chat.completions.create(
            model=str(model),
            messages=[{"role": "user", "content": "Who art thou?"}],
            max_tokens=16,
            temperature=0,
            stream=True,
        )
        parts = [c.choices[0].delta.content for c in stream if c.choices]
        assert "".join(part or "" for part in parts).strip()

    def test_a_client_that_leaves_stops_nobody(self, model: Path, address: str):
        client = self.client(address)
        stream = client.completions.create(
            model=str(model), prompt="And", max_tokens=500, temperature=0, stream=True
        )
        next(iter(stream))
        stream.close()
        answer = client.completions.create(
            model=str(model), prompt="And", max_tokens=4, temperature=0
        )
        assert answer.usage.completion_tokens == 4

    def test_another_models_name_is_refused(self, address: str):
        import openai

        with pytest.raises(openai.BadRequestError) as refused:
            self.client(address).completions.create(model="other", prompt="And")
        assert "pinned" in refused.value.response.text
        with urllib.request.urlopen(f"{address}/models") as answer:
            assert answer.status == 200

    def test_the_example_streams(self, model: Path, address: str, capsys):
        path = Path(__file__).parents[2] / "examples" / "openai_client.py"
        spec = importlib.util.spec_from_file_location("example_client", path)
        assert spec is not None
        assert spec.loader is not None
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        example.main(str(model), "In the beginning", address=address, tokens=8)
        assert capsys.readouterr().out.strip()
