"""A gated MLP of many rows, whose product gates by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from quantkit.bench.ops import LINEARS
from quantkit.bench.synthetic import random_tensors
from quantkit.runtime.fusion import GatedMLP, SharedLinear
from quantkit.runtime.linear import QuantLinear


def _linear(inputs: int, outputs: int, op: str, seed: int) -> QuantLinear:
    linear = QuantLinear(inputs, outputs, False, LINEARS[op])
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in random_tensors(LINEARS[op], outputs, inputs, generator).items():
        setattr(linear, name, tensor)
    return linear


@torch.inference_mode()
@pytest.mark.parametrize(
    "op", ["int4_fp8_linear", pytest.param("int4_int8_linear", marks=pytest.mark.slow)]
)
def test_many_rows_are_gated_by_the_product(op: str, device, relative_error, monkeypatch) -> None:
    parts = [_linear(128, 128, op, 1), _linear(128, 128, op, 2), _linear(128, 128, op, 3)]
    whole = SharedLinear(parts[:2])
    mlp = SimpleNamespace(gate_proj=None, up_proj=None, down_proj=parts[2], gate_up_proj=whole)
    mlp.act_fn = torch.nn.SiLU()
    module = GatedMLP(mlp).to(device)
    for linear in (whole.linear, module.down_proj):
        linear.prepare()
    x = torch.randn(130, 128, device=device).bfloat16()
    seen = []
    product = QuantLinear.product
    monkeypatch.setattr(
        QuantLinear,
        "product",
        lambda self, *given, gate=False, **others: (
            seen.append(gate) or product(self, *given, gate=gate, **others)
        ),
    )
    many = module(x)
    few = torch.cat([module(piece) for piece in x.split(65)])
    assert seen == [True, *[False] * (len(seen) - 1)]
    assert relative_error(many.float(), few.float()) < 2e-2  # whose gate is rounded on the way
