import pytest
import torch
from tiny_models import make_model

from quantkit import layer as module
from quantkit.calibration.stream import observe
from quantkit.methods.hadamard import rotate
from quantkit.models.outliers import plant_outliers
from quantkit.models.structure import find_structure
from quantkit.recipe import Recipe


@pytest.mark.parametrize("recipe", ["quest-hadamard", "crossquant"])
def test_gptq_gets_the_hessian_of_what_the_weight_will_read(recipe: str, monkeypatch):
    """Of the input after the factors are folded and rotated, not of the input that was measured."""
    model = make_model("llama")
    model.load_state_dict(plant_outliers(model.state_dict(), model.config.to_dict()))
    structure, block = find_structure(model, "m"), model.model.layers[0]
    loaded = Recipe.load(recipe)
    schemes = loaded.resolve(structure, [n for n, _ in structure.modules()] + ["lm_head"])
    hidden = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(0))
    positions = model.model.rotary_emb(hidden, torch.arange(40)[None])
    with (
        observe(block, structure.layer(0), hessians={"qkv"}, keep_rows=64, batches=1) as (
            inputs,
            keys,
        ),
        torch.no_grad(),
    ):
        block(hidden, position_embeddings=positions)
    before = inputs["qkv"].hessian.clone()
    seen: list[torch.Tensor] = []
    real = module.gptq

    def spy(weight, hessian, *arguments, **settings):
        seen.append(hessian)
        return real(weight, hessian, *arguments, **settings)

    monkeypatch.setattr(module, "gptq", spy)
    # The other inputs' Hessians are not at issue here.
    for group in ("o", "gate_up", "down"):
        inputs[group].hessian = torch.eye(inputs[group].absmax.numel())
    module.quantize_layer(
        block, "model.layers.0.", loaded, schemes, structure.layer(0), inputs, keys, torch.bfloat16
    )
    with torch.no_grad():
        x = block.input_layernorm(hidden).reshape(-1, 256)
    if loaded.rotation:
        x = rotate(x, loaded.rotation.block)
    want = 2 * x.T @ x
    for hessian in seen[:3]:
        assert float((hessian - want).norm() / want.norm()) < 1e-4
    assert float((before - want).norm() / want.norm()) > 0.1
