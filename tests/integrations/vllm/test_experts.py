"""Experts on quantkit's kernels inside vLLM, beside one expert and one token at a time.

/path/to/vllm/bin/python -m pytest tests/integrations/vllm/test_experts.py
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from quantkit.errors import QuantkitError
from quantkit.formats.packed import packed_tensors
from quantkit.formats.scheme import ActivationFormat, Scheme, WeightFormat
from quantkit.integrations.vllm.experts import QuantkitExpertsMethod
from quantkit.integrations.vllm.linear import packed_linear

EXPERTS, HIDDEN, WIDTH = 3, 256, 128
SCHEMES = {
    "int4": Scheme(WeightFormat(4, 128)),
    "w8a8": Scheme(WeightFormat(8, None), ActivationFormat(8)),
    "fireq": Scheme(WeightFormat(4, 128, "fp8_channel"), ActivationFormat(8, "float")),
    "quest": Scheme(WeightFormat(4, 128, half=True), ActivationFormat(8, half=True), 128),
}


def description(**changes) -> SimpleNamespace:
    return SimpleNamespace(
        has_bias=False, activation=MoEActivation.SILU, num_local_experts=EXPERTS,
        moe_parallel_config=SimpleNamespace(tp_size=1), **changes,
    )  # fmt: skip


def tensors_of(scheme: Scheme, rows: int, columns: int) -> dict[str, torch.Tensor]:
    top = 2 ** (scheme.weights.bits - 1) - 1
    codes = torch.randint(-top, top, (rows, columns), dtype=torch.int8)
    groups = columns // (scheme.weights.group_size or columns)
    scale = (torch.rand(rows, groups) + 1).div(4 * top).bfloat16().float()
    return packed_tensors(codes, scale, scheme)


def filled(scheme: Scheme) -> tuple[QuantkitExpertsMethod, torch.nn.Module, list]:
    """A layer whose parameters hold random experts, and those experts' linears, one by one."""
    layer = torch.nn.Module()
    method = QuantkitExpertsMethod(
        description(), {"w13": scheme, "w2": scheme}, "model.layers.0.mlp.experts"
    )
    method.create_weights(
        layer, EXPERTS, HIDDEN, WIDTH, torch.bfloat16, weight_loader=lambda *_: None
    )
    alone = []
    for expert in range(EXPERTS):
        gate, up = (tensors_of(scheme, WIDTH, HIDDEN) for _ in range(2))
        down = tensors_of(scheme, HIDDEN, WIDTH)
        for name in down:
            if name != "weight_shape":
                getattr(layer, f"w13_{name}").data[expert] = torch.cat([gate[name], up[name]])
            getattr(layer, f"w2_{name}").data[expert] = down[name]
        sizes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
        parts = zip((gate, up, down), sizes, strict=True)
        alone.append([packed_linear("expert", scheme, *size, dict(part)) for part, size in parts])
    layer.expert_map, layer.apply_router_weight_on_input = None, False
    return method, layer, alone


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_token_and_an_expert_at_a_time(scheme: Scheme, mapped: bool) -> None:
    """With a map: this rank has experts 4, 0 and 2 of five, the others give nothing here."""
    torch.manual_seed(0)
    method, layer, alone = filled(scheme)
    method.process_weights_after_loading(layer)
    places = [1, -1, 2, -1, 0] if mapped else [0, 1, 2]
    if mapped:
        layer.expert_map = torch.tensor(places, dtype=torch.int32)
    x = torch.randn(9, HIDDEN).bfloat16()
    ids = torch.stack([torch.randperm(len(places))[:2] for _ in range(9)]).int()
    weights = torch.rand(9, 2)
    want = torch.zeros(9, HIDDEN)
    for token in range(9):
        for choice in range(2):
            place = places[int(ids[token, choice])]
            if place < 0:
                continue
            gate, up, down = alone[place]
            row = x[token : token + 1]
            hidden = torch.nn.functional.silu(gate(row)) * up(row)
            want[token] += (down(hidden) * weights[token, choice].bfloat16())[0].float()
    got = method.apply(layer, x, weights, ids, None, None).float()
    assert (got - want).norm() <= 1e-2 * want.norm()
    assert method.apply(layer, x[:0], weights[:0], ids[:0], None, None).shape == (0, HIDDEN)


def test_a_scale_that_no_file_fills_is_found() -> None:
    method, layer, _ = filled(SCHEMES["int4"])
    layer.w2_weight_scale.data[1, 3] = torch.nan
    with pytest.raises(QuantkitError, match=r"experts\.1\.w2: a scale is missing"):
        method.process_weights_after_loading(layer)


def test_what_is_not_known_is_refused() -> None:
    schemes = {"w13": SCHEMES["int4"], "w2": SCHEMES["int4"]}
    other = description()
    other.activation = MoEActivation.SWIGLUOAI
    with pytest.raises(QuantkitError, match="the gate swigluoai"):
        QuantkitExpertsMethod(other, schemes, "mlp.experts")
    other = description()
    other.has_bias = True
    with pytest.raises(QuantkitError, match="biases"):
        QuantkitExpertsMethod(other, schemes, "mlp.experts")
    halves = description()
    halves.moe_parallel_config.tp_size = 2
    method = QuantkitExpertsMethod(halves, schemes, "mlp.experts")
    with pytest.raises(QuantkitError, match="groups of 128"):
        method.create_weights(torch.nn.Module(), 2, HIDDEN, 64, torch.bfloat16, weight_loader=None)
