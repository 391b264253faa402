"""A loaded checkpoint computes what its packed numbers say, whole or token by token."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantkit.kernels.packing import unpack_int4
from tiny_models import ARCHITECTURES, VOCAB

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.config import parse_quantization_config
from quantkit.recipe import recipe_names
from quantkit.runtime.fusion import LinearPart
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.load import load


def ids(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of logits, in log-probabilities: what a user sees."""
    a, b = a.float().log_softmax(-1), b.float().log_softmax(-1)
    return float((a - b).abs().mean())


def assert_agree(a: torch.Tensor, b: torch.Tensor) -> None:
    """Logits [B, T, V] that differ by the last bits of sums only.

    Such a bit may move a value over the edge between two codes, and what comes after that position
    with it: few positions, and none far off.
    """
    off = (a.float().log_softmax(-1) - b.float().log_softmax(-1)).abs().mean(-1)
    assert off.median() < 1e-5
    assert off.mean() < 5e-3


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name != "kv4"])
def test_linears_compute_what_the_file_says(quantized, recipe: str):
    folder = quantized(recipe)
    checkpoint = Checkpoint(folder)
    schemes = parse_quantization_config(checkpoint.config, "").schemes
    model = load(folder, dtype=torch.float32)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        scheme, linear = schemes[name], model.get_submodule(name)
        assert isinstance(linear, QuantLinear | LinearPart)
        if scheme.weights.bits == 4:
            codes = unpack_int4(checkpoint.load(f"{name}.weight_packed")).double()
        else:
            codes = checkpoint.load(f"{name}.weight").double()
        if scheme.weights.half:
            codes += 0.5
        scale = checkpoint.load(f"{name}.weight_scale").double()
        weight = codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
        x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(2))
        want = _rounded(x.double(), scheme) @ weight.T
        got = linear(x).double()
        assert float((got - want).norm() / want.norm()) < 2e-3, name


def _rounded(x: torch.Tensor, scheme) -> torch.Tensor:
    """Activation rounding written again from the definitions, in float64."""
    acts = scheme.activations
    if scheme.rotation:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < scheme.rotation:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        x = (x.unflatten(-1, (-1, scheme.rotation)) @ h / scheme.rotation**0.5).flatten(-2)
    if acts is None:
        return x
    if acts.half:
        clip = {4: 2.51393, 8: 3.88494}[acts.bits]
        step = 2 * clip * x.square().mean(-1, keepdim=True).sqrt() / (2**acts.bits - 1)
        return (
            (x / step).floor().clamp(-(2 ** (acts.bits - 1)), 2 ** (acts.bits - 1) - 1) + 0.5
        ) * step
    top = x.abs().amax(-1, keepdim=True)
    if acts.type == "float":
        return (x / top * 448).float().to(torch.float8_e4m3fn).double() * top / 448
    steps, last = {4: (7.5, 7), 8: (127, 127)}[acts.bits]
    return (x / top * steps).round().clamp(-last, last) * top / steps


@pytest.mark.parametrize("recipe", ["int4", "fireq", "quest-hadamard"])
def test_linears_stay_packed_in_memory(quantized, recipe: str):
    model = load(quantized(recipe))
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(linears) == 2 * len(("qkv", "o", "gate_up", "down"))
    held = sum(t.numel() * t.element_size() for m in linears for t in m.buffers())
    dense = sum(m.in_features * m.out_features * 2 for m in linears)
    assert held / dense < 0.30
    assert not [p for m in linears for p in m.parameters()]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("recipe", ["fireq", "int8"])
