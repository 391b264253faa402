import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import QuantkitError
from quantkit.formats.writer import sha256
from quantkit.verify import verify


@pytest.fixture
def folder(quantized, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized("fireq"), tmp_path / "copy"))


def rewrite(folder: Path, change, *, rehash: bool = True) -> None:
    """Change the tensors; with `rehash` also the recorded hash, so that other checks must find it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if rehash:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["quantkit"]["shards"]["model.safetensors"] = sha256(path)
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("recipe", ["fireq", "int8", "quest-hadamard-w4a4"])
def test_a_whole_output(quantized, tiny, recipe: str):
    result = verify(quantized(recipe), against=str(tiny()))
    assert result.problems == []
    assert len(result.checks) == (5 if recipe.startswith("quest") else 4)


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t[f"{NAME}.weight_scale"].__setitem__((0, 0), 0.0),
            "zero, negative or not finite",
        ),
        (
            lambda t: t[f"{NAME}.weight_scale"].__setitem__((0, 0), float("nan")),
            "zero, negative or not finite",
        ),
        (lambda t: t.pop(f"{NAME}.weight_packed"), "missing"),
        (lambda t: t.update({f"{NAME}.weight_scale": t[f"{NAME}.weight_scale"].float()}), "F32"),
        (lambda t: t.update({f"{NAME}.weight": torch.ones(2)}), "beside its packed form"),
        (lambda t: t.pop("lm_head.weight"), "in the original, missing here"),
        (lambda t: t["model.norm.weight"].__setitem__(0, 7.0), "differs from the original"),
        (lambda t: t["model.embed_tokens.weight"].zero_(), "differs from the original"),
    ],
)
def test_damage_is_found(folder: Path, tiny, change, says: str):
    rewrite(folder, change)
    problems = verify(folder, against=str(tiny())).problems
    assert any(says in problem for problem in problems), problems


def test_a_flipped_bit_is_found(folder: Path):
    rewrite(folder, lambda t: t[f"{NAME}.weight_packed"].bitwise_xor_(1), rehash=False)
    assert "sha256" in verify(folder).problems[0]


def test_what_is_not_ours(tiny):
    with pytest.raises(QuantkitError, match="not a quantized checkpoint"):
        verify(tiny())


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
def test_what_a_rotation_made_is_compared_with_the_original(quantized, tiny, tmp_path, name: str):
    """Also where hashes agree: one column off by a tenth would pass every other check."""
    folder = Path(shutil.copytree(quantized("quest-hadamard-w4a4"), tmp_path / "out"))
    rewrite(folder, lambda tensors: tensors[name][..., 3].mul_(1.1))
    assert verify(folder).problems == []
    assert verify(folder, against=str(tiny())).problems == [
        f"{name}: is not the original's, turned into the recorded basis"
    ]


def test_an_output_of_the_first_version(quantized, tiny, tmp_path: Path):
    """As that version wrote config.json: without what later ones added beside the schemes."""
    folder = Path(shutil.copytree(quantized("fireq"), tmp_path / "old"))
    first = json.loads((Path(__file__).parent / "formats/headers/schema-1-first.json").read_text())[
        "quantization_config"
    ]
    ours = json.loads((folder / "config.json").read_text())
    ours["quantization_config"] |= first
    shards = {"model.safetensors": sha256(folder / "model.safetensors")}
    ours["quantization_config"]["quantkit"]["shards"] = shards
    (folder / "config.json").write_text(json.dumps(ours))
    result = verify(folder, against=str(tiny()))
    assert result.problems == []
    rewrite(folder, lambda tensors: tensors.pop(f"{NAME}.weight_packed"))
    assert any("missing" in problem for problem in verify(folder).problems)
