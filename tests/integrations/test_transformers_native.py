"""What transformers alone can load, it loads with the logits that quantkit gives."""

import pytest
import torch
from tiny_models import VOCAB
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, CompressedTensorsConfig

from quantkit.runtime.fusion import LinearPart
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.load import load

pytest.importorskip("compressed_tensors")


@pytest.fixture(autouse=True)
def without_quantkit(monkeypatch):
    """transformers as it is where quantkit was not imported."""
    monkeypatch.setitem(
        AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", CompressedTensorsConfig
    )


def logits(model) -> torch.Tensor:
    ids = torch.randint(2, VOCAB, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float().log_softmax(-1)


# Biases and norms on queries are copied whatever the format: with the first, the others are slow.
@pytest.mark.parametrize(
    "model_type",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3"))],
)
@pytest.mark.parametrize(
    ("recipe", "settings", "per_linear", "per_logit"),
    [
        ("int4", (), 1e-5, 1e-4),
        ("gptq", (), 1e-5, 1e-4),
        ("gptq-refined", ("refine.steps=4",), 1e-5, 1e-4),
        # The last bit of a float32 sum can move an activation to the next FP8 number in one and not in the other.
        ("fireq", ("kv_cache=null",), 1e-5, 3e-2),
        # compressed-tensors divides a row's maximum by 127.5, we and vLLM by 127: other roundings, the same scheme.
        ("int8", (), 2e-2, 5e-2),
        ("crossquant", (), 2e-2, 5e-2),
        ("crossquant-w4a8", (), 2e-2, 5e-2),
        ("crossquant-w4a4", (), 2e-1, 5e-1),
        ("quest-hadamard-offline", (), 2e-2, 5e-2),
        ("int4", ("weights.bits=2",), 1e-5, 1e-4),
        ("int4", ("weights.bits=3", "weights.group_size=32"), 1e-5, 1e-4),
        ("int4", ("weights.bits=5",), 1e-5, 1e-4),
        ("int4", ("weights.bits=8", "weights.group_size=64"), 1e-5, 1e-4),
        ("int8", ("weights.bits=6",), 2e-2, 5e-2),
    ],
)
def test_same_weights_products_and_logits(
    quantized, model_type, recipe, settings, per_linear, per_logit
):
    from transformers import AutoModelForCausalLM

    folder = quantized(recipe, model_type, *settings)
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        load(folder, dtype=torch.float32),
    )
    got, want = logits(ours), logits(theirs)
    assert float((got - want).abs().mean()) < per_logit
    linears = [
        name for name, m in ours.named_modules()
        if isinstance(m, QuantLinear | LinearPart) and not name.endswith(".linear")
    ]  # fmt: skip
    assert len(linears) == 14
    for name in linears:
        linear, other = ours.get_submodule(name), theirs.get_submodule(name)
        x = torch.randn(1, 6, linear.in_features, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            a, b = linear(x), other(x)
        assert float((a - b).norm() / b.norm()) < per_linear, name


def test_an_online_rotation_is_written_as_compressed_tensors_reads_it(quantized):
    """And applied from that description alone, it is our rotation."""
    from compressed_tensors.transform import TransformConfig, TransformFactory
    from quantkit.kernels.hadamard import hadamard

    from quantkit.formats.checkpoint import Checkpoint

    config = Checkpoint(quantized("quest-hadamard")).config["quantization_config"]
    (name, scheme), *rest = TransformConfig(**config["transform_config"]).config_groups.items()
    assert not rest
    online = next(args for args in scheme.apply if args.is_online())
    assert online.targets == [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]
    linear = torch.nn.Linear(384, 8)
    transform = TransformFactory.from_scheme(scheme, name=name).create_transform(linear, online)
    x = torch.randn(3, 384)
    assert torch.allclose(transform(x), hadamard(x, 128), atol=1e-5)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe", "gpt-neox"])
def test_experts_and_other_names_than_the_files(quantized, variant: str):
    """transformers stacks the experts that lie apart in our files, and does not take the output layer for quantized."""
    from transformers import AutoModelForCausalLM

    folder = quantized("int4", variant)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert float((logits(load(folder, dtype=torch.float32)) - logits(theirs)).abs().mean()) < 0.01
