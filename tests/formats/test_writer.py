"""An output never looks finished before it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.errors import QuantkitError
from quantkit.formats.writer import UNFINISHED, OutputFolder, is_ours, sha256


def config(hashes: dict[str, str]) -> dict:
    return {"quantization_config": {"quantkit": {"shards": hashes}}}


def write(path: Path, value: float = 1.0, **settings) -> None:
    with OutputFolder(path, **settings) as folder:
        folder.add("a", torch.full((4,), value))
        folder.finish(
            {"quantkit/side.txt": lambda target: target.write_text("side") and None}, config
        )


def test_a_finished_folder(tmp_path: Path):
    out = tmp_path / "out"
    write(out)
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "quantkit"}
    assert (out / "quantkit" / "side.txt").read_text() == "side"
    shards = json.loads((out / "config.json").read_text())["quantization_config"]["quantkit"][
        "shards"
    ]
    assert shards == {"model.safetensors": sha256(out / "model.safetensors")}
    assert (out / "model.safetensors").stat().st_mode & 0o777 == (
        out / "config.json"
    ).stat().st_mode & 0o777
    assert is_ours(out)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("after", range(3))
def test_config_json_moves_last(tmp_path: Path, monkeypatch, after: int, overwrite: bool):
    """Whenever moving into place stops, no config.json stands beside shards it does not belong to."""
    out = tmp_path / "out"
    if overwrite:
        write(out, 2.0)
    real, moved = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if Path(target).parent == out:
            if len(moved) == after:
                raise OSError(5, "Input/output error")
            moved.append(Path(target).name)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(QuantkitError, match="cannot be written"):
        write(out, overwrite=overwrite)
    assert "config.json" not in moved
    assert not (out / "config.json").exists()
    monkeypatch.undo()
    write(out)
    assert (out / "config.json").is_file()
    assert not (out / UNFINISHED).exists()


def fail(path: Path) -> None:
    with OutputFolder(path) as folder:
        folder.add("a", torch.ones(4))
        raise RuntimeError


def test_a_failure_removes_what_was_begun(tmp_path: Path):
    out, kept = tmp_path / "deep" / "out", tmp_path / "kept"
    with pytest.raises(RuntimeError):
        fail(out)
    assert not out.exists()
    kept.mkdir()
    with pytest.raises(RuntimeError):
        fail(kept)
    assert kept.is_dir()
    assert not list(kept.iterdir())


def test_a_tensor_twice_is_our_mistake(tmp_path: Path):
    with OutputFolder(tmp_path / "out", shard_bytes=1) as folder:
        folder.add("a", torch.ones(4))
        folder.end_of_layer()
        with pytest.raises(ValueError, match="twice"):
            folder.add("a", torch.ones(4))


def test_shards_keep_tensors_aligned_and_take_large_headers(tmp_path: Path):
    """Tensors of odd sizes come before wider ones; readers want each at a multiple of its element's size."""
    tensors = {f"odd.{n}": torch.full((n,), n, dtype=torch.int8) for n in range(1, 70)}
    tensors |= {f"wide.{n}": torch.full((3,), float(n), dtype=torch.float64) for n in range(5)}
    tensors["scalar"] = torch.tensor(3, dtype=torch.bfloat16)
    with OutputFolder(tmp_path / "out", tensors=1) as folder:
        for name in sorted(tensors):
            folder.add(name, tensors[name])
        folder.finish({}, config)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("compact", [0, 1 << 30])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_what_came_after_the_last_save_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compact: int, shard_bytes: int
):
    """Also where the shard was closed since."""
    from quantkit.formats import shards

    monkeypatch.setattr(shards, "_COMPACT", compact)

    def put(folder: OutputFolder, *numbers: int) -> None:
        for number in numbers:
            folder.add(f"t{number}", torch.full((100,), float(number)))

    def once(out: Path, stop: bool) -> None:
        with OutputFolder(out, shard_bytes=shard_bytes) as folder:
            kept = folder.begin({"a": 1})
            if kept is None:
                put(folder, 0, 1)
                folder.save({"done": 2})
                put(folder, 2)
                folder.end_of_layer()
                if stop:
                    raise KeyboardInterrupt
                put(folder, 3)
            else:
                assert kept == {"done": 2}
                put(folder, 2)
                folder.end_of_layer()
                put(folder, 3)
            folder.finish({}, config)

    once(tmp_path / "whole", stop=False)
    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "out", stop=True)
    once(tmp_path / "out", stop=True)
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert len(names) == (2 if shard_bytes > 1 else 4)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
