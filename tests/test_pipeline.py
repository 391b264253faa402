"""The main job's output: whole, repeatable, bounded, and nothing of the source lost."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from quantkit import Recipe, load, pipeline, quantize
from quantkit.calibration.observe import Enough, Watched
from quantkit.calibration.simulate import SimulatedLinear
from quantkit.calibration.stream import LayerStream
from quantkit.errors import InternalError, QuantkitError
from quantkit.formats.checkpoint import INDEX, Checkpoint
from quantkit.plan import make_plan
from quantkit.recipe import recipe_names
from quantkit.verify import verify


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name != "kv4"])
def test_sizes_are_as_planned(quantized, tiny, recipe: str):
    folder = quantized(recipe)
    report = json.loads((folder / "quantkit" / "report.json").read_text())
    assert Checkpoint(folder).bytes == report["total_bytes"]["after"]
    assert Checkpoint(tiny()).bytes == report["total_bytes"]["before"]
    ratio = report["linear_bytes"]["after"] / report["linear_bytes"]["before"]
    assert ratio < (
        0.51 if "W8" in report["layers"][0]["linears"]["mlp.up_proj"]["scheme"] else 0.27
    )


def test_keys_and_values_alone(quantized, tiny):
    """Weights keep their bytes but for powers of two at queries and keys; the function is nearly the same."""
    folder = quantized("kv4")
    before, after = Checkpoint(tiny()), Checkpoint(folder)
    assert before.tensors.keys() == after.tensors.keys()
    changed = {n for n in before.tensors if not torch.equal(before.load(n), after.load(n))}
    assert {name.split(".")[-2] for name in changed} <= {"q_proj", "k_proj"}
    for name in changed:
        ratio = (after.load(name).float() / before.load(name).float()).log2()
        ratio = ratio[torch.isfinite(ratio)]
        assert torch.equal(ratio, ratio.round()), name
    verify(folder, against=str(tiny()))
    ids = torch.randint(0, 500, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got, want = (
            load(f, dtype=torch.float32)(ids).logits.log_softmax(-1) for f in (folder, tiny())
        )
    assert 0 < float((got - want).abs().mean()) < 0.3


def test_the_report_says_what_was_done(quantized):
    report = json.loads((quantized("fireq") / "quantkit" / "report.json").read_text())
    assert report["recipe"]["name"] == "fireq"
    assert report["calibration"]["samples"] == 16
    assert len(report["calibration"]["sha256"]) == 64
    assert len(report["layers"]) == 2
    for layer in report["layers"]:
        assert set(layer["factors"]) == {"qkv", "o", "gate_up", "down"}
        assert 0 < layer["output_error"] < 0.1
        for linear in layer["linears"].values():
            assert 0 < linear["output_error"] < linear["weight_error"] * 2
            assert linear["fell_back"] is False


def test_the_same_inputs_give_the_same_bytes(tiny, text: Path, tmp_path: Path):
    def once(name: str, seed: int) -> dict[str, bytes]:
        quantize(
            str(tiny()), "fireq", tmp_path / name, calib=str(text), samples=8, seqlen=64, seed=seed
        )
        return {f.name: f.read_bytes() for f in (tmp_path / name).rglob("*.safetensors")}

    first = once("a", 0)
    assert set(first) == {"model.safetensors", "kv.safetensors"}
    assert once("b", 0) == first
    assert once("c", 1) != first


def test_shards_are_written_as_layers_finish(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from quantkit import pipeline
    from quantkit.formats.writer import OutputFolder

    class Small(OutputFolder):
        def __init__(self, path: Path, **settings) -> None:
            super().__init__(path, shard_bytes=200_000, **settings)

    monkeypatch.setattr(pipeline, "OutputFolder", Small)
    quantize(str(tiny()), "int4", tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) >= 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    monkeypatch.undo()
    quantize(str(tiny()), "int4", tmp_path / "one")
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "out")
    assert one.tensors.keys() == many.tensors.keys()
    for name in one.tensors:
        assert torch.equal(one.load(name), many.load(name))


def test_tensors_that_transformers_does_not_know_survive(tiny, tmp_path: Path):
    source = Path(shutil.copytree(tiny(), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    extra = {
        "mtp.head.weight": torch.randn(4, 4).bfloat16(),
        "model.layers.0.self_attn.extra": torch.arange(3),
        # Llama 1's checkpoints have it, and transformers no longer does.
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(32),
    }
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    # Within a layer an unknown tensor is copied; it is no parameter that a transform could miss.
    quantize(str(source), "int4", tmp_path / "out")
    out = Checkpoint(tmp_path / "out")
    for name, tensor in extra.items():
        assert torch.equal(out.load(name), tensor)
    # Servers that do build it look for it among what is not quantized.
    assert "mtp.head" in out.config["quantization_config"]["ignore"]
    assert not make_plan(str(source), Recipe.load("int4")).notes
    (note,) = make_plan(str(source), Recipe.load("quest-hadamard")).notes
    assert "mtp.head" in note
    assert "without speculative decoding" in note


def test_everything_unquantized_is_copied_byte_for_byte(quantized, tiny):
    source, out = Checkpoint(tiny()), Checkpoint(quantized("int4"))
    for name in source.tensors:
        if name in out.tensors:
            assert torch.equal(out.load(name), source.load(name)), name
    assert "model.embed_tokens.weight" in out.tensors
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (quantized("int4") / file).read_bytes() == (tiny() / file).read_bytes()
    config = json.loads((quantized("int4") / "config.json").read_text())
    config.pop("quantization_config")
    assert config == json.loads((tiny() / "config.json").read_text())


def test_from_the_hub_s_cache(tiny, tmp_path: Path, monkeypatch):
    """Its snapshots are links to blobs; nothing is copied out of it first."""
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(tiny().iterdir())):
        blob = repository / "blobs" / f"{number:040}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    quantize("org/tiny", "int4", tmp_path / "hub")
    quantize(str(tiny()), "int4", tmp_path / "folder")
    hub, folder = ((tmp_path / name / "model.safetensors") for name in ("hub", "folder"))
    assert hub.read_bytes() == folder.read_bytes()
    assert not any(file.is_symlink() for file in (tmp_path / "hub").rglob("*"))


@pytest.mark.parametrize("recipe", ["gptq", "fireq", "quest-hadamard"])
def test_a_sample_runs_through_a_layer_twice(tiny, text, tmp_path: Path, monkeypatch, recipe: str):
    """Once as the original is, once as quantized: most of a calibrated run's time. The last layer's output is but compared."""
    blocks, real = [], LayerStream.forward

    def counted(self, layer, number: int, hidden: torch.Tensor) -> torch.Tensor:
        blocks.append(hidden.shape[0])
        return real(self, layer, number, hidden)

    monkeypatch.setattr(LayerStream, "forward", counted)
    quantize(str(tiny()), recipe, tmp_path / "out", calib=str(text), samples=8, seqlen=64)
    assert sum(blocks) == 2 * 8 + (8 + 4)


@pytest.mark.parametrize("variant", ["llama", "falcon", "gpt-neox", "mixtral", "qwen3-moe"])
def test_products_that_nobody_asked_for_are_left_out(
    tiny, text, tmp_path: Path, monkeypatch, variant: str
):
    """Behind a layer's last input, but of the blocks whose outputs are compared; the output is the same."""
    ended: list[str] = []
    real = Watched.saw

    def saw(self, name: str, x: torch.Tensor) -> None:
        try:
            real(self, name, x)
        except Enough:
            ended.append(name)
            raise

    monkeypatch.setattr(Watched, "saw", saw)
    files = []
    for name in ("early", "whole"):
        out = tmp_path / name
        quantize(str(tiny(variant)), "gptq", out, calib=str(text), samples=16, seqlen=64)
        files.append((out / "model.safetensors").read_bytes())
        monkeypatch.setattr(Watched, "may_end_early", lambda _: False)
    assert files[0] == files[1]
    # Two layers, eight batches of two blocks, four blocks that are compared.
    assert variant == "qwen3-moe" or len(ended) == 2 * 6


