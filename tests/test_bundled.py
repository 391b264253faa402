"""The bundled Llama: what it is, and what each recipe leaves of it, plain and with planted outliers."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from quantkit import load, quantize
from quantkit.calibration.data import read_text, tokenize
from quantkit.evaluate.perplexity import perplexity
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.writer import save_tensors
from quantkit.models.names import bundled_path
from quantkit.models.outliers import plant_outliers
from quantkit.models.tokenizer import load_tokenizer

WINDOWS = 24


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return tokenize(load_tokenizer(bundled_path()), read_text("sample", split="test"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("planted") / "llama"
    shutil.copytree(bundled_path(), target)
    checkpoint = Checkpoint(target)
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
    save_tensors(plant_outliers(tensors, checkpoint.config), target / "model.safetensors")
    return target


def ppl(path: Path, tokens: torch.Tensor) -> float:
    return perplexity(load(path), tokens, 512, limit=WINDOWS).ppl


def test_it_is_what_the_readme_says(tokens: torch.Tensor):
    config = json.loads((bundled_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["head_dim"] == 64
    assert (bundled_path() / "model.safetensors").stat().st_size <= 10_000_000
    assert {t.dtype for t in Checkpoint(bundled_path()).tensors.values()} == {"BF16"}
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert perplexity(load(bundled_path()), tokens, 512, limit=8).ppl < 25


def test_its_tokenizer_and_texts(tokens: torch.Tensor):
    tokenizer = load_tokenizer(bundled_path())
    assert len(tokenizer) == 4096
    text = "And God said, Let there be light: and there was light.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who art thou?"}], tokenize=False
    )
    assert "Who art thou?" in chat
    assert tokens.numel() > 40_000
    calibration = read_text("bundled", split="train")
    assert tokenize(tokenizer, calibration).numel() >= 64 * 512
    sample = read_text("sample", split="test")
    # Held out is held out: no verse of more than a few words is in both.
    verses = {line for line in sample.splitlines() if len(line) > 80}
    assert len(verses & set(calibration.splitlines())) < 0.005 * len(verses)


def test_it_speaks():
    tokenizer, model = load_tokenizer(bundled_path()), load("llama")
    inputs = tokenizer("In the beginning", return_tensors="pt")
    out = model.generate(input_ids=inputs["input_ids"], max_new_tokens=12, do_sample=False)
    assert len(tokenizer.decode(out[0], skip_special_tokens=True)) > len("In the beginning")


# recipe -> highest perplexity ratio to bf16: plain, with planted outliers.
LIMITS = {
    "int8": (1.003, None),
    "crossquant": (1.003, 1.003),
    "crossquant-w4a8": (1.025, 1.025),
    "fireq": (1.03, 1.05),
    "gptq-refined": (1.008, 1.008),
    "quest-hadamard": (1.012, 1.012),
    "quest-hadamard-offline": (1.012, 1.012),
    "quest-hadamard-w4a4": (1.035, 1.035),
    "quest-hadamard-w8a8": (1.001, 1.001),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LIMITS)
def test_what_is_left_of_it(recipe: str, planted: Path, tokens: torch.Tensor, tmp_path: Path):
    for number, source in enumerate((bundled_path(), planted)):
        limit = LIMITS[recipe][number]
        if limit is None:
            continue
        quantize(str(source), recipe, tmp_path / str(number))
        assert ppl(tmp_path / str(number), tokens) / ppl(source, tokens) < limit


@pytest.mark.slow
def test_without_rope_scaling_outliers_ruin_int4_keys(
    planted: Path, tokens: torch.Tensor, tmp_path: Path
):
    quantize(str(planted), "fireq", tmp_path / "out", overrides=["rope_scaling=null"])
    assert ppl(tmp_path / "out", tokens) / ppl(planted, tokens) > 1.2


@pytest.mark.slow
def test_garbage_is_found(tmp_path: Path):
    """Scales in disorder: every check on shapes and hashes passes, the sanity text does not."""
    from quantkit.formats.writer import sha256
    from quantkit.verify import verify

    out = tmp_path / "out"
    quantize("llama", "int4", out)
    checkpoint = Checkpoint(out)
    tensors = {name: checkpoint.load(name).clone() for name in checkpoint.tensors}
    for name, tensor in tensors.items():
        if name.endswith("weight_packed"):
            tensor.copy_(tensor.roll(37, 0))
    checkpoint.close()
    save_tensors(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["quantkit"]["shards"] = {
        "model.safetensors": sha256(out / "model.safetensors")
    }
    (out / "config.json").write_text(json.dumps(config))
    problems = verify(out).problems
    assert any("sanity text" in problem for problem in problems)
