"""`quantkit bench`: every op runs and is compared; figures, table, picture and errors."""

import json
import subprocess
import sys

import pytest
import torch
from quantkit.kernels.gpu import tuning

from quantkit.bench import peers
from quantkit.bench.ops import bench_ops, make_cases, names
from quantkit.bench.picture import draw
from quantkit.bench.random_model import FORMATS, SIZES, write_random
from quantkit.bench.tune import tune_cases
from quantkit.errors import QuantkitError
from quantkit.runtime.decoding import Decoder
from quantkit.runtime.load import load

CPU = torch.device("cpu")


def quantkit(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "quantkit", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    cases = make_cases(names(), CPU, rows=(1, 3), shapes=((256, 128),), contexts=(40, 80))
    return bench_ops(cases, CPU, seconds=1e-3).to_dict()


def test_every_op_is_timed_beside_bf16(report):
    assert {r["op"] for r in report["results"]} == set(names())
    for result in report["results"]:
        ours, bf16 = (result["seconds"][n]["median"] for n in ("quantkit", "bf16"))
        assert result["ratio"]["bf16"] == pytest.approx(bf16 / ours)
        assert result["roofline"] > 0
    linear = next(r for r in report["results"] if r["op"] == "int4_linear")
    assert linear["operations"] == 2 * 256 * 128
    assert linear["bytes"] == 256 * 128 // 2 + 2 * 2 * 128 + 16 + 2 * (256 + 128)


def test_the_picture(report, tmp_path):
    draw(report, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(QuantkitError, match="no linear layer and no attention"):
        draw(report | {"results": []}, tmp_path / "none.png")


def test_a_peer_that_fails_is_named(monkeypatch):
    def broken(x, weights):
        raise RuntimeError("wants\nanother GPU")

    monkeypatch.setitem(peers._LINEARS, "int4_linear", {"pytest broken": broken, "nowhere": broken})
    made, failed = peers.linear("int4_linear", torch.ones(1, 8), [torch.ones(8, 8)])
    assert made == {}
    assert failed == ["pytest broken: RuntimeError: wants another GPU"]


def test_tuning_tries_what_a_case_looks_up_and_keeps_the_fastest(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "A_GPU")
    monkeypatch.setattr("quantkit.bench.tune._seconds", lambda op, key, run, device, c: c["N"])
    candidates = [{"N": 3}, {"N": 1}, {"N": 2}]

    class Case:
        runs = {"quantkit": lambda i: tuning.choose("an_op", (16, 4), candidates, {"N": 3})}  # noqa: RUF012

    lines = list(tune_cases([("a case", Case)], CPU))
    assert lines == ["an_op 16 4: {'N': 1}"]
    assert tuning.choose("an_op", (16, 4), candidates, {"N": 3}, CPU) == {"N": 1}
    with tuning.trying("an_op", (16, 4), {"N": 2}):
        assert tuning.choose("an_op", (16, 4), candidates, {"N": 3}, CPU) == {"N": 2}


@pytest.mark.parametrize("recipe", FORMATS)
def test_a_random_checkpoint_loads_and_speaks(recipe, tmp_path, monkeypatch):
    small = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    monkeypatch.setitem(SIZES, "random-1b", SIZES["random-1b"] | small | heads)
    model = load(write_random("random-1b", recipe, tmp_path / "model"))
    logits = model(torch.arange(10)[None]).logits
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 100


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("recipe", ["fireq", "int4"])
def test_the_decoder_says_what_generate_does(quantized, recipe, fixed):
    model = load(quantized(recipe), dtype=torch.float32)
    ids = torch.randint(2, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = model.generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1
    )
    decoder = Decoder(model, 2, 16, fixed)
    for _ in range(2):
        tokens = [decoder.prefill(ids).clone()] + [decoder.step().clone() for _ in range(5)]
        assert torch.equal(torch.cat(tokens, 1), expected[:, 9:])
    with pytest.raises(ValueError, match=r"\(2, 16\) for 2 sequences of at most 16"):
        decoder.prefill(torch.zeros(2, 16, dtype=torch.int64))


def test_a_model_beside_its_original(quantized, tmp_path):
    settings = ["--prompt", "8", "--new-tokens", "2", "--seconds", "0.01"]
    out = tmp_path / "speed.json"
    done = quantkit("bench", str(quantized("int4")), *settings, "-o", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for part in ("prefill", "decode"):
        assert found[part]["ratio"] > 0
        assert found[part]["quantkit"]["tokens_per_second"] > 0
    loaded = found["loaded"]["quantkit"]
    assert loaded["packed_bytes"] <= loaded["tensor_bytes"] * 1.1
    assert "ratio" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--op", "nonsense"], "--op nonsense: no such op; int4_linear"),
        (["ops", "--m", "1,x"], "--m 1,x: numbers above 0 with commas"),
        (["ops", "--shape", "4096"], "--shape 4096: INPUTSxOUTPUTS"),
        (["ops", "--shape", "100x8"], "--shape 100x8: inputs in 128s"),
        (["ops", "--seconds", "0"], "--seconds 0.0: a number above 0"),
        (["ops", "--op", "int4_linear", "--tune"], "--tune: finds configurations of GPU kernels"),
        (["ops", "-o", "nowhere/x.json"], "--output nowhere/x.json: there is no folder nowhere"),
        (["llama", "--picture", "x.png"], "--picture: only `bench ops` draws one"),
        (["llama"], "llama: is not quantized; quantize it first"),
        (["random-1b", "--recipe", "x"], "--recipe x: no such format"),
        (["random-3b"], "random-3b: no such size; random-1b"),
        (["llama", "--prompt", "0"], "--prompt 0: at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch):
    from typer.testing import CliRunner

    from quantkit.cli.main import app

    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, QuantkitError)
    assert str(result.exception).startswith(message)
    assert "\n" not in str(result.exception)