@pytest.mark.parametrize("variant", ["llama", "mixtral", "qwen3-moe", "llama4"])
def test_nothing_holds_a_finished_layer(tiny, text, tmp_path: Path, monkeypatch, variant: str):
    """However many layers there are: those of a mixture of experts have gigabytes each."""
    made: list[weakref.ref] = []
    real_init, real_layer = SimulatedLinear.__init__, pipeline.run_layer

    def init(self, *arguments) -> None:
        real_init(self, *arguments)
        made.append(weakref.ref(self))

    def one_layer(*arguments):
        result = real_layer(*arguments)
        gc.collect()
        assert made
        assert not [linear for linear in made if linear() is not None]
        return result

    monkeypatch.setattr(SimulatedLinear, "__init__", init)
    monkeypatch.setattr(pipeline, "run_layer", one_layer)
    quantize(str(tiny(variant)), "gptq", tmp_path / "out", calib=str(text), samples=8, seqlen=64)


def test_biases_are_kept(quantized, tiny):
    source, out = Checkpoint(tiny("qwen2")), Checkpoint(quantized("int4", "qwen2"))
    name = "model.layers.0.self_attn.k_proj.bias"
    assert torch.equal(out.load(name), source.load(name))
    # FireQ's RoPE factors scale a key's bias with its row.
    assert not torch.equal(Checkpoint(quantized("fireq", "qwen2")).load(name), source.load(name))


