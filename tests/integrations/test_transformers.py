"""`AutoModelForCausalLM.from_pretrained` after `import quantkit` is `quantkit.load`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB
from transformers import AutoModel, AutoModelForCausalLM

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.writer import save_tensors
from quantkit.runtime.attention import PackedAttention
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.load import load
from quantkit.verify import verify

SETTINGS = {"max_new_tokens": 8, "pad_token_id": 1, "eos_token_id": None}


def ids(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def edit(folder: Path, target: Path, change) -> Path:
    """A copy whose quantization_config is changed."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


def assert_same_tensors(one: Path, other: Path) -> None:
    """The same names, types and bytes."""
    a, b = Checkpoint(one), Checkpoint(other)
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        x, y = a.read(name), b.read(name)
        assert x.dtype == y.dtype
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), name


def test_importing_quantkit_imports_neither_torch_nor_transformers():
    code = "import sys, quantkit; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("recipe", "model_type"),
    [
        *(("fireq", "llama"), ("crossquant", "qwen2"), ("quest-hadamard", "qwen3")),
        *(("int4", "mistral"), ("kv4", "llama"), ("quest-hadamard-w4a4", "llama")),
        *(("quest-hadamard-w4a4kv4", "llama"), ("quest-hadamard-w8a8", "llama")),
    ],
)
def test_it_is_what_load_gives(quantized, recipe: str, model_type: str):
    folder = quantized(recipe, model_type)
    model, want = AutoModelForCausalLM.from_pretrained(folder), load(folder)
    assert {type(m) for m in model.modules()} == {type(m) for m in want.modules()}
    assert model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, want(ids()).logits)
    assert torch.equal(
        model.generate(ids(), **SETTINGS, do_sample=False),
        want.generate(ids(), **SETTINGS, do_sample=False),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
    ],
    ids=["static cache", "beam search", "sampling"],
)
def test_generate_from_a_batch_with_left_padding(quantized, settings):
    folder = quantized("fireq")
    tokens, mask = ids(), torch.ones(2, 20, dtype=torch.long)
    tokens[0, :7], mask[0, :7] = 1, 0
    outputs = []
    for model in (AutoModelForCausalLM.from_pretrained(folder), load(folder)):
        torch.manual_seed(0)
        outputs.append(model.generate(tokens, attention_mask=mask, **SETTINGS, **settings))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("how", ["from_pretrained", "load"])
@pytest.mark.parametrize("recipe", ["fireq", "quest-hadamard"])
def test_save_and_reload_bit_for_bit(quantized, tmp_path: Path, recipe: str, how: str):
    folder, target = quantized(recipe), tmp_path / "saved"
    model = load(folder) if how == "load" else AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(target, max_shard_size="200KB")
    assert len(Checkpoint(target).files) > 1
    assert_same_tensors(target, folder)
    assert verify(target, against=None).problems == []
    again = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, again(ids()).logits)


def test_saving_is_refused_where_it_would_lose_something(quantized, tmp_path: Path):
    folder = shutil.copytree(quantized("fireq"), tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(QuantkitError, match="choose another folder"):
        model.save_pretrained(folder)
    with pytest.raises(QuantkitError, match="quantkit push"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(QuantkitError, match="gone or changed"):
        model.save_pretrained(tmp_path / "saved")


def test_types_and_devices_that_one_asks_for(quantized):
    folder = quantized("fireq")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", device_map="auto")
    with torch.no_grad():
        want = load(folder, dtype=torch.float32)(ids()).logits
        assert torch.equal(model(ids()).logits, want)
        # Scales are no activations: not every bf16 number is a float16 number.
        back = model.to(torch.float16).to(torch.float32)
    scales = {m.weight_scale.dtype for m in back.modules() if isinstance(m, QuantLinear)}
    assert scales == {m.weight_scale.dtype for m in load(folder).modules() if isinstance(m, QuantLinear)}  # fmt: skip


def test_layers_left_on_disk_give_the_same(quantized, tmp_path: Path):
    folder = quantized("fireq")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")  # fmt: skip
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=str(tmp_path)
    )
    want = load(folder, fused=False)
    assert torch.equal(
        model.generate(ids(), **SETTINGS, do_sample=False),
        want.generate(ids(), **SETTINGS, do_sample=False),
    )
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tmp_path / "saved", folder)


