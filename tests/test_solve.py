"""One weight: scales fitted after GPTQ."""

import pytest
import torch

from quantkit import solve as module
from quantkit.formats.scheme import Scheme, WeightFormat
from quantkit.methods.rounding import Grid, dequantize
from quantkit.recipe import GPTQ, Recipe
from quantkit.solve import Inputs, solve, store_scale


@pytest.mark.parametrize("scale", ["bf16", "fp8_channel", "fp8_tensor"])
def test_fitted_scales_lower_the_output_error(scale: str):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator)
    # Inputs that hang together, as real ones do: what one group errs the others can make up for.
    x = torch.randn(600, 16, generator=generator) @ torch.randn(16, 128, generator=generator)
    x += 0.1 * torch.randn(600, 128, generator=generator)
    scheme = Scheme(WeightFormat(4, 32, scale))
    weights = Recipe.load("gptq").weights
    assert weights
    (plain, before), (fitted, after) = (
        solve(weight, scheme, weights, settings, Inputs(2 * x.T @ x, settings))
        for settings in (GPTQ(), GPTQ(fit_scales=True))
    )
    # A power of two for all rows suits few rows: there the scales may stay.
    least = 1.0 if scale == "fp8_tensor" else 0.95
    assert after["output_error"] <= least * before["output_error"]
    assert least == 1 or not torch.equal(fitted.scale, plain.scale)
    stored = store_scale(fitted.scale, weight, scheme.weights)
    assert torch.equal(fitted.scale, fitted.scale.bfloat16().float())
    assert scale == "fp8_tensor" or torch.equal(stored, fitted.scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_errors_are_seen_through_the_inputs(bits: int, monkeypatch):
    monkeypatch.setattr(module, "_STRIP", 48)
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(40, 128, generator=generator),
        torch.randn(300, 128, generator=generator),
    )
    x *= torch.linspace(0.1, 3, 128)
    recipe = Recipe.load("gptq")
    scheme = Scheme(WeightFormat(bits, 32, "bf16"))
    for rounding in ("gptq", "nearest"):
        weights = recipe.weights.model_copy(update={"bits": bits, "rounding": rounding})
        inputs = Inputs(2 * x.T @ x, GPTQ())
        solved, figures = solve(weight, scheme, weights, GPTQ(), inputs)
        # The next linear that reads them finds them as they were.
        assert torch.equal(inputs.hessian, 2 * x.T @ x)
        error = dequantize(solved.codes, solved.scale, Grid(bits)) - weight
        want = (x @ error.T).square().sum() / (x @ weight.T).square().sum()
        assert figures["output_error"] == pytest.approx(float(want), rel=2e-3)
