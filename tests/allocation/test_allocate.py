import json
from pathlib import Path

import pytest
from tiny_models import save_model

from quantkit import quantize
from quantkit.allocation.allocate import find_target, parse_size, widths_for
from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.config import parse_quantization_config
from quantkit.plan import make_plan
from quantkit.recipe import Recipe


def schemes_of(folder: Path) -> dict[str, str]:
    info = parse_quantization_config(Checkpoint(folder).config, "out")
    return {name: str(scheme) for name, scheme in info.schemes.items()}


def test_a_target_is_met_and_its_rules_can_be_used_again(tiny, text: Path, tmp_path: Path):
    out, again = tmp_path / "out", tmp_path / "again"
    settings = {"calib": str(text), "samples": 4, "seqlen": 64}
    report = quantize(str(tiny("qwen2")), "int4", out, target_bits=4.5, **settings)
    found = report["allocation"]
    assert 4.3 < found["bits"] <= 4.5
    schemes = schemes_of(out)
    assert len(set(schemes.values())) > 1
    shapes = make_plan(str(tiny("qwen2")), Recipe.load("int4")).structure.shapes()
    weights = sum(rows * columns for rows, columns in shapes.values())
    stored = sum(
        tensor.bytes for name, tensor in Checkpoint(out).tensors.items()
        if name.rpartition(".")[0] in schemes and not name.endswith(".bias")
    )  # fmt: skip
    assert found["bits"] == stored * 8 / weights
    for layer in (0, 1):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert len({schemes[f"{attention}.{n}_proj"] for n in "qkv"}) == 1
        assert len({schemes[f"{mlp}.{n}_proj"] for n in ("gate", "up")}) == 1
    # What was chosen costs less than any single width that the target allows.
    parts = found["parts"].values()
    chosen = sum(part["costs"][str(part["bits"])] for part in parts)
    assert chosen < sum(part["costs"]["4"] for part in parts)
    assert json.loads((out / "quantkit" / "report.json").read_text())["allocation"] == found
    quantize(str(tiny("qwen2")), str(out / found["recipe_file"]), again, **settings)
    assert schemes_of(again) == schemes
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_size_and_widths(tiny, text: Path, tmp_path: Path):
    plan = make_plan(str(tiny()), Recipe.load("int4"))
    limit = plan.total_bytes[1] + plan.linear_bytes[1] // 4
    report = quantize(
        str(tiny()), "int4", tmp_path / "out", calib=str(text), samples=2, seqlen=64,
        target_size=limit, widths=[8, 4],
    )  # fmt: skip
    assert {part["bits"] for part in report["allocation"]["parts"].values()} == {4, 8}
    tensors = Checkpoint(tmp_path / "out").tensors.values()
    assert 0.9 * limit < sum(tensor.bytes for tensor in tensors) <= limit


def test_all_linears_of_experts_get_one_width(text: Path, tmp_path: Path):
    source = save_model(tmp_path / "model", "mixtral")
    report = quantize(
        str(source),
        "int4",
        tmp_path / "out",
        calib=str(text),
        samples=2,
        seqlen=64,
        target_bits=4.7,
    )
    assert list(report["allocation"]["parts"])[:3] == ["0.qkv", "0.o", "0.gate_up+down"]
    schemes = schemes_of(tmp_path / "out")
    experts = {
        scheme for name, scheme in schemes.items() if ".layers.0." in name and ".experts." in name
    }
    assert len(experts) == 1


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"target_bits": 2.0}, "2 bits: cannot be met; at 2 bits everywhere the linears take 2.1"),
        ({"target_size": "1KB"}, "1000 bytes: cannot be met"),
        ({"target_bits": 4.0, "widths": [4, 8]}, "cannot be met; at 4 bits everywhere"),
        ({"target_bits": 4.5, "target_size": "1GB"}, "give one of them"),
        ({"target_bits": -1.0}, "a positive number is expected"),
        ({"target_bits": float("nan")}, "a positive number is expected"),
        ({"target_size": "big"}, "a size is expected, as 3GB"),
        ({"target_bits": 4.5, "widths": [4, 9]}, "--widths 9"),
    ],
)
def test_a_target_that_cannot_be_met_is_one_line(tiny, tmp_path: Path, target, says: str):
    with pytest.raises(QuantkitError) as error:
        quantize(str(tiny()), "int4", tmp_path / "out", **target)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_fp8_group_scales_end_at_four_bits():
    assert widths_for(Recipe.load("fireq")) == [2, 3, 4]
    assert widths_for(Recipe.load("quest-hadamard")) == [2, 3, 4, 5, 6, 8]


def test_sizes_are_read():
    sizes = {"3GB": 3 * 10**9, "1.5 mb": 1_500_000, "700": 700, "2KB": 2000, "5b": 5}
    assert {text: parse_size(text) for text in sizes} == sizes
    assert find_target(None, None) is None
