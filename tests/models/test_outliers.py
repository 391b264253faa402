import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, make_model, structure_of

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.outliers import plant_outliers
from quantkit.runtime.attention import NAME, register

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(0, VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))


def spread(model, variant: str) -> dict[str, float]:
    """Place -> the largest channel's maximum over the median channel's, in the first layer."""
    register()
    model.config._attn_implementation = NAME
    structure = structure_of(variant)
    layer = model.get_submodule(structure.layers)[0]
    seen: dict[str, torch.Tensor] = {}

    def watch(place: str):
        def hook(_, args) -> None:
            seen[place] = args[0].flatten(0, -2).abs().amax(0)

        return hook

    hooks = [
        layer.get_submodule(group.watched).register_forward_pre_hook(watch(group.place))
        for group in structure.groups(0)
        if group.feeder is not None and group.place != "o"
    ]
    attention = structure.layer(0).attention
    if not attention.why_no_factors:
        layer.get_submodule(attention.path).key_observer = lambda query, keys, value: (
            seen.setdefault("keys", keys.abs().amax((0, 2))[0])
        )
    with torch.no_grad():
        model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {place: float(x.max() / x.median()) for place, x in seen.items()}


FOUR = {"qkv", "gate_up", "down", "keys"}


@pytest.mark.parametrize(
    ("variant", "places"),
    [
        *((name, FOUR) for name in (*ARCHITECTURES, "phi3")),
        # Norms that multiply by 1 + weight.
        ("gemma", FOUR),
        # Queries are scaled on their way, so their rows are not recognised.
        ("opt", {"qkv", "gate_up", "down"}),
        # No factor passes a GELU, and a quarter of each head is turned.
        ("gpt-neox", {"qkv", "gate_up"}),
    ],
)
def test_the_function_stays_and_outliers_appear(variant: str, places: set[str]):
    model = make_model(variant).double()
    with torch.no_grad():
        before = model(IDS, use_cache=False).logits
    plain = spread(model, variant)
    model.load_state_dict(plant_outliers(model.state_dict(), model.config.to_dict()))
    with torch.no_grad():
        after = model(IDS, use_cache=False).logits
    # Gemma's norms compute in float32 whatever they are given.
    assert float((after - before).norm() / before.norm()) < (1e-6 if variant == "gemma" else 1e-11)
    planted = spread(model, variant)
    assert set(planted) == places
    for place, ratio in planted.items():
        # A ReLU cuts off half of what the median channel would show.
        assert ratio > 15, place
        assert ratio > 3 * plain[place], place


def test_seeds_and_types():
    tensors = {n: t.bfloat16() for n, t in make_model("llama").state_dict().items()}
    config = make_model("llama").config.to_dict()
    one, same, other = (plant_outliers(tensors, config, seed=s) for s in (0, 0, 1))
    name = "model.layers.1.mlp.up_proj.weight"
    assert one[name].dtype == torch.bfloat16
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert torch.equal(one["lm_head.weight"], tensors["lm_head.weight"])


def test_what_cannot_be_planted():
    model = make_model("llama")
    state, config = model.state_dict(), model.config.to_dict()
    del state["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight is missing"):
        plant_outliers(state, config)
    with pytest.raises(QuantkitError, match="names no model_type"):
        plant_outliers(state, {"num_hidden_layers": 1})
    with pytest.raises(ValueError, match="no range"):
        plant_outliers(model.state_dict(), config, factor=(2.0, 1.0))


def test_more_pairs_than_a_head_has():
    model = make_model("llama")
    state, config = model.state_dict(), model.config.to_dict()
    assert plant_outliers(state, config, channels=10**6, pairs=10**6).keys() == state.keys()


def test_the_example(tiny, tmp_path: Path):
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(ROOT / "examples" / "plant_outliers.py"),
            *map(str, arguments),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(tiny(), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert Checkpoint(tmp_path / "out").tensors.keys() == Checkpoint(tiny()).tensors.keys()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = run(tiny(), tmp_path / "out")
    assert again.returncode == 2
    assert again.stderr.strip().endswith("exists already; name another folder")
