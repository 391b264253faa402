"""Checkpoints under the model's names: other prefixes, other names, experts in one tensor, tensors of no module."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model, save_model, save_tokenizer

import quantkit
from quantkit import plain
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.experts import Stack
from quantkit.models.files import ModelCheckpoint
from quantkit.models.structure import build_skeleton, load_config
from quantkit.verify import Verification, verify

MODEL = "model.safetensors"


def open_in_model_names(folder: Path) -> ModelCheckpoint:
    source = Checkpoint(folder)
    return ModelCheckpoint(source, build_skeleton(load_config(source.config, "m"), "m"))


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe", "llama4"])
def test_experts_in_one_tensor_and_apart(variant: str, tmp_path: Path):
    """transformers' own layout and the original files' give the same output, under the original names."""
    apart, stacked = save_model(tmp_path / "apart", variant), tmp_path / "stacked"
    model = make_model(variant).to(torch.bfloat16)
    model.save_pretrained(str(stacked), save_original_format=False)
    save_tokenizer(stacked)
    outputs = []
    for source in (apart, stacked):
        quantkit.quantize(str(source), "int4", tmp_path / f"{source.name}-int4")
        outputs.append(load_file(tmp_path / f"{source.name}-int4" / MODEL))
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(t, outputs[1][n]) for n, t in outputs[0].items())
    expert = {
        "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2",
        "qwen3-moe": "model.layers.1.mlp.experts.3.down_proj",
        "llama4": "model.layers.1.feed_forward.experts.3.down_proj",
    }[variant]
    assert f"{expert}.weight_packed" in outputs[0]
    config = json.loads((tmp_path / "apart-int4" / "config.json").read_text())
    ours = config["quantization_config"]
    assert expert in ours["quantkit"]["modules"]["group_0"]
    router = {"llama4": "feed_forward.router", "mixtral": "block_sparse_moe.gate"}
    assert f"model.layers.1.{router.get(variant, 'mlp.gate')}" in ours["ignore"]
    assert not verify(tmp_path / "stacked-int4", against=str(stacked)).problems


@pytest.mark.parametrize("variant", ["mixtral", "gpt-neox"])
def test_transformers_loads_what_has_other_names(variant: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    quantkit.quantize(str(save_model(tmp_path / "m", variant)), "int8", tmp_path / "q")
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        ours = quantkit.load(tmp_path / "q")(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "q"))(ids).logits
    assert torch.equal(ours, theirs)


def test_a_missing_prefix_and_tensors_of_no_module(tmp_path: Path):
    """As in Bloom's files; what the model has no module for comes through byte for byte."""
    folder = save_model(tmp_path / "m", "bloom")
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(folder / MODEL).items()
    }
    extra = {
        "mtp.0.proj.weight": torch.randn(8, 8),
        "logit_gain": torch.tensor([2.5]),
        "h.2.mlp.dense_h_to_4h.weight": torch.ones(4, 4),
    }
    save_file(tensors | extra, folder / MODEL, metadata={"format": "pt"})
    names = open_in_model_names(folder)
    assert "transformer.h.1.input_layernorm.weight" in names.tensors
    assert names.file_name("transformer.h.1.input_layernorm.weight") == "h.1.input_layernorm.weight"
    quantkit.quantize(str(folder), "int8", tmp_path / "q")
    written = load_file(tmp_path / "q" / MODEL)
    assert {n: t.shape for n, t in written.items() if "scale" not in n} == {
        n: t.shape for n, t in (tensors | extra).items()
    }
    assert all(torch.equal(written[n], t) for n, t in extra.items())
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        want, got = (quantkit.load(tmp_path / n)(ids).logits.float() for n in ("m", "q"))
    assert float((want - got).norm() / want.norm()) < 0.05


def test_rows_and_pieces_of_an_expert(tmp_path: Path):
    """Also where the file's matrices are transposed."""
    folder = save_model(tmp_path / "m", "llama4")
    names = open_in_model_names(folder)
    name = "model.layers.1.feed_forward.experts.2.up_proj.weight"
    stored = load_file(folder / MODEL)["model.layers.1.feed_forward.experts.gate_up_proj"]
    want = stored[2].T[384:]
    assert names.tensors[name].shape == tuple(want.shape)
    assert torch.equal(names.read(name), want)
    assert torch.equal(names.read(name, rows=(5, 9)), want[5:9])
    assert torch.equal(torch.cat(list(names.pieces(name))).view_as(want), want)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("which", ["gate", "up", "down"])
def test_stored_rows_are_the_matrix_rows(transposed: bool, interleaved: bool, which: str):
    stack, stored = Stack(transposed, interleaved), torch.arange(12 * 4).view(12, 4)
    want = stack.matrix(stored, which)
    for rows in ((0, 1), (1, 3), (0, len(want))):
        place = stack.stored_rows(which, rows, 12)
        assert (place is None) == transposed
        if place is not None:
            assert torch.equal(stored[place], want[slice(*rows)])


@pytest.mark.parametrize("variant", ["qwen3-moe", "llama4"])
def test_experts_in_one_tensor_are_read_once(variant: str, tmp_path: Path, monkeypatch):
    """However few rows are rounded at a time: reading a whole expert for each of them would take days at 400B."""
    make_model(variant).to(torch.bfloat16).save_pretrained(
        str(tmp_path / "m"), save_original_format=False
    )
    save_tokenizer(tmp_path / "m")
    read, real = {"bytes": 0}, Checkpoint._bytes

    def counted(self, name: str, first: int, last: int) -> torch.Tensor:
        if ".experts." in name:
            read["bytes"] += last - first
        return real(self, name, first, last)

    monkeypatch.setattr(plain, "ELEMENTS", 1 << 10)
    names = open_in_model_names(tmp_path / "m")
    size = sum(info.bytes for name, info in names.tensors.items() if ".experts." in name)
    monkeypatch.setattr(Checkpoint, "_bytes", counted)
    monkeypatch.setattr("quantkit.verify.verify", lambda *_, **__: Verification())
    quantkit.quantize(str(tmp_path / "m"), "int4", tmp_path / "q")
    assert size > 1 << 18
    assert read["bytes"] == size
