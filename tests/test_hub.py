"""Uploading: against a stand-in of the hub that this test starts on loopback."""

import base64
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quantkit import hub
from quantkit.errors import QuantkitError

TOKEN = "hf_right"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload asks for."""

    repos: dict[str, dict[str, bytes]]
    blobs: dict[str, bytes]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, data: object) -> None:
        body = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self) -> None:
        if not self.allowed:
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user"})
        name = self.path.removeprefix("/api/models/").partition("/revision")[0]
        if name in self.repos:
            return self.answer(200, {"id": name, "sha": "0" * 40, "siblings": []})
        return self.answer(404, {"error": "Repository not found"})

    def do_PUT(self) -> None:
        self.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer(200, {})

    def do_POST(self) -> None:
        data = self.body()
        base = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] == "others":
                return self.answer(403, {"error": "Forbidden"})
            if name in self.repos:
                return self.answer(409, {"error": "exists", "url": f"{base}/{name}"})
            self.repos[name] = {}
            return self.answer(200, {"url": f"{base}/{name}"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(data)["files"]
            ]  # fmt: skip
            return self.answer(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{base}/blob/{o['oid']}", "header": {}}}}
                for o in json.loads(data)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit")[0]
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.repos[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.repos[name][value["path"]] = self.blobs[value["oid"]]
            return self.answer(
                200, {"commitUrl": f"{base}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}
            )
        return self.answer(200, {"errors": [], "warnings": []})  # validate-yaml


@pytest.fixture
def server() -> Iterator[type[Hub]]:
    handler = type("Handler", (Hub,), {"repos": {"me/taken": {}}, "blobs": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        handler.address = f"http://127.0.0.1:{http.server_port}"  # type: ignore[attr-defined]
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield handler
        http.shutdown()


@pytest.fixture
def online(server, monkeypatch):
    """The hub's library in this process, pointed at the stand-in."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(hub, "_api", partial(HfApi, server.address))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


def test_a_verified_output_is_uploaded_whole(online, quantized, capsys):
    from quantkit.cli.push import command

    folder = quantized("fireq")
    command(str(folder), "me/new")
    assert f"{online.address}/me/new" in capsys.readouterr().out
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    assert online.repos["me/new"].keys() == files.keys()
    for name, content in online.repos["me/new"].items():
        if name == "quantkit/report.json":
            # Where it was made is nobody's concern.
            assert json.loads(content)["source"] == "model"
        else:
            assert content == files[name].read_bytes(), name


def test_missing_documents_are_drawn(online, quantized, tmp_path: Path):
    import shutil

    folder = shutil.copytree(quantized("int4"), tmp_path / "model")
    (folder / "quantkit" / "report.html").unlink()
    (folder / "README.md").write_text("My own words.")
    hub.push(folder, "me/new")
    assert b"<html" in online.repos["me/new"]["quantkit/report.html"]
    assert online.repos["me/new"]["README.md"] == b"My own words."


@pytest.mark.parametrize(
    ("repo", "token", "says"),
    [
        ("me/new", None, "no token of the hub was found"),
        ("me/new", "hf_wrong", "does not accept the token"),
        ("me/taken", TOKEN, "exists already; --overwrite"),
        ("others/new", TOKEN, "may not write to others"),
    ],
)
def test_refusals_are_one_line(online, quantized, monkeypatch, repo, token, says):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(QuantkitError, match=says) as refused:
        hub.push(quantized("int4"), repo)
    assert "\n" not in str(refused.value)
    assert online.repos == {"me/taken": {}}


def test_a_hub_that_is_not_there_is_one_line(online, monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(hub, "_api", partial(HfApi, "http://127.0.0.1:1"))
    with pytest.raises(QuantkitError, match="cannot be reached"):
        hub.check_target("me/new")


def test_what_is_not_finished_or_does_not_verify_stays_here(quantized, tmp_path: Path, monkeypatch):
    import shutil

    monkeypatch.setattr(hub, "check_target", lambda *_, **__: None)
    folder = shutil.copytree(quantized("int4"), tmp_path / "model")
    (folder / ".unfinished").mkdir()
    with pytest.raises(QuantkitError, match="unfinished"):
        hub.push(folder, "me/new")
    (folder / ".unfinished").rmdir()
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1] + b"x")  # fmt: skip
    with pytest.raises(QuantkitError, match="does not verify"):
        hub.push(folder, "me/new")


def test_quantize_looks_at_the_target_first(monkeypatch, tmp_path: Path):
    from quantkit.cli.quantize import command

    with pytest.raises(QuantkitError, match="ORG/NAME is expected"):
        command("llama", "int4", output=str(tmp_path / "out"), push="no-such-name")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(QuantkitError, match="HF_HUB_OFFLINE is set"):
        command("llama", "int4", output=str(tmp_path / "out"), push="me/new")
    assert not (tmp_path / "out").exists()


def test_quantize_and_push_in_one_command(online, tiny, tmp_path: Path, capsys):
    from quantkit.cli.quantize import command

    command(str(tiny()), "int4", output=str(tmp_path / "out"), push="me/new")
    assert f"{online.address}/me/new" in capsys.readouterr().out
    written = {
        file.relative_to(tmp_path / "out").as_posix()
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    }
    assert online.repos["me/new"].keys() == written
