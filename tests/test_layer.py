import pytest
import torch
from tiny_models import make_model

from quantkit import layer as module
from quantkit import solve
from quantkit.calibration.observe import observe
from quantkit.methods.hadamard import rotate
from quantkit.models.outliers import plant_outliers
from quantkit.models.structure import find_structure
from quantkit.recipe import Recipe

_ONLINE = ("rotation={block: 128}", "channel_scaling.places=[qkv, o, gate_up, down]")


@pytest.mark.parametrize(
    ("recipe", "settings", "place"),
    [("quest-hadamard", _ONLINE, "qkv"), ("crossquant", (), "qkv"), ("quest-hadamard", (), "o")],
)
def test_gptq_gets_the_hessian_of_what_the_weight_will_read(
    recipe: str, settings, place: str, monkeypatch
):
    """Of the input after the factors are folded and rotated, not of the input that was measured."""
    model = make_model("llama")
    model.load_state_dict(plant_outliers(model.state_dict(), model.config.to_dict()))
    structure, block = find_structure(model, "m"), model.model.layers[0]
    loaded = Recipe.load(recipe, list(settings))
    schemes = loaded.resolve(structure, [n for n, _ in structure.modules()] + ["lm_head"])
    if place == "o":  # which reads what quantized projections give otherwise
        schemes = {n: s for n, s in schemes.items() if n[-6:] not in ("q_proj", "k_proj", "v_proj")}
    hidden = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(0))
    positions = model.model.rotary_emb(hidden, torch.arange(40)[None])
    with (
        observe(block, structure.layer(0), hessians={place}, keep_rows=64, batches=1) as watched,
        torch.no_grad(),
    ):
        block(hidden, position_embeddings=positions)
    inputs, keys = watched.inputs, watched.keys
    before = inputs[place].hessian.clone()
    seen: list[torch.Tensor] = []
    real = solve.factorize

    def spy(hessian, **settings):
        seen.append(hessian)
        return real(hessian, **settings)

    monkeypatch.setattr(solve, "factorize", spy)
    # The other inputs' Hessians are not at issue here.
    for group in {"qkv", "o", "gate_up", "down"} - {place}:
        inputs[group].hessian = torch.eye(inputs[group].absmax.numel())
    module.quantize_layer(
        block, "model.layers.0.", loaded, schemes, structure.layer(0), inputs, keys, torch.bfloat16
    )
    read: list[torch.Tensor] = []
    reader = block.self_attn.q_proj if place == "qkv" else block.self_attn.o_proj
    reader.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    with torch.no_grad():
        block(hidden, position_embeddings=positions)
    x = read[0].reshape(-1, 256)
    rotation = schemes[f"model.layers.0.self_attn.{place[0]}_proj"].rotation
    if rotation:
        x = rotate(x, rotation)
    want = 2 * x.T @ x
    assert float((seen[0] - want).norm() / want.norm()) < 1e-4
    # Factorized once for all linears that read it.
    assert len(seen) == (4 if place == "qkv" else 3)
    assert float((before - want).norm() / want.norm()) > 0.1
