"""Which kernel serves a scheme under vLLM, and what tensor parallelism may cut."""

import pytest

from quantkit.errors import QuantkitError
from quantkit.formats.scheme import ActivationFormat, Scheme, WeightFormat
from quantkit.integrations.vllm.kernels import (
    NATIVE,
    OURS,
    Platform,
    check_split,
    choose,
    choose_for_experts,
    find_expert_schemes,
    find_scheme,
    head_slice,
)

CPU, HOPPER, AMPERE, BLACKWELL = (
    Platform("cpu"), Platform("cuda", 90), Platform("cuda", 80), Platform("cuda", 100),
)  # fmt: skip
EXPERTS = {"w13": ["gate_proj", "up_proj"], "w2": ["down_proj"]}
W4A16 = Scheme(WeightFormat(4, 128))
W8A8 = Scheme(WeightFormat(8, None), ActivationFormat(8))
W4A8 = Scheme(WeightFormat(4, 128), ActivationFormat(8))
FIREQ = Scheme(WeightFormat(4, 128, "fp8_channel"), ActivationFormat(8, "float"))
QUEST = Scheme(WeightFormat(4, 128, half=True), ActivationFormat(4, half=True), 128)


@pytest.mark.parametrize(
    ("scheme", "cpu", "hopper", "ampere"),
    [
        (W4A16, NATIVE, NATIVE, NATIVE),
        (W8A8, NATIVE, NATIVE, NATIVE),
        (W4A8, OURS, OURS, OURS),
        (FIREQ, OURS, NATIVE, OURS),
        (QUEST, OURS, OURS, OURS),
        # What vLLM would load as something else, or not at all.
        (Scheme(WeightFormat(4, 128), rotation=128), OURS, OURS, OURS),
        (Scheme(WeightFormat(4, 64), ActivationFormat(8, "float")), OURS, OURS, OURS),
    ],
)
def test_vllm_runs_what_it_computes_and_we_the_rest(scheme, cpu, hopper, ampere):
    chosen = [choose(scheme, where).kernel for where in (CPU, HOPPER, AMPERE)]
    assert chosen == [cpu, hopper, ampere]
    assert choose(FIREQ, BLACKWELL).kernel == OURS  # vLLM's W4A8-FP8 kernel is Hopper's alone


def test_what_is_emulated_says_so():
    assert [choose(s, CPU).emulated for s in (W4A16, W8A8, W4A8, FIREQ, QUEST)] == [
        False, False, True, True, True,
    ]  # fmt: skip
    assert not choose(QUEST, AMPERE).emulated


def test_everything_can_be_run_on_our_kernels(monkeypatch):
    monkeypatch.setenv("QUANTKIT_VLLM_LINEAR", "quantkit")
    assert choose(FIREQ, HOPPER).kernel == choose(W4A16, CPU).kernel == OURS
    monkeypatch.setenv("QUANTKIT_VLLM_LINEAR", "fast")
    with pytest.raises(QuantkitError, match="QUANTKIT_VLLM_LINEAR=fast"):
        choose(FIREQ, HOPPER)


@pytest.mark.parametrize("where", [Platform("cuda", 75), Platform("xpu"), Platform("tpu")])
def test_where_nobody_has_a_kernel_it_is_refused(where):
    assert choose(W4A16, where).kernel == NATIVE
    with pytest.raises(QuantkitError, match="W4A4"):
        choose(QUEST, where)


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def test_a_fused_module_has_the_scheme_of_its_parts():
    schemes = {f"layers.0.attn.{n}_proj": FIREQ for n in ("q", "k", "v", "o")}
    assert find_scheme("layers.0.attn.qkv_proj", schemes, FUSED) == FIREQ
    assert find_scheme("layers.0.attn.o_proj", schemes, FUSED) == FIREQ
    assert find_scheme("layers.0.mlp.gate_up_proj", schemes, FUSED) is None
    assert find_scheme("lm_head", schemes, FUSED) is None


@pytest.mark.parametrize("other", [W4A16, None])
def test_parts_of_different_formats_are_refused(other):
    schemes = {"attn.q_proj": FIREQ, "attn.k_proj": FIREQ, "attn.v_proj": other}
    with pytest.raises(QuantkitError, match=r"v_proj: (W4A16|16 bits)"):
        find_scheme("attn.qkv_proj", {k: v for k, v in schemes.items() if v}, FUSED)


def test_a_rank_gets_whole_groups_and_whole_rotations():
    check_split("down", FIREQ, 512, 256)
    check_split("down", W8A8, 100, 50)
    with pytest.raises(QuantkitError, match="groups of 128"):
        check_split("down", FIREQ, 384, 192)
    with pytest.raises(QuantkitError, match="rotation blocks of 256"):
        check_split("down", Scheme(WeightFormat(4, 128), rotation=256), 768, 384)


def test_heads_are_shared_out_and_repeated_where_there_are_fewer_than_ranks():
    assert [head_slice(8, rank, 2) for rank in range(2)] == [(0, 4), (4, 8)]
    assert [head_slice(2, rank, 4) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    for heads, ranks in ((3, 2), (2, 3)):
        with pytest.raises(QuantkitError, match="tensor-parallel-size"):
            head_slice(heads, 0, ranks)
    with pytest.raises(QuantkitError, match=r"kv\.safetensors"):
        head_slice(8, 0, 2, heads_per_rank=1)


def experts_of(gate: Scheme, up: Scheme, down: Scheme | None) -> dict[str, Scheme]:
    found = {}
    for expert in range(3):
        for name, scheme in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            if scheme:
                found[f"mlp.experts.{expert}.{name}"] = scheme
    return found


def test_a_layers_experts_have_one_format_for_each_part():
    schemes = experts_of(W4A8, W4A8, QUEST) | {"mlp.experts_gate.gate_proj": W8A8}
    assert find_expert_schemes("mlp.experts", schemes, EXPERTS) == {"w13": W4A8, "w2": QUEST}
    assert find_expert_schemes("other.experts", schemes, EXPERTS) == {}
    one_differs = schemes | {"mlp.experts.2.down_proj": W4A8}
    for mixed in (experts_of(W4A8, W8A8, QUEST), experts_of(W4A8, W4A8, None), one_differs):
        with pytest.raises(QuantkitError, match=r"mlp\.experts: .* one format for gate and up"):
            find_expert_schemes("mlp.experts", mixed, EXPERTS)


def test_experts_run_on_quantkits_linears_on_a_cpu_and_on_vllms_kernels_else(monkeypatch):
    for scheme in (W4A16, W8A8, W4A8, FIREQ, QUEST):
        assert choose_for_experts(scheme, CPU).kernel == OURS
    for wish in ("", "quantkit"):  # which is about linears
        monkeypatch.setenv("QUANTKIT_VLLM_LINEAR", wish)
        assert choose_for_experts(W4A16, AMPERE).kernel == NATIVE
        with pytest.raises(QuantkitError, match="no kernel for experts"):
            choose_for_experts(W4A8, HOPPER)
