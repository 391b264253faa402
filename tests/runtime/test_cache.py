"""The growing packed cache: room for more tokens, and what cropping and reordering leave of it."""

import pytest
import torch
from quantkit.kernels.kv4_append import rotate

from quantkit.formats.scheme import KVFormat
from quantkit.runtime.attention import KVQuantizer
from quantkit.runtime.cache import PackedLayer, PackedStaticLayer


def _quantizer() -> KVQuantizer:
    return KVQuantizer(KVFormat(), torch.rand(2, 64) + 0.5)


def _tokens(count: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, count, 64), torch.randn(batch, 2, count, 64)


def test_growing_keeps_every_token() -> None:
    layer = PackedLayer(_quantizer())
    seen = []
    for count in (3, 1, 1, 70, 1, 200):
        new = _tokens(count)
        seen.append(layer.quantizer.pack(*new))
        keys, values = layer.update(*new)
    assert torch.equal(keys, torch.cat([k for k, _ in seen], 2))
    assert torch.equal(values, torch.cat([v for _, v in seen], 2))
    assert layer.get_seq_length() == 276


def test_room_is_not_copied_at_every_token() -> None:
    layer = PackedLayer(_quantizer())
    layer.update(*_tokens(10))
    places = {layer.update(*_tokens(1))[0].data_ptr() for _ in range(300)}
    assert len(places) < 8


def test_after_cropping_and_reordering_new_tokens_follow() -> None:
    layer = PackedLayer(_quantizer())
    before = layer.update(*_tokens(5, batch=2))[0].clone()
    layer.crop(-2)
    new = _tokens(2, batch=2)
    keys, _ = layer.update(*new)
    packed, _ = layer.quantizer.pack(*new)
    assert torch.equal(keys, torch.cat((before[:, :, :3], packed), 2))
    layer.batch_select_indices(torch.tensor([1, 0]))
    last = _tokens(1, batch=2)
    again, _ = layer.update(*last)
    assert torch.equal(again[:, :, :5], keys.flip(0))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.update(*_tokens(4))[0].shape[2] == 4


def test_a_cache_from_inference_mode_goes_on_outside_it() -> None:
    layer = PackedLayer(_quantizer())
    with torch.inference_mode():
        layer.update(*_tokens(3))
    assert layer.update(*_tokens(1))[0].shape[2] == 4


@pytest.mark.parametrize("static", [False, True])
def test_append_is_update_after_rope(static) -> None:
    quantizer = _quantizer()
    layers = [
        PackedStaticLayer(quantizer, 16) if static else PackedLayer(quantizer) for _ in range(2)
    ]
    for tokens in (3, 1, 2):
        query, (key, value) = torch.randn(1, 4, tokens, 64), _tokens(tokens)
        angles = torch.rand(1, tokens, 64)
        cos, sin = angles.cos(), angles.sin()
        turned, keys, values = layers[0].append(query, key, value, cos, sin)
        expected, expected_values = layers[1].update(rotate(key, cos, sin), value)
        assert torch.equal(turned, rotate(query, cos, sin))
        assert torch.equal(keys, expected)
        assert torch.equal(values, expected_values)
    assert int(layers[0].get_seq_length()) == 6