def test_torch_compile_takes_it_whole(quantized):
    """In float32: to a compiled model transformers gives a mask, with which attention adds up in another order."""
    model = AutoModelForCausalLM.from_pretrained(quantized("fireq"), dtype=torch.float32)
    assert any(isinstance(m, PackedAttention) for m in model.modules())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        want = model(ids(), use_cache=False).logits
        assert torch.equal(compiled(ids(), use_cache=False).logits, want)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fireq", "crossquant"])
def test_inductor_compiles_the_whole_model(quantized, recipe: str):
    """In float32: compiled code adds in another order, and bfloat16 would show that as much as a fault."""
    model = AutoModelForCausalLM.from_pretrained(quantized(recipe), dtype=torch.float32)
    prompts = torch.cat([ids(), ids().flip(1)])
    static = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    with torch.no_grad():
        logits, tokens = model(prompts).logits, model.generate(prompts, **static)
        compiled = torch.compile(model, fullgraph=True)
        assert float((compiled(prompts).logits - logits).abs().mean()) < 2e-3
        model.forward = torch.compile(model.forward)
        assert torch.equal(model.generate(prompts, **static), tokens)


def test_checkpoints_of_others_stay_with_compressed_tensors(quantized, tmp_path: Path):
    pytest.importorskip("compressed_tensors")
    folder = edit(quantized("int4"), tmp_path / "theirs", lambda q: q.pop("quantkit"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


@pytest.mark.parametrize("recipe", ["quest-hadamard"])
def test_without_quantkit_what_would_be_garbage_names_the_package(quantized, recipe: str):
    """Stock transformers and vLLM read the header through compressed-tensors; it refuses, and shows this line."""
    compressed_tensors = pytest.importorskip("compressed_tensors.quantization")
    config = Checkpoint(quantized(recipe)).config["quantization_config"]
    with pytest.raises(ValueError, match="pip install quantkit"):
        compressed_tensors.QuantizationConfig.model_validate(
            {k: v for k, v in config.items() if k != "quantkit"}
        )


def _drop(name: str):
    def change(folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        tensors = {n: checkpoint.read(n) for n in checkpoint.tensors if n != name}
        save_tensors(tensors, folder / "model.safetensors")

    return change


def _add(name: str):
    def change(folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        tensors = {n: checkpoint.read(n) for n in checkpoint.tensors}
        save_tensors(tensors | {name: torch.zeros(2)}, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop("model.layers.1.mlp.up_proj.weight_scale"), "up_proj.weight_scale is missing"),
        (_drop("model.layers.1.input_layernorm.weight"), "input_layernorm.weight' is missing"),
        (_add("model.layers.0.mlp.up_proj.weight_zero_point"), "weight_zero_point is not a tensor"),
        (lambda f: (f / "quantkit" / "kv.safetensors").unlink(), "cannot be read without it"),
        (lambda f: save_tensors({"0": torch.ones(2, 64)}, f / "quantkit" / "kv.safetensors"), "nothing for layer 1"),
    ],
    ids=["scale", "norm", "zero point", "key scales", "one layer's key scale"],
)  # fmt: skip
def test_missing_and_unexpected_tensors_are_one_line(quantized, tmp_path, change, says):
    folder = shutil.copytree(quantized("fireq"), tmp_path / "copy")
    change(folder)
    with pytest.raises(QuantkitError, match=says):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_it_cannot_do_is_one_line(quantized, tmp_path: Path):
    folder = quantized("fireq")
    unknown = edit(folder, tmp_path / "unknown", lambda q: q["quantkit"].update(requires=["magic"]))
    with pytest.raises(QuantkitError, match="requires magic; update quantkit"):
        AutoModelForCausalLM.from_pretrained(unknown)
    with pytest.raises(QuantkitError, match="attn_implementation='eager'"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with pytest.raises(QuantkitError, match="use AutoModelForCausalLM"):
        AutoModel.from_pretrained(folder)
