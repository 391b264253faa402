"""The plugin finds what is wrong with a checkpoint before vLLM loads it."""

import json
import shutil

import pytest

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.writer import save_tensors
from quantkit.integrations.vllm.checkpoint import examine

LAYER = "model.layers.1"


@pytest.fixture
def folder(quantized, tmp_path):
    """A copy that a test may break."""
    copy = tmp_path / "copy"
    shutil.copytree(quantized("fireq"), copy)
    return copy


def rewrite(folder, change) -> None:
    checkpoint = Checkpoint(folder)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    change(tensors)
    save_tensors(tensors, folder / "model.safetensors")


def configure(folder, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["quantkit"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("recipe", "model_type"), [("int8", "qwen2"), ("fireq", "llama"), ("quest-hadamard", "llama")]
)
def test_a_whole_checkpoint_passes(quantized, recipe, model_type):
    _check_whole(quantized, recipe, model_type)


@pytest.mark.parametrize("bits", [3, 6])
def test_widths_whose_codes_reach_over_words(quantized, bits):
    _check_whole(quantized, "int4", "llama", f"weights.bits={bits}")


def _check_whole(quantized, recipe, model_type, *settings):
    examined = examine(str(quantized(recipe, model_type, *settings)))
    assert examined.whole
    assert len(examined.info.schemes) == 14
    assert sorted(examined.kv_scales) == ([0, 1] if recipe == "fireq" else [])
    for scale in examined.kv_scales.values():
        assert scale.shape == (2, 64)


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.mlp.up_proj.weight_scale",
        f"{LAYER}.mlp.up_proj.weight_packed",
        f"{LAYER}.self_attn.q_proj.weight_shape",
        f"{LAYER}.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_missing_tensor_is_named(folder, name):
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(QuantkitError, match="missing") as error:
        examine(str(folder))
    assert name.rpartition(".")[0] in str(error.value)


def test_a_tensor_of_another_shape_is_named(folder):
    def change(tensors):
        tensors[f"{LAYER}.mlp.up_proj.weight_scale"] = tensors[f"{LAYER}.mlp.up_proj.weight_scale"][
            1:
        ]

    rewrite(folder, change)
    with pytest.raises(QuantkitError, match=r"up_proj\.weight_scale is BF16"):
        examine(str(folder))


def test_a_whole_linear_of_another_size_is_found(folder):
    """Its tensors fit each other, but not the model."""

    def change(tensors):
        for suffix in ("weight_packed", "weight_scale"):
            name = f"{LAYER}.mlp.up_proj.{suffix}"
            tensors[name] = tensors[name][:-8]

    rewrite(folder, change)
    with pytest.raises(QuantkitError, match=r"up_proj\.weight_packed is"):
        examine(str(folder))


def test_where_transformers_does_not_know_the_model_the_quantized_tensors_are_looked_for(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "of_tomorrow"}))
    assert not examine(str(folder)).whole
    rewrite(folder, lambda tensors: tensors.pop(f"{LAYER}.mlp.up_proj.weight_scale"))
    with pytest.raises(QuantkitError, match=r"up_proj\.weight_scale is missing"):
        examine(str(folder))


def test_a_cut_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(QuantkitError, match="corrupted"):
        examine(str(folder))


@pytest.mark.parametrize("change", [{"requires": ["time_travel"]}, {"schema": 99}])
def test_what_is_newer_names_the_package_to_upgrade(folder, change):
    configure(folder, lambda ours: ours.update(change))
    with pytest.raises(QuantkitError, match="pip install --upgrade quantkit"):
        examine(str(folder))


def test_missing_or_damaged_key_scales_are_refused(folder):
    path = folder / "quantkit" / "kv.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(QuantkitError, match="cannot be read"):
        examine(str(folder))
    path.unlink()
    with pytest.raises(QuantkitError, match="is missing"):
        examine(str(folder))
