"""What SGLang's compressed-tensors loader looks at, as read in its sources (0.5.23): nothing of it is run here."""

import pytest

from quantkit.formats.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("recipe", "form", "weights", "activations"),
    [
        ("int4", "pack-quantized", (4, "group", 128), None),
        ("int8", "int-quantized", (8, "channel", None), 8),
        ("crossquant", "int-quantized", (8, "channel", None), 8),
    ],
)
def test_native_schemes(quantized, recipe, form, weights, activations):
    checkpoint = Checkpoint(quantized(recipe))
    config = checkpoint.config["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == form
    assert config["kv_cache_scheme"] is None  # an INT4 one would be ignored in silence
    assert config["transform_config"] == {}  # online rotations too
    assert config["ignore"] == ["lm_head"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    found = group["weights"]
    # Symmetric integers without zero points, scales that do not depend on the data.
    assert (found["type"], found["symmetric"], found["dynamic"]) == ("int", True, False)
    assert (found["num_bits"], found["strategy"], found.get("group_size")) == weights
    acts = group["input_activations"]
    if activations is None:
        assert acts is None
    else:
        assert (acts["num_bits"], acts["type"], acts["symmetric"]) == (activations, "int", True)
        assert (acts["strategy"], acts["dynamic"]) == ("token", True)
    suffixes = {n.rpartition(".")[2] for n in checkpoint.tensors if ".mlp." in n}
    packed = {"weight_packed", "weight_scale", "weight_shape"}
    assert suffixes == (packed if form == "pack-quantized" else {"weight", "weight_scale"})


def test_what_it_would_compute_wrongly_has_a_format_it_does_not_know(quantized):
    config = Checkpoint(quantized("quest-hadamard")).config["quantization_config"]
    assert "pip install quantkit" in config["format"]
    assert all("pip install quantkit" in g["format"] for g in config["config_groups"].values())