def test_a_sharded_source_gives_the_same_output(tiny, tmp_path: Path):
    source = save_model(tmp_path / "sharded", shard_size="1MB")
    assert len(Checkpoint(source).files) > 1
    quantize(str(source), "int4", tmp_path / "a")
    quantize(str(tiny()), "int4", tmp_path / "b")
    assert not (tmp_path / "a" / INDEX).exists()
    a, b = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    assert all(torch.equal(a.load(n), b.load(n)) for n in a.tensors)


# The error allowed, in the median and the mean: a sum's last bit moves a few activations to the next FP8 number.
@pytest.mark.parametrize(
    ("settings", "products", "median", "mean"),
    [
        (("weights.rounding=gptq",), torch.float32, 1e-5, 0.05),
        (("extends fireq",), torch.float32, 1e-5, 0.05),
        (("weights.rounding=gptq",), torch.bfloat16, 0.02, 0.05),
    ],
)
def test_what_was_calibrated_is_what_is_loaded(
    tiny, text: Path, tmp_path: Path, monkeypatch, settings, products, median, mean
):
    """Calibration's outputs of each layer are those of the packed model that is loaded afterwards."""
    from quantkit import pipeline, step
    from quantkit.runtime.load import load

    seen: list[torch.Tensor] = []

    class Spy(pipeline.LayerStream):
        def __init__(self, *arguments, **settings) -> None:
            super().__init__(*arguments, **settings)
            seen.append(arguments[3])

        def advance(self, layer, number: int, blocks: int | None = None) -> None:
            super().advance(layer, number)  # all blocks, of the last layer too
            seen.append(self.hidden.clone())

    monkeypatch.setattr(pipeline, "LayerStream", Spy)
    monkeypatch.setattr(step, "product_dtype", lambda device, bits: products)
    recipe = (
        Recipe.load("fireq")
        if settings == ("extends fireq",)
        else Recipe.load("int4", list(settings))
    )
    quantize(str(tiny("qwen3")), recipe, tmp_path / "out", calib=str(text), samples=4, seqlen=64)
    tokens, first, last = seen
    model = load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        _, *hidden = model.model(tokens, use_cache=False, output_hidden_states=True).hidden_states
        want = [
            first,
            model.model.norm(last),
        ]  # transformers' last one has gone through the final norm
    for ours, theirs in zip(hidden, want, strict=True):
        distance = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        assert float(distance.median()) < median
        assert float(distance.mean()) < mean


