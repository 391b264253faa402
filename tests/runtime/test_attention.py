"""transformers' attention function `quantkit`: what it gives to which kernel, against torch's own attention."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from quantkit.kernels.kv4_attention import causal_mask
from torch._subclasses.fake_tensor import FakeTensorMode

from quantkit.formats.scheme import KVFormat
from quantkit.runtime import attention
from quantkit.runtime.attention import KVQuantizer, quantkit_attention


def inputs(tokens: int = 40, length: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, n, 32, generator=generator)
        for heads, n in ((4, tokens), (2, length), (2, length))
    ]


def module(**more: object) -> SimpleNamespace:
    return SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False, **more)


def torchs(query, key, value, **settings) -> torch.Tensor:
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **settings)
    return out.transpose(1, 2)


def close(found: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((found.float() - want).norm() <= 1e-2 * want.norm())


def fresh(**form: object) -> SimpleNamespace:
    quantizer = KVQuantizer(KVFormat(**form))
    quantizer.fresh_prompts = True
    return module(kv_quantizer=quantizer)


def test_calibration_multiplies_in_bf16(monkeypatch):
    """And hands that to what is faster than torch's, where it is there."""
    given, seen, real = inputs(), [], attention.attend
    monkeypatch.setattr(
        attention, "attend", lambda q, *more: seen.append(q.dtype) or real(q, *more)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = quantkit_attention(module(), *given, None)
    assert seen == [found.dtype] == [torch.bfloat16]
    assert close(found, torchs(*given, is_causal=True))


def test_dropout_is_torchs():
    """Of models that train with it."""
    given = [x.bfloat16().requires_grad_() for x in inputs()]
    whole, _ = quantkit_attention(module(), *given, None)
    dropped, _ = quantkit_attention(module(), *given, None, dropout=0.5)
    assert not close(dropped, whole.float())


@pytest.mark.parametrize("how", ["is_causal=False", "module.is_causal=False", "mask", "more keys"])
def test_what_is_not_a_prompts_own_causal_attention_is_torchs(how: str):
    """Without a mask, of more keys than queries, torch lets the first be seen: a static cache is empty behind."""
    given = [x.bfloat16() for x in inputs(40, 70 if how == "more keys" else 40)]
    asked = module()
    mask, settings, want = None, {}, {"is_causal": False}
    if how == "is_causal=False":
        settings["is_causal"] = False
    elif how == "module.is_causal=False":
        asked.is_causal = False
    elif how == "more keys":
        want = {"attn_mask": torch.ones(40, 70, dtype=torch.bool).tril()}
    else:
        mask = causal_mask(40, 40, torch.device("cpu"), window=7)[None, None]
        want = {"attn_mask": mask}
    found, _ = quantkit_attention(asked, *given, mask, **settings)
    assert close(found, torchs(*(x.float() for x in given), **want))


@pytest.mark.parametrize("window", [0, 9])
def test_a_fresh_prompt_sees_its_own_keys(window: int):
    given = [x.bfloat16() for x in inputs()]
    found, _ = quantkit_attention(fresh(), *given, None, sliding_window=window or None)
    mask = causal_mask(40, 40, torch.device("cpu"), window)
    assert close(found, torchs(*(x.float() for x in given), attn_mask=mask))


def test_a_fresh_prompt_compiles():
    given = [x.bfloat16() for x in inputs()]
    asked = fresh()

    def attend(*given: torch.Tensor) -> torch.Tensor:
        return quantkit_attention(asked, *given, None)[0]

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert close(compiled(*given), attend(*given).float())


def test_tensors_without_numbers():
    meta = [x.to("meta", torch.bfloat16) for x in inputs()]
    assert quantkit_attention(module(), *meta, None)[0].shape == (2, 40, 4, 32)
    with FakeTensorMode():
        fakes = [torch.empty(2, heads, 40, 32, dtype=torch.bfloat16) for heads in (4, 2, 2)]
        assert quantkit_attention(module(), *fakes, None)[0].shape == (2, 40, 4, 32)
