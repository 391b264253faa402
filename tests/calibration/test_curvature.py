from pathlib import Path

import torch

from quantkit.calibration.curvature import _RIDGE, output_curvature, read_root
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.rotating import residual_basis
from quantkit.models.structure import build_skeleton, find_structure, load_config


def setup(folder: Path):
    checkpoint = Checkpoint(folder)
    skeleton = build_skeleton(load_config(checkpoint.config, "m"), "m")
    return checkpoint, skeleton, find_structure(skeleton, "m")


def roots_of(folder: Path, tokens: torch.Tensor, model: Path, basis=None) -> list[torch.Tensor]:
    checkpoint, skeleton, structure = setup(model)
    folder.mkdir()
    device = torch.device("cpu")
    assert output_curvature(checkpoint, skeleton, structure, tokens, device, folder, basis=basis)
    assert all(p.is_meta for p in skeleton.parameters())
    assert len(list(folder.iterdir())) == structure.num_layers
    return [read_root(folder, number) for number in range(structure.num_layers)]


def test_it_predicts_the_divergence_that_a_small_error_causes(tiny, tmp_path: Path):
    """The whole model, loaded and disturbed after its first layer, beside 1/2 e^T F e."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 512, (16, 64), generator=torch.Generator().manual_seed(0))
    roots = roots_of(tmp_path / "roots", tokens, tiny())

    model = AutoModelForCausalLM.from_pretrained(str(tiny()), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    relative = 0.02 * torch.randn(16, 64, 256, generator=generator)

    def disturb(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        changed = hidden + relative * hidden.square().mean(-1, keepdim=True).sqrt()
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with torch.no_grad():
        before = model(tokens, use_cache=False).logits.log_softmax(-1)
        handle = model.model.layers[0].register_forward_hook(disturb)
        after = model(tokens, use_cache=False).logits.log_softmax(-1)
        handle.remove()
    want = float((before.exp() * (before - after)).sum(-1).mean())
    got = float((relative @ roots[0]).square().sum(-1).mean()) / 2
    # The estimate's ridge is part of it.
    assert 0.7 < got / (want * (1 + _RIDGE)) < 1.4


def test_the_same_tokens_give_the_same(tiny, tmp_path: Path):
    tokens = torch.arange(64).view(2, 32)
    first, again = (roots_of(tmp_path / name, tokens, tiny()) for name in "ab")
    assert all(map(torch.equal, first, again))


def test_in_a_turned_stream_the_same_error_costs_the_same(tiny, tmp_path: Path):
    tokens = torch.arange(64).view(2, 32)
    plain = roots_of(tmp_path / "plain", tokens, tiny())
    _, skeleton, structure = setup(tiny())
    basis = residual_basis(skeleton, structure, "m")
    turned = roots_of(tmp_path / "turned", tokens, tiny(), basis)
    error = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    for root, other in zip(plain, turned, strict=True):
        want, got = (error @ root).norm(dim=-1), (basis.turn(error) @ other).norm(dim=-1)
        assert torch.allclose(got, want, rtol=1e-4)
        assert not torch.allclose((error @ other).norm(dim=-1), want, rtol=1e-2)
