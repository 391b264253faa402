import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_model

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import INDEX, SINGLE, Checkpoint, read_header


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny(), tmp_path / "model"))


@pytest.fixture(scope="module")
def sharded_source(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("sharded") / "model", shard_size="1MB")


@pytest.fixture
def sharded(sharded_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_source, tmp_path / "sharded"))


def refused(folder: Path) -> str:
    with pytest.raises(QuantkitError) as error:
        Checkpoint(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_reads_one_file_and_shards_alike(folder: Path, sharded: Path):
    one, many = Checkpoint(folder), Checkpoint(sharded)
    assert len(many.files) > 1
    assert one.tensors.keys() == many.tensors.keys()
    assert one.bytes == many.bytes
    for name in one.tensors:
        assert torch.equal(one.load(name), many.load(name))


def test_a_folder_that_is_not_there(tmp_path: Path):
    assert "no such folder" in refused(tmp_path / "nothing")


def test_without_config(folder: Path):
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_config_that_is_no_json_object(folder: Path, content: str):
    (folder / "config.json").write_text(content)
    assert "config.json" in refused(folder)


def test_without_weights(folder: Path):
    (folder / SINGLE).unlink()
    assert "no weights" in refused(folder)


def test_pickle_only(folder: Path):
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pickle" in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated(folder: Path, keep: float):
    path = folder / SINGLE
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    assert "corrupted safetensors" in refused(folder)


def test_longer_than_its_tensors(folder: Path):
    with (folder / SINGLE).open("ab") as file:
        file.write(b"12345678")
    assert "belong to no tensor" in refused(folder)


@pytest.mark.parametrize(
    "entry",
    [
        5,
        {},
        {"dtype": "BF16", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [4, 8]},
        {"dtype": "BF16", "shape": ["x"], "data_offsets": [0, 4]},
        {"dtype": "NF4", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [2**62, 4], "data_offsets": [0, 4]},
    ],
)
def test_headers_that_lie(tmp_path: Path, entry: object):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(QuantkitError, match="corrupted safetensors"):
        read_header(path)


def test_a_header_that_claims_more_than_the_file(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(QuantkitError, match="corrupted safetensors"):
        read_header(path)


def test_a_missing_shard(sharded: Path):
    name = Checkpoint(sharded).files[1]
    (sharded / name).unlink()
    assert name in refused(sharded)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "sub/in.safetensors", "x.bin"]
)
def test_an_index_that_leads_elsewhere(sharded: Path, name: str):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    save_file({"model.norm.weight": torch.ones(256)}, str(sharded.parent / "outside.safetensors"))
    assert "same folder" in refused(sharded)


def test_an_index_that_is_wrong(sharded: Path):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = Checkpoint(sharded).files[0]
    (sharded / INDEX).write_text(json.dumps(index))
    assert "model.extra.weight" in refused(sharded)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(tmp_path: Path, value: float):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.tensor([1.0, value]).bfloat16()}, str(tmp_path / SINGLE))
    checkpoint = Checkpoint(tmp_path)
    checkpoint.load("a")
    with pytest.raises(QuantkitError, match="'a' holds NaN or infinity"):
        checkpoint.load("a", finite=True)


def test_a_link_that_leads_out_is_found_in_any_folder(tiny, tmp_path: Path):
    folder = shutil.copytree(tiny(), tmp_path / "model")
    (tmp_path / "secret").write_text("not yours")
    (folder / "additional_chat_templates" / "deep").mkdir(parents=True)
    (folder / "additional_chat_templates" / "deep" / "x.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(QuantkitError, match=r"x\.jinja"):
        Checkpoint(folder)
