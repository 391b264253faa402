"""Prompts over their own keys and values in 16 bits, with the packed cache filled behind them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB

from quantkit.runtime.cache import packed_cache
from quantkit.runtime.load import load


def ids(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def _most(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far apart the logits of most positions are: a last bit may move a code at some."""
    return (a.log_softmax(-1) - b.log_softmax(-1)).abs().mean(-1).median().item()


@pytest.fixture
def folder(quantized):
    return quantized("fireq")


def _without_quantizers(folder, **arguments):
    """The same linears around torch's own attention."""
    model = load(folder, fused=False, **arguments)
    for module in model.modules():
        if hasattr(module, "kv_quantizer"):
            del module.kv_quantizer
    return model


@torch.inference_mode()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("static", [True, False, None])
def test_a_prompt_sees_no_rounding(folder, fused: bool, static) -> None:
    """static: the cache is of a fixed size; None: there is none."""
    model = load(folder, fused=fused, fresh_prompts=True, dtype=torch.float32)
    if not fused and static:
        pytest.skip("a planar cache belongs to fused layers")
    tokens = ids()
    cache = None if static is None else packed_cache(model, 40 if static else None)
    found = model(tokens, past_key_values=cache, use_cache=cache is not None).logits
    expected = _without_quantizers(folder, dtype=torch.float32)(tokens, use_cache=False).logits
    rounded = load(folder, fused=fused, dtype=torch.float32)(tokens, use_cache=False).logits
    assert _most(found, expected) < 1e-5
    assert _most(rounded, expected) > 1e-3


@torch.inference_mode()
def test_the_cache_behind_it_is_the_same(folder) -> None:
    models = [load(folder, fresh_prompts=fresh, dtype=torch.float32) for fresh in (True, False)]
    tokens, caches = ids(), []
    for model in models:
        caches.append(packed_cache(model))
        model(tokens, past_key_values=caches[-1])
    # Of the first layer: the others' inputs differ.
    assert torch.equal(caches[0].layers[0].keys, caches[1].layers[0].keys)
    assert torch.equal(caches[0].layers[0].values, caches[1].layers[0].values)
    # What follows reads the cache, whoever filled it.
    first = models[0](tokens[:, :3], past_key_values=caches[1]).logits
    caches[1].crop(-3)
    assert torch.equal(models[1](tokens[:, :3], past_key_values=caches[1]).logits, first)


@torch.inference_mode()
def test_left_padding_and_fixed_sizes_change_nothing(folder) -> None:
    model = load(folder, fresh_prompts=True, dtype=torch.float32)
    tokens = ids(rows=1, length=12)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), tokens), 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    static = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), cache_implementation="static", **options
    )
    behind = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(static, plain)
    assert torch.equal(behind[:, 5:], plain)
    logits = model(padded, attention_mask=mask).logits[:, 5:]
    assert _most(logits, model(tokens).logits) < 1e-5
