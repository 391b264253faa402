"""Golden: the bytes that other projects read. A change here is a change of the file format."""

import json
from pathlib import Path

import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.formats.config import (
    NEEDS_QUANTKIT,
    build_quantization_config,
    parse_quantization_config,
)
from quantkit.formats.packed import expected_tensors, packed_tensors
from quantkit.formats.scheme import ActivationFormat, KVFormat, Scheme, WeightFormat

W4A16 = Scheme(WeightFormat(4, 128))
W8A8 = Scheme(WeightFormat(8, None), ActivationFormat(8))
W4A8_FP8 = Scheme(WeightFormat(4, 128, "fp8_channel"), ActivationFormat(8, "float"))
QUEST = Scheme(WeightFormat(4, 128, half=True), ActivationFormat(4, half=True), rotation=128)


def test_golden_w4a16():
    config = build_quantization_config(
        {"a.q_proj": W4A16, "a.k_proj": W4A16}, ["lm_head"], None, {"version": "0"}
    )
    assert json.loads(json.dumps(config)) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.17.0",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "quantkit": {
            "schema": 1,
            "requires": [],
            "schemes": {
                "group_0": {
                    "weights": {"bits": 4, "group_size": 128, "scale": "bf16", "half": False},
                    "activations": None,
                    "rotation": None,
                }
            },
            "modules": {"group_0": ["a.q_proj", "a.k_proj"]},
            "kv_cache": None,
            "version": "0",
        },
    }


@pytest.mark.parametrize(
    ("scheme", "form", "weights", "activations"),
    [
        (W8A8, "int-quantized", (8, "int", "channel"), (8, "int")),
        (W4A8_FP8, "pack-quantized", (4, "int", "group"), (8, "float")),
        (QUEST, NEEDS_QUANTKIT, (4, "int", "group"), (4, "int")),
    ],
)
def test_golden_schemes(scheme, form, weights, activations):
    group = build_quantization_config({"m": scheme}, [], None, {})["config_groups"]["group_0"]
    assert group["format"] == form
    assert (
        group["weights"]["num_bits"],
        group["weights"]["type"],
        group["weights"]["strategy"],
    ) == weights
    acts = group["input_activations"]
    assert (acts["num_bits"], acts["type"]) == activations
    assert (acts["strategy"], acts["dynamic"], acts["symmetric"]) == ("token", True, True)


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        *((W4A16, False), (W8A8, False), (W4A8_FP8, True), (QUEST, True)),
        (Scheme(WeightFormat(8, None), ActivationFormat(8), rotation=128), True),
        (Scheme(WeightFormat(4, 128), rotation=128), True),
        (Scheme(WeightFormat(3, 128)), True),
    ],
)
def test_what_not_every_vllm_has_names_the_package(scheme, told):
    """vLLM's own refusal prints the group's weights."""
    group = build_quantization_config({"m": scheme}, [], None, {})["config_groups"]["group_0"]
    assert ("quantkit[vllm]" in str(group["weights"])) == told


def test_what_it_says_is_what_is_read_back():
    schemes = {"a": W4A16, "b": W8A8, "c": QUEST, "d": W4A8_FP8, "e": W4A16}
    config = build_quantization_config(
        schemes, ["lm_head"], KVFormat(scale="fp8"), {"version": "0"}
    )
    assert config["format"] == "mixed-precision"
    assert config["config_groups"]["group_0"]["targets"] == ["a", "e"]
    assert config["quantkit"]["requires"] == ["half_integer_grid", "online_hadamard"]
    info = parse_quantization_config({"quantization_config": json.loads(json.dumps(config))}, "m")
    assert info.schemes == schemes
    assert info.kv_cache == KVFormat(scale="fp8")