def test_behind_the_last_layer_no_more_runs_than_is_compared(
    tiny, text: Path, tmp_path: Path, monkeypatch
):
    from quantkit import pipeline

    seen: list[tuple[int, int]] = []

    class Spy(pipeline.LayerStream):
        everything = False

        def forward(self, layer, number: int, hidden: torch.Tensor) -> torch.Tensor:
            seen.append((number, len(hidden)))
            return super().forward(layer, number, hidden)

        def advance(self, layer, number: int, blocks: int | None = None) -> None:
            super().advance(layer, number, None if self.everything else blocks)

    monkeypatch.setattr(pipeline, "LayerStream", Spy)
    recipe = Recipe.load("int4", ["weights.rounding=gptq"])
    settings = {"calib": str(text), "samples": 32, "seqlen": 64, "overwrite": True}
    report = quantize(str(tiny()), recipe, tmp_path / "out", **settings)
    counts = [sum(n for layer, n in seen if layer == number) for number in (0, 1)]
    assert counts == [32 + 32, 32 + 4]
    Spy.everything = True
    assert [layer["output_error"] for layer in report["layers"]] == [
        layer["output_error"]
        for layer in quantize(str(tiny()), recipe, tmp_path / "all", **settings)["layers"]
    ]


def test_gptq_and_factors_pay(tiny, text: Path, tmp_path: Path):
    """Less output error than plain rounding, on the same model and text."""

    def errors(name: str, *settings: str) -> list[float]:
        recipe = Recipe.load("fireq", ["rope_scaling=null", "kv_cache=null", *settings])
        report = quantize(
            str(tiny()), recipe, tmp_path / name, calib=str(text), samples=32, seqlen=128
        )
        return [layer["output_error"] for layer in report["layers"]]

    plain = errors("plain", "weights.rounding=nearest", "weights.clip=absmax")
    full = errors("full")
    assert all(f < 0.8 * p for f, p in zip(full, plain))


def test_an_output_that_does_not_verify_is_a_failure(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from quantkit import plain

    real = plain.packed_tensors

    def damaged(codes, scale, scheme):
        tensors = real(codes, scale, scheme)
        tensors["weight_scale"][0, 0] = 0
        return tensors

    monkeypatch.setattr(plain, "packed_tensors", damaged)
    with pytest.raises(InternalError, match="zero, negative or not finite"):
        quantize(str(tiny()), "int4", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "online"])
def test_a_rotated_model_is_the_model(tmp_path: Path, text: Path, tied: bool, scheme: str):
    """At eight bits the outputs are close to the original's; a tied head is written on its own."""
    from quantkit.runtime.load import load

    source = save_model(tmp_path / "model", "qwen2", tie_word_embeddings=tied)
    turned = "rotation={residual: true, values: true, inputs: none}"
    if scheme == "online":
        turned = "rotation={residual: true, values: true, inputs: [down], block: full}"
    quantize(str(source), "int8", tmp_path / "out", overrides=[turned])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    out, before = Checkpoint(tmp_path / "out"), Checkpoint(source)
    assert ("lm_head.weight" in before.tensors) is not tied
    assert "lm_head.weight" in out.tensors
    for name in out.tensors:
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            assert torch.equal(out.load(name), torch.ones_like(out.load(name)))
    same = torch.equal(
        out.load("model.embed_tokens.weight"), before.load("model.embed_tokens.weight")
    )
    assert not same
    ids = torch.randint(2, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = load(tmp_path / "out", dtype=torch.float32)(ids, use_cache=False).logits
        want = load(source, dtype=torch.float32)(ids, use_cache=False).logits
    assert float((got - want).norm() / want.norm()) < 0.06  # otherwise above 1


def test_a_tokenizer_that_says_nonsense_is_one_line(tiny, tmp_path: Path, text: Path):
    source = tmp_path / "source"
    shutil.copytree(tiny(), source)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": {}}))
    with pytest.raises(QuantkitError, match="no usable tokenizer in it"):
        quantize(str(source), "gptq", tmp_path / "out", calib=str(text), samples=4, seqlen=64)
    assert not (tmp_path / "out").exists()
