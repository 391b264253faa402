"""A checkpoint streamed layer by layer computes what the loaded one computes, with little in memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES

from quantkit.pipeline import quantize
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


def test_a_padding_token_beyond_the_rows_that_occur(tiny, tmp_path: Path):
    """Only rows of tokens that occur are read: the padding token's number counts those of the whole table."""
    source = tmp_path / "source"
    shutil.copytree(tiny("qwen2"), source)
    config = json.loads((source / "config.json").read_text())
    config["pad_token_id"] = config["vocab_size"] - 1
    (source / "config.json").write_text(json.dumps(config))
    quantize(str(source), "int4", tmp_path / "out")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = load(tmp_path / "out")(tokens, use_cache=False).logits.float()
    got = streamed_logits(tmp_path / "out", tokens)
    assert float((got - want).norm() / want.norm()) < 0.02
