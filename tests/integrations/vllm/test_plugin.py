"""The plugin inside vLLM: claiming, loading over ranks, attention on blocks. Run by an interpreter with vLLM.

/path/to/vllm/bin/python -m pytest tests/integrations/vllm/test_plugin.py
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import vllm
from quantkit.kernels.kv4_attention import kv4_attention
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.v1.attention.backend import AttentionType

from quantkit.errors import QuantkitError
from quantkit.formats.config import build_quantization_config
from quantkit.formats.packed import packed_tensors
from quantkit.formats.scheme import ActivationFormat, KVFormat, Scheme, WeightFormat
from quantkit.integrations.vllm import config as config_module
from quantkit.integrations.vllm import linear as plugin_linear
from quantkit.integrations.vllm import register
from quantkit.integrations.vllm.attention import (
    PackedBackend,
    PackedImpl,
    PackedMetadata,
    group_sequences,
    refuse_or_take,
)
from quantkit.integrations.vllm.config import QuantkitConfig
from quantkit.integrations.vllm.kernels import Platform
from quantkit.runtime.attention import KVQuantizer
from quantkit.runtime.linear import QuantLinear

HIDDEN, HEAD = 512, 64
SCHEMES = {
    "fireq": Scheme(WeightFormat(4, 128, "fp8_channel"), ActivationFormat(8, "float")),
    "w4a8": Scheme(WeightFormat(4, 128), ActivationFormat(8)),
    "quest": Scheme(WeightFormat(4, 128, half=True), ActivationFormat(8, half=True), 128),
    "w4a8 channel": Scheme(WeightFormat(4, None), ActivationFormat(8)),
}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(autouse=True)
def inside_vllm(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    with set_current_vllm_config(VllmConfig()):
        yield


def config(scheme: Scheme, names: list[str]) -> QuantkitConfig:
    dictionary = build_quantization_config(dict.fromkeys(names, scheme), ["lm_head"], None, {})
    made = QuantkitConfig.from_config(dictionary)
    made.packed_modules_mapping = FUSED
    return made


def random_tensors(scheme: Scheme, rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-7, 8, (rows, columns), dtype=torch.int8, generator=generator)
    groups = columns // (scheme.weights.group_size or columns)
    scale = (torch.rand(rows, groups, generator=generator) * 0.01 + 0.01).bfloat16().float()
    return packed_tensors(codes, scale, scheme)


def whole(scheme: Scheme, *parts: dict[str, torch.Tensor]) -> QuantLinear:
    """quantkit's own layer with the parts' outputs one after the other."""
    joined = {k: torch.cat([p[k] for p in parts]) for k in parts[0] if k != "weight_shape"}
    rows, columns = joined["weight_packed"].shape[0], joined["weight_packed"].shape[1] * 8
    layer = QuantLinear(columns, rows, False, scheme)
    for name, tensor in joined.items():
        setattr(layer, name, tensor)
    return layer


def on_rank(monkeypatch, rank: int, ranks: int) -> None:
    """What vLLM's layers and parameters ask for, without processes."""
    import vllm.model_executor.parameter as parameter

    for module in (vllm_linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)


def fill(layer, tensors: dict[str, torch.Tensor], shard=None) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        arguments = () if shard is None else (shard,)
        parameter.weight_loader(parameter, tensor, *arguments)


def run(layer, x: torch.Tensor) -> torch.Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.apply(layer, x, None)


def x_of(columns: int) -> torch.Tensor:
    return torch.randn(3, columns, generator=torch.Generator().manual_seed(9)).bfloat16()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 2), (2, 2), (2, 4), (4, 2)])
