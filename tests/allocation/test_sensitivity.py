import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.allocation.sensitivity import measure, parts_of
from quantkit.plan import make_plan
from quantkit.recipe import Recipe

TOKENS = torch.randint(2, 512, (4, 64), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def costs_of(model: Path, *settings: str) -> dict[str, dict[int, float]]:
    plan = make_plan(str(model), Recipe.load("int4", list(settings)))
    return {p.name: p.costs for p in measure(plan, TOKENS, [2, 4, 8], CPU, lambda *_: None)}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_costs_are_errors_of_the_residual_stream(tiny, model_type: str):
    """The second layer's, as the whole model gives them with one place rounded by hand."""
    from quantkit.methods.rounding import Grid, absmax_scale, dequantize, quantize, store_bf16
    from quantkit.runtime.load import load

    costs = costs_of(tiny(model_type))
    assert list(costs) == [f"{n}.{p}" for n in (0, 1) for p in ("qkv", "o", "gate_up", "down")]
    for widths in costs.values():
        assert widths[2] > 4 * widths[4] > 16 * widths[8] > 0
    model = load(tiny(model_type), dtype=torch.float32)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda _, __, y: seen.append(y[0] if isinstance(y, tuple) else y))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            grid = Grid(4)
            scale = store_bf16(absmax_scale(linear.weight, 128, grid))
            linear.weight.copy_(dequantize(quantize(linear.weight, scale, grid), scale, grid))
        model(TOKENS, use_cache=False)
    error = (seen[1] - seen[0]).square().sum(-1) / seen[0].square().sum(-1)
    assert costs["1.gate_up"][4] == pytest.approx(float(error.mean()), rel=1e-3)


def test_rotations_change_what_is_measured(tiny):
    """In the weights or online: the layer that is measured computes the same and is rounded in another basis."""
    plain = costs_of(tiny())
    for rotation in ("{residual: true, values: true, inputs: none}", "{block: 128}"):
        turned = costs_of(tiny(), f"rotation={rotation}")
        for name, widths in plain.items():
            assert turned[name][4] != widths[4]
            assert turned[name][4] == pytest.approx(widths[4], rel=1.5)


def test_a_part_that_hardly_writes_hardly_costs(tiny, tmp_path: Path):
    source = Path(shutil.copytree(tiny(), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1 / 64
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert costs_of(source)["0.down"][4] < costs_of(tiny())["0.down"][4] / 100


def test_sizes_are_those_on_disk(quantized, tiny):
    plan = make_plan(str(tiny()), Recipe.load("int4"))
    parts = parts_of(plan, [3, 4])
    assert sum(part.sizes[4] for part in parts) == plan.linear_bytes[1]
    assert sum(part.weights for part in parts) == sum(
        r * c for r, c in plan.structure.shapes().values()
    )
    smaller = make_plan(str(tiny()), Recipe.load("int4", ["weights.bits=3"]))
    assert sum(part.sizes[3] for part in parts) == smaller.linear_bytes[1]