def test_compressed_tensors_accepts_it():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for schemes in ({"a": W4A16}, {"a": W8A8}, {"a": W4A8_FP8}, {"a": W4A16, "b": W8A8}):
        config = build_quantization_config(schemes, ["lm_head"], None, {})
        parsed = quantization.QuantizationConfig.model_validate(config)
        assert parsed.quantization_status == "compressed"


def test_golden_int4_packing():
    """Eight consecutive inputs a word, lowest bits first, value + 8."""
    codes = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7] * 16], dtype=torch.int8)
    tensors = packed_tensors(codes, torch.tensor([[0.5]]), W4A16)
    word = 0 | 1 << 4 | 7 << 8 | 8 << 12 | 9 << 16 | 10 << 20 | 14 << 24 | 15 << 28
    assert tensors["weight_packed"].tolist() == [[word - 2**32] * 16]
    assert tensors["weight_scale"].dtype == torch.bfloat16
    assert tensors["weight_shape"].tolist() == [1, 128]
    got = {n: ({torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16"}[t.dtype], tuple(t.shape))
           for n, t in tensors.items()}  # fmt: skip
    assert got == expected_tensors(W4A16, 1, 128)


def test_packing_is_compressed_tensors_packing():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(
        -8, 8, (16, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(0)
    )
    ours = packed_tensors(codes, torch.ones(16, 2), W4A16)["weight_packed"]
    assert torch.equal(ours, helpers.pack_to_int32(codes, 4))


def test_golden_int8():
    codes = torch.tensor([[-128, 127]], dtype=torch.int8)
    tensors = packed_tensors(codes, torch.tensor([[0.25]]), W8A8)
    assert tensors["weight"].tolist() == [[-128, 127]]
    assert set(tensors) == {"weight", "weight_scale"}


def test_a_scale_that_would_be_rounded_on_writing_is_an_error():
    with pytest.raises(ValueError, match="not a bf16 number"):
        packed_tensors(torch.zeros(1, 128, dtype=torch.int8), torch.tensor([[1.001]]), W4A16)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "not a quantized checkpoint"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by awq, not by quantkit"),
        (
            {"quantization_config": {"quantkit": {"schema": 2, "version": "7.1"}}},
            "schema 2 by quantkit 7.1, this is .* reads up to schema 1; update quantkit",
        ),
        (
            {"quantization_config": {"quantkit": {"schema": 0}}},
            "which no version of quantkit wrote",
        ),
        ({"quantization_config": {"quantkit": {"schema": "1"}}}, "quantize the original again"),
        ({"quantization_config": {"quantkit": {}}}, "schema is 'None', which no version"),
        ({"quantization_config": {"quantkit": {"schema": 1}}}, "malformed"),
        ({"quantization_config": {"quantkit": {"schema": 1, "requires": ["x"]}}}, "requires x"),
    ],
)
def test_what_is_not_ours_is_refused(config: dict, says: str):
    with pytest.raises(QuantkitError, match=says):
        parse_quantization_config(config, "m")


@pytest.mark.parametrize("modules", ["model.layers.0", ["a", 1 << 63], [None], {"a": "b"}, 3])
def test_modules_that_are_no_names_are_refused(modules: object):
    config = json.loads((Path(__file__).parent / "headers" / "schema-1-first.json").read_text())
    ours = config["quantization_config"]["quantkit"]
    ours["modules"] = dict.fromkeys(ours["modules"], modules)
    with pytest.raises(
        QuantkitError, match=r"modules: .* where a (module's name|list) is expected"
    ):
        parse_quantization_config(config, "m")


def test_an_output_of_the_first_version_is_read():
    """What that version did not write yet (`residual_basis`, `calibration.sources`) has a default."""
    config = json.loads((Path(__file__).parent / "headers" / "schema-1-first.json").read_text())
    info = parse_quantization_config(config, "m")
    assert set(info.schemes.values()) == {W4A8_FP8}
    assert len(info.schemes) == 14
    assert info.kv_cache == KVFormat()
    assert info.meta["post_rope_scale"] is True
