"""A checkpoint rewritten for stock servers: what stays byte for byte, what is quantized again, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB

from quantkit.errors import QuantkitError
from quantkit.export import dequantized, export
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.config import parse_quantization_config
from quantkit.pipeline import quantize
from quantkit.runtime.load import load


def logits(model) -> torch.Tensor:
    ids = torch.randint(2, VOCAB, (2, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float().log_softmax(-1)


def info_of(folder: Path):
    return parse_quantization_config(Checkpoint(folder).config, str(folder))


@pytest.mark.parametrize(
    ("recipe", "to", "scheme"),
    [
        ("fireq", "compressed-tensors-native", "W4A8-FP8 g128"),
        ("fireq", "w4a16", "W4A16 g128"),
        ("crossquant-w4a8", "w4a16", "W4A16 g128"),
    ],
)
def test_packed_weights_that_fit_stay_as_they_are(quantized, tmp_path, recipe, to, scheme):
    source, target = quantized(recipe), tmp_path / "out"
    result = export(source, to, target)
    assert result["requantized"] is None
    assert result["scheme"] == scheme
    old, new = Checkpoint(source), Checkpoint(target)
    assert old.tensors.keys() == new.tensors.keys()
    assert all(torch.equal(old.load(n), new.load(n)) for n in old.tensors)
    found = info_of(target)
    assert found.kv_cache is None
    assert found.meta["requires"] == []
    assert not found.meta["post_rope_scale"]
    assert not (target / "quantkit" / "kv.safetensors").exists()
    assert {str(s) for s in found.schemes.values()} == {scheme}
    quantization = pytest.importorskip("compressed_tensors.quantization")
    quantization.QuantizationConfig.model_validate(new.config["quantization_config"])


@pytest.mark.parametrize(
    ("recipe", "settings", "to"),
    [("kv4", [], "w4a16"), ("int4", ["weights.bits=8", "weights.group_size=64"], "w8a8")],
    ids=["no linears", "groups of 64"],
)
def test_another_kind_of_weight_is_quantized_again(tiny, text, tmp_path, recipe, settings, to):
    source = tmp_path / "source"
    quantize(str(tiny()), recipe, source, overrides=settings)
    result = export(source, to, tmp_path / "out", calib=text, samples=4, seqlen=64)
    assert result["requantized"]
    assert result["scheme"] == {"w4a16": "W4A16 g128", "w8a8": "W8A8-INT channel"}[to]
    assert result["servers"]["vLLM on CPU"] == "native"


def test_dropping_the_int4_cache_is_all_that_changes(quantized, tmp_path: Path):
    """FireQ's factors on keys cancel: the exported model is the loaded one with 16-bit keys and values."""
    export(quantized("fireq"), output=tmp_path / "out")
    model = load(quantized("fireq"), dtype=torch.float32, fused=False)
    for module in model.modules():
        if hasattr(module, "kv_quantizer"):
            module.kv_quantizer = None
    got = logits(load(tmp_path / "out", dtype=torch.float32, fused=False))
    assert float((got - logits(model)).abs().mean()) < 1e-4


def test_online_rotations_are_undone(quantized, tmp_path: Path):
    source = quantized("quest-hadamard")
    checkpoint, schemes = Checkpoint(source), info_of(source).schemes
    name = "model.layers.1.mlp.down_proj"
    weight = dequantized(checkpoint, name, schemes[name]).double()
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < 128:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64))
    rotated = (weight.unflatten(1, (-1, 128)) @ (hadamard / 128**0.5)).flatten(1)
    scale = checkpoint.load(f"{name}.weight_scale").double().repeat_interleave(128, 1)
    codes = rotated / scale - 0.5
    assert float((codes - codes.round()).abs().max()) < 1e-3
    assert -8 <= codes.round().min() <= codes.round().max() <= 7
    # With activations in 16 bits the model differs from the rotated one by their rounding only.
    export(source, "bf16", tmp_path / "out")
    assert "quantization_config" not in Checkpoint(tmp_path / "out").config
    got, want = logits(load(tmp_path / "out")), logits(load(source))
    assert float((got - want).abs().mean()) < 0.1


@pytest.mark.parametrize("original", [True, False], ids=["original there", "original gone"])
def test_what_does_not_fit_is_quantized_again(quantized, tiny, tmp_path: Path, text, original):
    source = shutil.copytree(quantized("quest-hadamard"), tmp_path / "model")
    if not original:
        report = json.loads((source / "quantkit" / "report.json").read_text())
        report["source"] = str(tmp_path / "gone")
        (source / "quantkit" / "report.json").write_text(json.dumps(report))
    result = export(source, "w4a16", tmp_path / "out", calib=str(text), samples=8, seqlen=64)
    assert result["requantized"] == (str(tiny().resolve()) if original else "its packed weights")
    assert result["scheme"] == "W4A16 g128"
    assert info_of(tmp_path / "out").meta["requires"] == []
    assert not list(tmp_path.glob(".quantkit-export-*"))
    assert float((logits(load(tmp_path / "out")) - logits(load(tiny()))).abs().mean()) < 0.6


def test_what_cannot_be_is_one_line(quantized, tiny, tmp_path: Path):
    for model, to, says in [
        (quantized("fireq"), "gguf", "llama.cpp's convert_hf_to_gguf.py"),
        (quantized("fireq"), "w3a3", "--to w3a3: unknown"),
        (quantized("int8"), "w8a8", "is W8A8-INT channel already"),
        (tiny(), "w4a16", "not a quantized checkpoint"),
        (tmp_path / "nowhere", "w4a16", "no such model"),
    ]:
        with pytest.raises(QuantkitError, match=says):
            export(model, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(QuantkitError, match="was not written by quantkit"):
        export(quantized("fireq"), "w4a16", tmp_path / "mine")


def test_the_command_prints_what_it_costs(quantized, tmp_path: Path, capsys):
    from quantkit.cli.export import command

    command(str(quantized("fireq")), output=str(tmp_path / "out"), limit=2)
    printed = capsys.readouterr().out
    assert "W4A8-FP8 g128, the same packed weights" in printed
    assert "perplexity" in printed
    assert "2 windows of 256 tokens" in printed
    report = json.loads((tmp_path / "out" / "quantkit" / "report.json").read_text())
    assert report["export_ppl"]["after"]["windows"] == 2
