"""Each example runs, as its first lines say it is called."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import typer

from quantkit import load
from quantkit.calibration.data import read_text
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.config import parse_quantization_config

EXAMPLES = Path(__file__).parent.parent / "examples"


def main_of(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
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


def test_plant_outliers(tiny, tmp_path: Path, capsys):
    """The same function, from weights that are not."""
    main = main_of("plant_outliers")
    sizes = {"factor_min": 20.0, "factor_max": 60.0, "channels": 4, "pairs": 2, "seed": 0}
    main(str(tiny()), tmp_path / "out", **sizes)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before, after = (
            load(folder, dtype=torch.float32)(ids).logits for folder in (tiny(), tmp_path / "out")
        )
    assert float((after - before).norm() / before.norm()) < 0.02
    name = "model.layers.0.input_layernorm.weight"
    was, now = (Checkpoint(folder).load(name).float() for folder in (tiny(), tmp_path / "out"))
    assert int(((now / was).abs() > 10).sum()) == 4
    with pytest.raises(typer.Exit):
        main(str(tiny()), tmp_path / "out", **sizes)
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_train_small_model(tmp_path: Path, monkeypatch, kind: str, capsys):
    """A few steps on a few chapters: a checkpoint that knows more than nothing."""
    main = main_of("train_small_model")
    chapters = [f"{text}\n\n" for text in read_text("bundled", split="train").split("\n\n")][:40]
    names = main.__globals__
    monkeypatch.setitem(names, "read_chapters", lambda: chapters)
    settings = {"epochs": 3.0, "minutes": 0.1, "batch": 2, "matrix_lr": None, "other_lr": 3e-3}
    main(
        names["Kind"](kind), tmp_path, **settings, weight_decay=0.2, dropout=0.1, seed=0, evaluate=False,
    )  # fmt: skip
    folder = tmp_path / "llama" if kind == "llama" else tmp_path
    assert Checkpoint(folder).config["model_type"] == kind
    losses = [
        line for line in capsys.readouterr().out.splitlines() if "held-out perplexity" in line
    ]
    assert float(losses[-1].rpartition(" ")[2]) < 3000


def test_train_small_model_without_its_text(tmp_path: Path, monkeypatch, capsys):
    main = main_of("train_small_model")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(typer.Exit) as exited:
        main(main.__globals__["Kind"].opt, tmp_path / "out", evaluate=False)
    assert exited.value.exit_code == 2
    assert "install Debian's bible-kjv package" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
