"""Bad input: one line that says what and where, exit code 2, nothing half-written."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interrupts import hear_interrupts

from quantkit.cli import main as cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Run]:
    """quantkit's main, in this process, in an empty working directory: (exit code, stdout, stderr)."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    yield call
    logging.disable(logging.NOTSET)


def refused(run: Run, *arguments: object) -> str:
    """The one line on stderr; nothing on stdout, nothing in the working directory."""
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, "")
    assert len(lines) == 1
    assert "Traceback" not in err
    assert not list(Path.cwd().iterdir()), "something was left behind"
    return lines[0]


@pytest.fixture
def model(tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny(), tmp_path / "model"))


def test_models_that_are_none(run: Run, tmp_path: Path):
    assert "no such model" in refused(
        run, "quantize", tmp_path / "nothing" / "at" / "all", "-r", "int4"
    )
    assert "did you mean 'llama'" in refused(run, "quantize", "lama", "-r", "int4")
    assert "hub" in refused(run, "quantize", "some-org/some-model", "-r", "int4")
    assert "no such model" in refused(run, "eval", "nothing")
    assert "none was quantized" in refused(run, "eval")
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refused(run, "plan", file, "-r", "int4")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: (m / "config.json").unlink(), "no config.json"),
        (lambda m: (m / "config.json").write_text("{"), "not valid JSON"),
        (lambda m: (m / "model.safetensors").unlink(), "no weights"),
        (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "pickle"),
        (lambda m: (m / "model.safetensors").write_bytes(b"12345678901234567890"), "corrupted"),
        (lambda m: _resize(m / "model.safetensors", -100), "corrupted"),
        (lambda m: (m / "tokenizer.json").write_text("{"), "tokenizer"),
    ],
)
def test_broken_checkpoints(run: Run, model: Path, text: Path, spoil, says: str):
    spoil(model)
    assert says in refused(
        run, "quantize", model, "-r", "fireq", "--calib", text, "--samples", 4, "--seqlen", 64
    )


def _resize(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:by])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "bert"),
        ({"model_type": "nonesuch"}, "unknown to transformers"),
        ({"hidden_size": 512}, "config.json implies"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"hidden_size": "many"}, "config.json is not valid"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ],
)
def test_configs_that_do_not_fit(run: Run, model: Path, change_json, changes: dict, says: str):
    change_json(model / "config.json", **changes)
    assert says in refused(run, "quantize", model, "-r", "int4")


