"""Models of random numbers in the sizes of known ones: speed without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantkit.bench.ops import LINEARS
from quantkit.bench.synthetic import random_tensors
from quantkit.errors import QuantkitError
from quantkit.formats.config import build_quantization_config
from quantkit.formats.scheme import KVFormat, Scheme
from quantkit.formats.writer import OutputFolder
from quantkit.runtime.patch import patch

PREFIX = "random-"
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "random-1b": _LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "random-8b": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
# The formats of the recipes of these names.
FORMATS: dict[str, tuple[Scheme, KVFormat | None]] = {
    "int4": (LINEARS["int4_linear"], None),
    "int8": (LINEARS["int8_linear"], None),
    "fireq": (LINEARS["int4_fp8_linear"], KVFormat()),
    "crossquant": (LINEARS["int8_linear"], None),
    "crossquant-w4a8": (LINEARS["int4_int8_linear"], None),
    "quest-hadamard": (LINEARS["hadamard_int4_linear"], None),
}


def write_random(size: str, recipe: str, folder: Path) -> Path:
    """A quantized checkpoint of a size of `SIZES` in a format of `FORMATS`, without a tokenizer.

    Raises:
        QuantkitError: no such size or format, or the folder cannot be written.
    """
    if size not in SIZES:
        raise QuantkitError(f"{size}: no such size; {', '.join(SIZES)} are known")
    if recipe not in FORMATS:
        raise QuantkitError(
            f"--recipe {recipe}: no such format for a random model; {', '.join(FORMATS)} are known"
        )
    scheme, cache = FORMATS[recipe]
    config = SIZES[size]
    model = _skeleton(size)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    kept = [name for name in linears if name == "lm_head"]
    schemes = {name: scheme for name in linears if name not in kept}
    generator = torch.Generator().manual_seed(0)
    with OutputFolder(folder) as out:
        for name, parameter in model.named_parameters():
            module = name.rpartition(".")[0]
            if module in schemes:
                shape = linears[module].weight.shape
                packed = random_tensors(scheme, shape[0], shape[1], generator)
                for suffix, tensor in packed.items():
                    out.add(f"{module}.{suffix}", tensor)
                out.end_of_layer()
            else:
                out.add(name, _dense(name, parameter.shape, generator))
        quantization = build_quantization_config(schemes, kept, cache, {"recipe": recipe})
        out.finish({}, lambda hashes: config | {"quantization_config": quantization})
    return folder


def random_baseline(size: str, device: torch.device) -> Any:
    """The same model in bf16, unquantized."""
    generator = torch.Generator(device).manual_seed(0)
    model = _skeleton(size)
    state = {n: _dense(n, p.shape, generator) for n, p in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return patch(model.to(device).eval().requires_grad_(False))


def _skeleton(size: str) -> Any:
    from quantkit.models.structure import build_skeleton, load_config

    model: Any = build_skeleton(load_config(SIZES[size], size), size)
    model.tie_weights()
    return model


def _dense(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    tensor = torch.ones(shape, dtype=torch.bfloat16, device=generator.device)
    return tensor if "norm" in name else tensor.normal_(0, shape[-1] ** -0.5, generator=generator)