def test_fused_qkv_over_ranks(monkeypatch, scheme, ranks, kv_heads):
    """Every rank has its query heads and its KV heads, or, with fewer than ranks, the one it repeats."""
    heads, x = 8, x_of(HIDDEN)
    parts = {
        "q": random_tensors(scheme, heads * HEAD, HIDDEN, 1),
        "k": random_tensors(scheme, kv_heads * HEAD, HIDDEN, 2),
        "v": random_tensors(scheme, kv_heads * HEAD, HIDDEN, 3),
    }
    outputs = {name: whole(scheme, tensors)(x) for name, tensors in parts.items()}
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        prefix = "model.layers.0.self_attn"
        layer = QKVParallelLinear(
            HIDDEN, HEAD, heads, kv_heads, bias=False, params_dtype=torch.bfloat16,
            quant_config=config(scheme, [f"{prefix}.{n}_proj" for n in "qkv"]),
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        for name, tensors in parts.items():
            fill(layer, tensors, name)
        got = run(layer, x)
        share, kv_share = heads // ranks, max(1, kv_heads // ranks)
        kv_first = rank * kv_share if kv_heads >= ranks else rank // (ranks // kv_heads)
        wanted = [outputs["q"][:, rank * share * HEAD : (rank + 1) * share * HEAD]]
        for name in "kv":
            wanted.append(outputs[name][:, kv_first * HEAD : (kv_first + kv_share) * HEAD])
        assert close(got, torch.cat(wanted, dim=1))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_gate_and_up_over_ranks(monkeypatch, scheme, ranks):
    x = x_of(HIDDEN)
    parts = [random_tensors(scheme, 384, HIDDEN, seed) for seed in (4, 5)]
    outputs = [whole(scheme, tensors)(x) for tensors in parts]
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        prefix = "model.layers.0.mlp"
        layer = MergedColumnParallelLinear(
            HIDDEN, [384, 384], bias=False, params_dtype=torch.bfloat16,
            quant_config=config(scheme, [f"{prefix}.{n}_proj" for n in ("gate", "up")]),
            prefix=f"{prefix}.gate_up_proj",
        )  # fmt: skip
        for shard, tensors in enumerate(parts):
            fill(layer, tensors, shard)
        rows = slice(rank * 384 // ranks, (rank + 1) * 384 // ranks)
        assert close(run(layer, x), torch.cat([o[:, rows] for o in outputs], dim=1))


class TwoRanks:
    """Two threads that meet where processes would."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)
        self.given: dict[int, torch.Tensor] = {}

    def all_reduce(self, x: torch.Tensor, how: str) -> None:
        self.given[threading.get_ident()] = x.clone()
        self.barrier.wait(60)
        both = torch.stack(list(self.given.values()))
        self.barrier.wait(60)
        self.given.clear()
        self.barrier.wait(60)
        x.copy_(both.amax(0) if how == "MAX" else both.sum(0))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_inputs_over_two_ranks_give_what_one_would(monkeypatch, scheme, biased):
    """Each rank multiplies its half of the inputs by its half of the groups; a channel's scale is on both."""
    tensors, x = random_tensors(scheme, 192, HIDDEN, 6), x_of(HIDDEN)
    bias = torch.randn(192).bfloat16() if biased else None
    x[:, HIDDEN // 2 :] *= 7  # a rank's own maximum would give other codes
    monkeypatch.setattr(plugin_linear, "_all_reduce", TwoRanks().all_reduce)
    layers = []
    for rank in range(2):
        on_rank(monkeypatch, rank, 2)
        name = "model.layers.0.mlp.down_proj"
        layer = RowParallelLinear(
            HIDDEN, 192, bias=False, params_dtype=torch.bfloat16, reduce_results=False,
            quant_config=config(scheme, [name]), prefix=name,
        )  # fmt: skip
        fill(layer, tensors)
        layer.quant_method.process_weights_after_loading(layer)
        layers.append(layer)
    with ThreadPoolExecutor(2) as pool:
        got = list(
            pool.map(
                lambda layer, part, bias: layer.quant_method.apply(layer, part, bias),
                layers, [part.contiguous() for part in x.chunk(2, 1)], [bias, None],
            )
        )  # fmt: skip
    if not scheme.weights.half:
        alone = whole(scheme, tensors)
        alone.bias = bias
        assert torch.equal(got[0], got[1])
        want = alone(x)
        # Nearly all numbers alike: sums were added up before they were rounded.
        assert ((got[0] + got[1]) == want).float().mean() > 0.97
        assert close(got[0] + got[1], want)
        return
    scale = tensors["weight_scale"]
    for rank in range(2):
        half = QuantLinear(HIDDEN // 2, 192, False, scheme)
        half.weight_packed = tensors["weight_packed"].chunk(2, dim=1)[rank].contiguous()
        half.weight_scale = scale.chunk(2, 1)[rank]
        half.bias = None if rank else bias
        assert close(got[rank], half(x.chunk(2, 1)[rank]))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).float().norm() <= 4e-3 * b.float().norm())


def test_a_scale_that_no_file_fills_is_found():
    scheme, name = SCHEMES["fireq"], "model.layers.0.mlp.down_proj"
    layer = RowParallelLinear(
        HIDDEN, 64, bias=False, params_dtype=torch.bfloat16, reduce_results=False,
        quant_config=config(scheme, [name]), prefix=name,
    )  # fmt: skip
    tensors = random_tensors(scheme, 64, HIDDEN, 7)
    del tensors["weight_scale"]
    fill(layer, tensors)
    with pytest.raises(QuantkitError, match="a scale is missing"):
        run(layer, x_of(HIDDEN))


def test_cut_groups_are_refused(monkeypatch):
    on_rank(monkeypatch, 0, 4)
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(QuantkitError, match="groups of 128"):
        RowParallelLinear(
            768, 64, bias=False, params_dtype=torch.bfloat16,
            quant_config=config(SCHEMES["fireq"], [name]), prefix=name,
        )  # fmt: skip


def test_our_key_claims_a_checkpoint_whatever_the_command_line_says():
    dictionary = build_quantization_config({}, [], None, {})
    claim = QuantkitConfig.override_quantization_method
    assert claim(dictionary, "compressed-tensors") == claim(dictionary, None) == "quantkit"
    del dictionary["quantkit"]
    assert claim(dictionary, None) is None


def test_registering_twice_changes_nothing():
    from vllm.model_executor.layers.quantization import get_quantization_config

    from quantkit.integrations.vllm import register

    register()
    register()
    assert get_quantization_config("quantkit") is QuantkitConfig


@pytest.mark.parametrize("form", [KVFormat(scale="bf16"), KVFormat(scale="fp8", query=None)])
@pytest.mark.parametrize("window", [None, 24])
def test_attention_over_scattered_blocks_is_attention_over_the_sequence(form, window):
    """Two sequences in blocks out of order, a prompt in two pieces and then single tokens."""
    kv_heads, heads, dim, block = 2, 4, 32, 16
    generator = torch.Generator().manual_seed(0)
    post_scale = torch.rand(kv_heads, dim, generator=generator) + 0.5
    impl = PackedImpl(heads, dim, dim**-0.5, kv_heads, sliding_window=window)
    impl.quantizer = KVQuantizer(form, post_scale)
    cache = torch.zeros(9, kv_heads, block, 2 * impl.quantizer.packed_size(dim), dtype=torch.uint8)
    tables = torch.tensor([[7, 2, 5], [3, 8, 1]])
    lengths, texts = [0, 0], [[], []]

    for counts in ([20, 33], [11, 1], [1, 1], [1, 0], [2, 1]):
        new = [
            [torch.randn(n, h, dim, generator=generator).bfloat16() for h in (heads, kv_heads, kv_heads)]
            for n in counts
        ]  # fmt: skip
        slots = []
        for number, count in enumerate(counts):
            positions = torch.arange(lengths[number], lengths[number] + count)
            slots.append(tables[number][positions // block] * block + positions % block)
            lengths[number] += count
            texts[number].append(new[number])
        starts = [0, counts[0], sum(counts)]
        metadata = PackedMetadata(group_sequences(starts, lengths, tables, block))
        query, key, value = (torch.cat([part[i] for part in new]) for i in range(3))
        padded = torch.cat((*slots, torch.tensor([-1])))  # as vLLM pads a batch
        extra = torch.randn(1, kv_heads, dim).bfloat16()
        impl.do_kv_cache_update(
            None, torch.cat((key, extra)), torch.cat((value, extra)), cache, padded
        )
        out = impl.forward(None, query, key, value, cache, metadata, torch.empty_like(query))
        row = 0
        for number, count in enumerate(counts):
            if count:
                want = attend(impl, [torch.cat([t[i] for t in texts[number]]) for i in (1, 2)],
                              new[number][0], window or 0)  # fmt: skip
                assert close(out[row : row + count], want)
            row += count


def test_a_batch_makes_few_groups_that_waste_little():
    """Prompts alone; single tokens with others whose blocks are at most twice as many."""
    lengths = [16 * n for n in range(1, 33)] + [100]
    starts = [*range(33), 50]
    groups = group_sequences(starts, lengths, torch.arange(33 * 40).view(33, 40), 16)
    assert len(groups) == 7
    assert groups[0].rows == slice(32, 50)
    rows = torch.cat([group.rows for group in groups[1:]])
    assert rows.sort().values.tolist() == list(range(32))
    for group in groups[1:]:
        assert group.longest == int(group.lengths.max()) < 2 * int(group.lengths.min())
        assert torch.equal(group.blocks[:, 0], group.rows * 40)
        assert group.blocks.shape == (len(group.rows), group.longest // 16)


def attend(impl, keys_values, query, window) -> torch.Tensor:
    packed = impl.quantizer.pack(*(x.transpose(0, 1)[None] for x in keys_values))
    out = kv4_attention.reference(
        query.transpose(0, 1)[None], *packed, None, impl.scale, True,
        impl.quantizer.post_scale, impl.quantizer.form.query == "fp8", None, window,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def test_a_block_holds_four_bits_a_number():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=128, dtype=torch.bfloat16)
    packed = PackedBackend.customize_spec(spec)
    assert packed.page_size_bytes == 16 * 2 * 2 * (64 + 2)
    assert PackedBackend.customize_spec(packed) == packed
    assert spec.page_size_bytes / packed.page_size_bytes > 3.8


def test_a_model_that_packed_attention_does_not_know_is_refused():
    with pytest.raises(QuantkitError, match="capped scores"):
        PackedImpl(4, 32, 1.0, 2, logits_soft_cap=30.0)


def test_an_int4_cache_asks_for_its_gpu():
    attention = SimpleNamespace(attn_type=AttentionType.DECODER, kv_cache_dtype="auto")
    form = KVFormat(4, "bf16", "fp8")
    assert refuse_or_take(attention, form, Platform("cpu"))
    assert refuse_or_take(attention, form, Platform("cuda", 80))
    assert not refuse_or_take(attention, form, Platform("cuda", 75))
    assert not refuse_or_take(attention, form, Platform("rocm"))


@pytest.mark.parametrize("cached", [True, False])
def test_a_cache_alone_is_emulated_too(monkeypatch, cached: bool):
    """Norms and RoPE must round as transformers' for it: 0.055 from quantkit.load without, 0.000 with."""
    asked = []
    monkeypatch.setattr(config_module, "round_as_transformers", lambda _: asked.append(1))
    form = KVFormat(4, "bf16", "fp8") if cached else None
    QuantkitConfig.from_config(build_quantization_config({}, ["lm_head"], form, {}))._prepare()
    assert bool(asked) == cached


def test_an_older_vllm_is_refused_in_a_line(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32, this is 0\.31\.2: pip install"):
        register()