@pytest.mark.parametrize(
    "where", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_not_finite_weights(run: Run, model: Path, where: str):
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors[where][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    line = refused(run, "quantize", model, "-r", "int4")
    assert where in line
    assert "NaN" in line


def test_recipes_and_settings(run: Run, model: Path, tmp_path: Path):
    assert "did you mean 'fireq'" in refused(run, "quantize", model, "-r", "fireqq")
    assert "is not a setting" in refused(
        run, "quantize", model, "-r", "int4", "--set", "weights.bitz=4"
    )
    assert "matches no linear" in refused(
        run, "quantize", model, "-r", "int4", "--set", "ignore=[nothing]"
    )
    assert "does not divide" in refused(
        run, "quantize", model, "-r", "int4", "--set", "weights.group_size=256"
    )
    assert "rope_scaling.top_k 1000" in refused(
        run, "quantize", model, "-r", "fireq", "--set", "rope_scaling.top_k=1000"
    )
    bad = tmp_path / "bad.yaml"
    bad.write_text("weights: {bits: 9}")
    assert "weights.bits: 9 is not supported" in refused(run, "quantize", model, "-r", bad)
    bad.write_bytes(b"\xff\xfe\x00")
    assert "bad.yaml" in refused(run, "quantize", model, "-r", bad)


def test_calibration(run: Run, model: Path, tmp_path: Path, text: Path):
    def calibrate(*arguments: object) -> str:
        return refused(run, "quantize", model, "-r", "fireq", *arguments)

    assert "no such text" in calibrate("--calib", tmp_path / "nothing.txt")
    empty, latin, short = tmp_path / "empty.txt", tmp_path / "latin.txt", tmp_path / "short.txt"
    empty.write_text(" \n")
    latin.write_bytes("caf\xe9".encode("latin-1"))
    short.write_text("In the beginning.")
    assert "empty" in calibrate("--calib", empty)
    assert "not UTF-8" in calibrate("--calib", latin)
    assert "only 17 tokens" in calibrate("--calib", short, "--seqlen", 64)
    assert "use --samples 302" in calibrate("--calib", text, "--samples", 400, "--seqlen", 64)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text"\n')
    assert "broken.jsonl, line 2: not valid JSON" in calibrate("--calib", broken)
    broken.write_text('{"question": "a"}\n')
    assert "line 1: none of the fields" in calibrate("--calib", broken)
    broken.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    assert "has no chat template" in calibrate("--calib", broken)
    assert "did you mean ultrachat" in calibrate("--calib", "ultrachatt")
    assert "'x' is no number of samples" in calibrate("--calib", f"{text}:x")
    assert "pile-val: mit-han-lab/pile-val-backup is not to be had" in calibrate(
        "--calib", "pile-val"
    )
    assert "--samples 0" in calibrate("--samples", 0)
    assert "at most 256 tokens" in calibrate("--seqlen", 257)
    assert "wikitext" in calibrate("--calib", "wikitext")
    assert "--device" in calibrate("--device", "tpu9")


def test_outputs(run: Run, model: Path, tmp_path: Path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "novel.txt").write_text("precious")
    assert "not written by quantkit" in refused(
        run, "quantize", model, "-r", "int4", "-o", theirs, "--overwrite"
    )
    assert (theirs / "novel.txt").read_text() == "precious"
    assert "is a file" in refused(run, "quantize", model, "-r", "int4", "-o", theirs / "novel.txt")
    assert "cannot be written" in refused(
        run, "quantize", model, "-r", "int4", "-o", "/proc/nothing/here"
    )


def test_an_output_of_ours_is_kept_unless_told(run: Run, model: Path, tmp_path: Path):
    ours = tmp_path / "ours"
    assert run("quantize", model, "-r", "int4", "-o", ours)[0] == 0
    before = (ours / "model.safetensors").read_bytes()
    assert "--overwrite" in refused(run, "quantize", model, "-r", "int8", "-o", ours)
    assert (ours / "model.safetensors").read_bytes() == before
    assert run("quantize", model, "-r", "int8", "-o", ours, "--overwrite")[0] == 0
    assert (ours / "model.safetensors").read_bytes() != before
    assert "quantized already" in refused(run, "quantize", ours, "-r", "int4")


def test_a_full_disk(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Refused in one line; with room again, the same command goes on with what was safe."""
    import errno

    from quantkit.formats.shards import Pieces

    real, room = Pieces.write, [12]

    def write(self: Pieces, piece) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, piece)

    monkeypatch.setattr(Pieces, "write", write)
    out = tmp_path / "out"
    command = ("quantize", model, "-r", "int4", "-o", out)
    assert "the disk is full" in refused(run, *command)
    assert not out.exists()
    room[0] = 40  # a layer is 23
    assert "the disk is full" in refused(run, *command)
    assert {p.name for p in out.iterdir()} == {".unfinished"}
    monkeypatch.setattr(Pieces, "write", real)
    assert run(*command)[0] == 0
    assert run("quantize", model, "-r", "int4", "-o", tmp_path / "whole")[0] == 0
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_too_little_room_is_said_before_the_work(
    run: Run, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    from types import SimpleNamespace

    from quantkit import Recipe, estimate
    from quantkit.plan import make_plan

    with monkeypatch.context() as patched:
        patched.setattr(estimate.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "are free; free space, or choose" in refused(run, "quantize", model, "-r", "int4")
    with monkeypatch.context() as patched:
        patched.setattr(estimate.memory, "available", lambda: 1000)
        line = refused(run, "quantize", model, "-r", "int4")
        assert "of memory are needed" in line
        assert "a machine with more" in line
    # Room for all but the activations.
    need = make_plan(str(model), Recipe.load("fireq")).estimate
    room = need.host_bytes - need.activation_bytes // 2
    with monkeypatch.context() as patched:
        patched.setattr(estimate.memory, "available", lambda: room - estimate.memory.resident())
        line = refused(run, "quantize", model, "-r", "fireq", "--calib", text, "--no-offload")
        assert "leave --no-offload out, or use fewer --samples" in line


def test_eval_and_generate(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("QUANTKIT_WIKITEXT", raising=False)
    line = refused(run, "eval", model, "--ppl", "wikitext")
    assert "QUANTKIT_WIKITEXT" in line
    assert "datasets" in line
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "short.txt: text of 9 tokens: shorter" in refused(run, "eval", model, "--ppl", short)
    for content, says in ((b"\x00\x01\x02" * 999, "not text"), (b"\xff\xfe" * 999, "not UTF-8")):
        short.write_bytes(content)
        assert says in refused(run, "eval", model, "--ppl", short)
    assert "cannot be read" in refused(run, "eval", model, "--ppl", tmp_path)
    assert "f1: unknown metric" in refused(run, "eval", model, "--metrics", "kl,f1")
    assert "folder that exists" in refused(run, "eval", model, "-o", tmp_path / "no" / "file")
    assert "--device" in refused(run, "eval", model, "--device", "tpu9")
    assert "at most 256 tokens" in refused(run, "eval", model, "--seqlen", 4096)
    assert "no such model" in refused(run, "eval", model, "--baseline", "nothing")
    assert "--limit 0" in refused(run, "eval", model, "--limit", 0)
    assert "shorten it" in refused(run, "generate", model, "word " * 300)
    assert "--max-new-tokens" in refused(run, "generate", model, "x", "--max-new-tokens", 0)


def test_a_baseline_that_reads_other_tokens(run: Run, model: Path, tiny):
    line = refused(run, "eval", model, "--baseline", "llama")
    assert "different tokenizers" in line
    assert "none" in line
    assert run("eval", model, "--baseline", tiny(), "--limit", 1)[0] == 0


def test_reports_of_what_is_none(run: Run, model: Path):
    assert "not an output of quantkit" in refused(run, "report", model)
    assert "no such model" in refused(run, "report", "nothing")


def test_usage(run: Run):
    assert "Missing argument" in refused(run, "quantize")
    assert "No such command" in refused(run, "quantise")
    assert "No such option" in refused(run, "plan", "llama", "-r", "int4", "--frobnicate")


def test_debug_shows_the_traceback(run: Run):
    code, _, stderr = run("plan", "nothing", "-r", "int4", "--debug")
    assert code == 2
    assert "Traceback" in stderr
    assert "find_model" in stderr
    assert stderr.splitlines()[-1].startswith("error: nothing: no such model")


def test_interrupted_within_an_exec(tmp_path: Path):
    """Python of its own accord would end by the signal."""
    (tmp_path / "sitecustomize.py").write_text(
        "import quantkit.cli.main as m\nm.app = lambda **_: exec('raise KeyboardInterrupt')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", "recipes"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr.startswith("error: interrupted")
    assert done.returncode == 130


def test_interrupted(tiny, text: Path, tmp_path: Path):
    """Ctrl-C at whatever moment: 130, and at most a folder that is plainly unfinished."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "quantkit",
        "quantize",
        str(tiny()),
        "-r",
        "fireq",
        "-o",
        str(out),
    ]
    command += ["--calib", str(text), "--samples", "150", "--seqlen", "128"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )
    deadline = time.monotonic() + 60
    while not (out / ".unfinished").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in stderr
    # It may strike while the folder is being made or removed.
    assert not out.exists() or {p.name for p in out.iterdir()} <= {".unfinished"}
    assert stdout == ""


def test_an_unfinished_output_does_not_look_finished(run: Run, model: Path, tmp_path: Path):
    """What a killed run leaves: taken for ours, refused by readers, replaced by the next run."""
    out = tmp_path / "out"
    (out / ".unfinished").mkdir(parents=True)
    (out / ".unfinished" / "model.safetensors").write_bytes(b"half")
    assert "no config.json" in refused(run, "eval", out)
    assert "no config.json" in refused(run, "verify", out)
    assert run("quantize", model, "-r", "int4", "-o", out)[0] == 0
    assert not (out / ".unfinished").exists()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quantkit"][
        "shards"
    ]
