"""A checkpoint streamed layer by layer computes what the loaded one computes, with little in memory."""

import pytest
import torch
from tiny_models import ARCHITECTURES

from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.load import load
from quantkit.streamed import streamed_logits


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("recipe", ["int8", "fireq"])
def test_the_same_logits_as_loaded(quantized, recipe: str, model_type: str):
    folder = quantized(recipe, model_type)
    tokens = torch.arange(3, 60)[None]
    model = load(folder, fused=False)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare()  # as the streamed one: kernels differ in the last bit, which moves FP8 codes
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits.float()
    got = streamed_logits(folder, tokens)
    assert torch.equal(got, want)


def test_layers_are_empty_again(quantized, monkeypatch: pytest.MonkeyPatch):
    from quantkit import streamed

    folder, full = quantized("int4"), []
    real = streamed._StreamedLayer.forward

    def forward(self, *arguments, **settings):
        output = real(self, *arguments, **settings)
        layer = self.__dict__["layer"]
        full.append(sum(not t.is_meta for t in (*layer.parameters(), *layer.buffers())))
        return output

    monkeypatch.setattr(streamed._StreamedLayer, "forward", forward)
    streamed_logits(folder, torch.arange(8)[None])
    assert full == [0, 0]
