"""What the commands print: for people, and as JSON."""

import json
import sys
from pathlib import Path

import pytest

from quantkit.cli import main as cli


@pytest.fixture
def run(capsys, monkeypatch):
    import logging

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert exit_.value.code == 0, captured.err
        return captured.out

    yield call
    logging.disable(logging.NOTSET)


def test_quantize_as_json_is_one_object(run, tiny, tmp_path: Path):
    report = json.loads(run("quantize", tiny(), "-r", "int4", "-o", tmp_path / "out", "--json"))
    assert report["output"] == str(tmp_path / "out")
    assert report["recipe"]["name"] == "int4"


def test_eval_shows_the_original_beside(run, quantized, tiny, text: Path):
    folder = quantized("int4")
    out = run("eval", folder, "--ppl", text, "--limit", 5, "--seqlen", 64)
    assert str(tiny()) in out
    assert "ratio" in out
    assert "KL" in out
    assert "protocol gptq: windows of 64 tokens" in out
    data = json.loads(run("eval", folder, "--ppl", text, "--ppl", "sample", "--limit", 5, "--json"))
    assert {"model", "ppl", "baseline", "bytes", "seconds"} <= set(data)
    assert set(data["ppl"]) == set(data["baseline"]) == {str(text), "sample"}
    assert set(data["ppl"]["sample"]) == {
        "ppl",
        "tokens",
        "windows",
        "seqlen",
        "stderr",
        "protocol",
    }
    assert 0 < data["divergence"]["sample"]["kl"] < 1
    assert json.loads(run("eval", tiny(), "--limit", 2, "--json"))["baseline"] is None


def test_eval_of_several_models(run, quantized, tiny, tmp_path: Path):
    folders, file = [quantized("int4"), quantized("int8")], tmp_path / "found.json"
    out = run("eval", *folders, "--limit", 3, "--seqlen", 64, "-o", file)
    rows = [line.split()[0] for line in out.splitlines()[1:4]]
    assert rows == [str(tiny()), *map(str, folders)]
    found = json.loads(file.read_text())["models"]
    assert found[1]["divergence"]["sample"]["kl"] < found[0]["divergence"]["sample"]["kl"]
    # Kept beside each model, for its report; nothing is put into a folder that is not ours.
    assert json.loads((folders[1] / "quantkit" / "eval.json").read_text())["ppl"] == found[1]["ppl"]
    assert not (tiny() / "quantkit").exists()


def test_the_last_one_quantized_here_is_the_default(run, tiny, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("quantize", tiny(), "-r", "int4")
    assert (tmp_path / "model-int4" / "config.json").is_file()
    assert json.loads(run("eval", "--limit", 1, "--json"))["model"] == "model-int4"
    assert "whole" in run("verify")


def test_report(run, quantized):
    folder = quantized("int8")
    data = json.loads(run("report", folder, "--json"))
    assert data["files"] == [str(folder / "quantkit" / "report.html"), str(folder / "README.md")]
    assert "report.html" in run("report", folder)


def test_plan(run, tiny):
    plan = json.loads(run("plan", tiny(), "-r", "fireq", "--json"))
    assert len(plan["modules"]) == 14
    assert plan["linear_bytes"]["after"] / plan["linear_bytes"]["before"] < 0.27
    assert plan["tensor_parallel"] == {"1": True, "2": False, "4": False, "8": False}
    assert "W4A8-FP8 g128" in run("plan", tiny(), "-r", "fireq")
    assert "without it, refused" in run("plan", tiny(), "-r", "quest-hadamard")


@pytest.mark.parametrize(
    ("recipe", "linear", "op"),
    [
        ("fireq", "up", "int4_fp8_linear"),
        ("quest-hadamard", "up", "int4_int8_linear"),
        ("quest-hadamard", "down", "hadamard_int4_linear"),
    ],
)
def test_inspect_says_which_implementation_runs(run, quantized, recipe, linear, op, monkeypatch):
    data = json.loads(run("inspect", quantized(recipe), "--json"))
    entry = data["modules"][f"model.layers.0.mlp.{linear}_proj"]
    assert (entry["op"], entry["decode"], entry["prefill"]) == (op, "cpu", "cpu")
    assert sum(e["bytes"] for e in data["modules"].values()) + data["kept_bytes"] == data["bytes"]
    monkeypatch.setenv("QUANTKIT_BACKEND", "reference")
    assert "decode: reference" in run("inspect", quantized(recipe))


def test_verify(run, quantized, tiny):
    data = json.loads(run("verify", quantized("fireq"), "--against", tiny(), "--json"))
    assert data["ok"] is True
    assert data["problems"] == []


def test_generate(run, quantized):
    prompt = "The 5th line"
    data = json.loads(run("generate", quantized("fireq"), prompt, "--max-new-tokens", 4, "--json"))
    assert data["prompt"] == prompt
    assert prompt in run("generate", quantized("fireq"), prompt, "--max-new-tokens", 4)


def test_recipes(run):
    assert "crossquant-w4a8" in run("recipes")
    assert "group_size: 128" in run("recipes", "crossquant-w4a8")
    assert json.loads(run("recipes", "int8", "--json"))["weights"]["bits"] == 8


def test_help_is_quick_and_lists_the_commands(run, monkeypatch):
    out = run("--help")
    for command in ("quantize", "plan", "eval", "generate", "inspect", "verify", "recipes"):
        assert command in out
