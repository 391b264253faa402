import torch
from quantkit.kernels.cpu import native
from tiny_models import make_model

from quantkit.calibration import statistics
from quantkit.calibration.observe import observe
from quantkit.calibration.statistics import InputStatistics, KeyStatistics
from quantkit.methods.hadamard import rotate
from quantkit.models.structure import find_structure
from quantkit.ranks import ALONE


def test_in_batches_as_at_once(monkeypatch):
    monkeypatch.setattr(statistics, "_ELEMENTS", 1000)  # a batch is looked at in two pieces
    x = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))
    stats = InputStatistics(32, hessian=True, keep=30, batches=3, device=torch.device("cpu"))
    for part in x:
        stats.update(part)
    stats.combine(ALONE)
    rows = x.reshape(-1, 32).double()
    assert stats.tokens == 150
    assert torch.equal(stats.absmax, x.reshape(-1, 32).abs().amax(0))
    assert torch.allclose(stats.mean_abs.double(), rows.abs().mean(0), rtol=1e-5)
    assert torch.allclose(stats.rms.double(), rows.square().mean(0).sqrt(), rtol=1e-5)
    assert torch.allclose(stats.hessian.double(), 2 * rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert stats.rows.shape == (30, 32)
    assert all(any(torch.equal(row, r) for r in x.reshape(-1, 32)) for row in stats.rows)


def test_a_hessian_of_rounded_inputs():
    """Rounded factors leave diagonals as they are and what is beside them within the noise of the text."""
    x = torch.randn(512, 1, generator=torch.Generator().manual_seed(0)) + torch.randn(512, 64)
    exact, rounded = (
        InputStatistics(
            64, hessian=True, keep=0, batches=1, device=torch.device("cpu"), products=products
        )
        for products in (torch.float32, torch.bfloat16)
    )
    for stats in (exact, rounded):
        stats.update(x)
        stats.combine(ALONE)
    scale = exact.hessian.diagonal().mean()
    apart = (rounded.hessian - exact.hessian).abs() / scale
    assert float(apart.max()) < 2e-3
    if torch.cpu._is_amx_tile_supported() or native.level() == 1:
        assert float(apart.max()) > 1e-5
    assert float((exact.hessian / scale).fill_diagonal_(0).abs().max()) > 0.3
    # Nothing else that is computed here takes it from now on.
    a = torch.randn(300, 300)
    assert torch.allclose((a @ a).double(), a.double() @ a.double(), rtol=1e-3, atol=1e-4)


def test_the_hessian_goes_through_factor_and_rotation():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    stats = InputStatistics(64, hessian=True, keep=10, batches=1, device=torch.device("cpu"))
    stats.update(x)
    stats.combine(ALONE)
    d = torch.linspace(0.5, 4, 64)
    changed = rotate(x / d, 32)
    assert torch.allclose(stats.hessian_after(d, 32), 2 * changed.T @ changed, rtol=1e-3, atol=1e-2)


def test_keys_over_batches():
    keys = torch.randn(4, 2, 30, 16, generator=torch.Generator().manual_seed(2))
    stats = KeyStatistics()
    for part in keys:
        stats.update(part[None], part[None], part[None])
    assert torch.equal(stats.absmax, keys.abs().amax((0, 2)))
    pairs = (keys[..., :8] ** 2 + keys[..., 8:] ** 2).sqrt().amax((0, 2))
    assert torch.allclose(stats.pairs, torch.cat([pairs, pairs], -1))


def test_hooks_see_each_groups_input_and_go_away():
    model = make_model("llama")
    layer = model.model.layers[0]
    structure = find_structure(model, "m").layer(0)
    with (
        observe(layer, structure, hessians={"down"}, keep_rows=16, batches=1) as seen,
        torch.no_grad(),
    ):
        model(torch.arange(20)[None], use_cache=False)
    inputs = seen.inputs
    assert {n: s.tokens for n, s in inputs.items()} == dict.fromkeys(
        ("qkv", "o", "gate_up", "down"), 20
    )
    assert inputs["down"].hessian is not None
    assert inputs["qkv"].hessian is None
    assert inputs["down"].absmax.numel() == 384
    assert not any(m._forward_pre_hooks for m in layer.modules())
    assert not hasattr(layer.self_attn, "key_observer")
