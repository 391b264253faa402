"""Each example runs, as its first lines say it is called."""

import importlib.util
from pathlib import Path

import pytest
import typer

from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.config import parse_quantization_config

EXAMPLES = Path(__file__).parent.parent / "examples"


def main_of(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_quantize(tiny, tmp_path: Path, capsys):
    main_of("quantize")(str(tiny()), "int4", tmp_path / "out", prompt="The 3th line")
    printed = capsys.readouterr().out
    assert "linears 0.25" in printed
    assert "The 3th line" in printed
    with pytest.raises(typer.Exit):
        main_of("quantize")(str(tmp_path / "none"), "int4", tmp_path / "out2", prompt="a")


def test_recipe(quantized):
    folder = quantized(str(EXAMPLES / "recipe.yaml"))
    info = parse_quantization_config(Checkpoint(folder).config, "")
    found = {name.rpartition(".")[2]: str(scheme) for name, scheme in info.schemes.items()}
    assert found["down_proj"] == "W8A8-INT channel"
    assert found["up_proj"] == "W4A8-FP8 g128"
    assert info.kv_cache is None


def test_with_transformers(quantized, capsys):
    main_of("with_transformers")(str(quantized("fireq")), "The 3th line", tokens=4)
    assert capsys.readouterr().out.startswith("The 3th line")


def test_evaluate(quantized, tiny, text: Path, capsys):
    main_of("evaluate")(str(tiny()), str(quantized("int4")), str(text), seqlen=64, limit=2)
    assert "ratio  " in capsys.readouterr().out


def test_openai_client_without_a_server(capsys):
    pytest.importorskip("openai", reason="openai is in the extra `serving`")
    with pytest.raises(typer.Exit):
        main_of("openai_client")("llama", "And", address="http://127.0.0.1:9/v1", tokens=1)
    assert "error: http://127.0.0.1:9/v1" in capsys.readouterr().err