def test_prefill_and_decode_agree(quantized, recipe: str, model_type: str):
    model, tokens = load(quantized(recipe, model_type), dtype=torch.float32), ids()
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        from quantkit.runtime.cache import packed_cache, quantizers

        cache = packed_cache(model) if quantizers(model) else None
        first = model(tokens[:, :25], past_key_values=cache, use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for i in range(25, tokens.shape[1]):
            parts.append(model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    assert_agree(torch.cat(parts, 1), whole)


def test_the_cache_is_packed(quantized):
    model = load(quantized("fireq"))
    out = model.generate(
        ids(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, pad_token_id=1
    )
    layer = out.past_key_values.layers[0]
    assert layer.keys.dtype == torch.uint8
    assert layer.keys.shape == (2, 2, 44, 64 // 2 + 2)


def test_chunked_prefill_agrees(quantized):
    from quantkit.runtime.cache import packed_cache

    model, tokens = load(quantized("fireq"), dtype=torch.float32), ids()
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache = packed_cache(model)
        parts = [
            model(chunk, past_key_values=cache, use_cache=True).logits
            for chunk in tokens.split(13, dim=1)
        ]
    assert_agree(torch.cat(parts, 1), whole)


def test_the_output_layer_reads_a_row_of_its_own(quantized):
    model, strides = load(quantized("int4")), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride()))
    model(ids(), logits_to_keep=1)
    hidden = model.config.hidden_size
    assert strides == [(hidden, hidden, 1)]


@pytest.mark.parametrize("recipe", ["fireq", "int4"])
def test_left_padding_changes_nothing(quantized, recipe: str):
    model = load(quantized(recipe), dtype=torch.float32)
    short, long = ids(1, 10), ids(1, 17)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    alone = [model.generate(t, **settings)[0, t.shape[1] :] for t in (short, long)]
    batch = torch.cat([torch.cat([torch.ones(1, 7, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :7] = 0
    together = model.generate(batch, attention_mask=mask, **settings)[:, 17:]
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


def test_beam_search_equals_a_cache_in_full(quantized):
    """Reordering packed keys must do what reordering plain ones does."""
    model = load(quantized("fireq"), dtype=torch.float32)
    settings = {
        "max_new_tokens": 8,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 1,
        "eos_token_id": None,
    }
    with_cache = model.generate(ids(), **settings)
    without = model.generate(ids(), use_cache=False, **settings)
    assert torch.equal(with_cache, without)


def test_sliding_windows(tmp_path: Path, text: Path):
    from tiny_models import save_model

    from quantkit import quantize

    source = save_model(tmp_path / "mistral", "mistral", sliding_window=16)
    quantize(str(source), "fireq", tmp_path / "out", calib=str(text), samples=8, seqlen=64)
    model = load(tmp_path / "out", dtype=torch.float32)
    tokens = ids(1, 40)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    assert torch.equal(
        model.generate(tokens, **settings), model.generate(tokens, use_cache=False, **settings)
    )


def test_tied_embeddings_stay_tied(tmp_path: Path):
    from tiny_models import save_model

    from quantkit import quantize

    source = save_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint(source).tensors
    quantize(str(source), "int4", tmp_path / "out")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").tensors
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_original_loads_as_transformers_loads_it(tiny):
    from transformers import AutoModelForCausalLM

    want = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)(ids()).logits
    assert torch.allclose(load(tiny(), dtype=torch.float32)(ids()).logits, want, atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c.pop("quantkit"), "not by quantkit"),
        (lambda c: c["quantkit"].update(schema=99), "update quantkit"),
        (lambda c: c["quantkit"].update(requires=["magic"]), "requires magic"),
        (lambda c: c["quantkit"].update(schemes=None), "malformed"),
        (lambda c: c["quantkit"]["modules"]["group_0"].append("model.nothing"), "no such linear"),
        (
            lambda c: c["quantkit"]["schemes"]["group_0"]["weights"].update(group_size=64),
            "is expected",
        ),
    ],
)
def test_a_changed_config_is_refused(quantized, tmp_path: Path, edit, says: str):
    folder = shutil.copytree(quantized("fireq"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantkitError, match=says):
        load(folder)


def test_a_missing_key_scale_is_refused(quantized, tmp_path: Path):
    folder = shutil.copytree(quantized("fireq"), tmp_path / "copy")
    (folder / "quantkit" / "kv.safetensors").unlink()
    with pytest.raises(QuantkitError, match="cannot be read without it"):
        load(folder)


def test_a_gpu_without_enough_memory_is_told_before_loading(quantized, monkeypatch):
    folder = quantized("int4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(QuantkitError, match="no CUDA device was found"):
        load(folder, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 2**33))
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("something was read"))
    with pytest.raises(
        QuantkitError, match=r"needs 1\.\d GiB on cuda:0, 0\.5 of 8\.0 GiB are free"
    ):
        load(folder, device="cuda:0")


def test_a_loaded_model_takes_little_more_than_its_packed_size(quantized):
    folder = quantized("int4")
    model = load(folder)
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    # The native layout has a zero beside every scale: 1.6 % of a weight in groups of 128.
    assert sum(t.numel() * t.element_size() for t in held) < 1.05 * Checkpoint(folder).bytes


def test_reading_and_mapping_give_the_same_tensor(quantized):
    checkpoint = Checkpoint(quantized("fireq"))
    for name in checkpoint.tensors:
        mapped, read = checkpoint.load(name), checkpoint.read(name)
        assert mapped.dtype == read.dtype
        assert torch.equal(mapped.view(torch.uint8), read.view(torch.uint8))
