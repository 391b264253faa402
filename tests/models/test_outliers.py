import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, make_model

from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.outliers import plant_outliers
from quantkit.runtime.attention import NAME, register

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(0, VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))


def spread(model) -> dict[str, float]:
    """Place -> the largest channel's maximum over the median channel's, in the first layer."""
    register()
    model.config._attn_implementation = NAME
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[0]

    def watch(place: str):
        def hook(_, args) -> None:
            seen[place] = args[0].flatten(0, -2).abs().amax(0)

        return hook

    places = {"qkv": "self_attn.q_proj", "gate_up": "mlp.up_proj", "down": "mlp.down_proj"}
    hooks = [layer.get_submodule(m).register_forward_pre_hook(watch(p)) for p, m in places.items()]
    layer.self_attn.key_observer = lambda query, keys, value: seen.setdefault(
        "keys", keys.abs().amax((0, 2))[0]
    )
    with torch.no_grad():
        model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {place: float(x.max() / x.median()) for place, x in seen.items()}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_function_stays_and_outliers_appear(model_type: str):
    model = make_model(model_type).double()
    with torch.no_grad():
        before = model(IDS, use_cache=False).logits
    plain = spread(model)
    model.load_state_dict(plant_outliers(model.state_dict(), model.config.to_dict()))
    with torch.no_grad():
        after = model(IDS, use_cache=False).logits
    assert float((after - before).norm() / before.norm()) < 1e-11
    planted = spread(model)
    assert set(planted) == {"qkv", "gate_up", "down", "keys"}
    for place, ratio in planted.items():
        assert ratio > 15, place
        assert ratio > 5 * plain[place], place


def test_seeds_and_types():
    tensors = {n: t.bfloat16() for n, t in make_model("llama").state_dict().items()}
    config = make_model("llama").config.to_dict()
    one, same, other = (plant_outliers(tensors, config, seed=s) for s in (0, 0, 1))
    name = "model.layers.1.mlp.up_proj.weight"
    assert one[name].dtype == torch.bfloat16
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert torch.equal(one["lm_head.weight"], tensors["lm_head.weight"])


def test_not_llama_like():
    with pytest.raises(ValueError, match="is missing"):
        plant_outliers({"a": torch.ones(1)}, {"num_hidden_layers": 1, "num_attention_heads": 1})


def test_more_pairs_than_a_head_has():
    model = make_model("llama")
    state, config = model.state_dict(), model.config.to_dict()
    assert plant_outliers(state, config, channels=10**6, pairs=10**6).keys() == state.keys()
    with pytest.raises(ValueError, match="gemma"):
        plant_outliers(state, config | {"model_type": "gemma2"})


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
