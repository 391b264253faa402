"""A checkpoint folder -> a transformers model; quantized linears stay packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.config import KV_FILE, QuantizationInfo, parse_quantization_config
from quantkit.formats.packed import expected_tensors
from quantkit.models.files import ModelCheckpoint, check_complete, in_model_names
from quantkit.models.names import find_model
from quantkit.models.sizes import check_sizes
from quantkit.models.structure import build_skeleton, load_config
from quantkit.runtime.attention import NAME, KVQuantizer, register
from quantkit.runtime.cache import generate_with_packed_cache, quantizers
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.patch import patch
from quantkit.runtime.save import save_as_checkpoint

# What loading needs beside the weights: the largest layer twice while it is repacked, and some air.
_REPACKING_BYTES = 1 << 30


def load(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    fused: bool = True,
    fresh_prompts: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """A model that generates, from a folder, a hub id or an alias; quantized by quantkit or not at all.

    Args:
        device: where it runs.
        dtype: of everything that is not quantized, and of activations; the checkpoint's if left out.
        fused: with layers fused and weights repacked for the device (`runtime.patch`); otherwise every
            layer stands alone, with the checkpoint's tensors as they are stored.
        fresh_prompts: a prompt attends to its own keys and values in 16 bits, which are packed behind its
            back, and only later tokens read the INT4 cache. A prompt is then nearer to the original; but
            the same text read token by token, or in parts, gives another result, and perplexity, which
            is a prompt's, says nothing of what the INT4 cache costs. Off: all read the cache.
        trust_remote_code: run Python code that comes with the checkpoint, where its model type needs it.

    Raises:
        QuantkitError: no such model, a broken checkpoint, or one of another tool.
    """
    source = Checkpoint(find_model(str(model)))
    check_sizes(source.config, source)
    config = load_config(source.config, str(model), code=source.path if trust_remote_code else None)
    info = QuantizationInfo({})
    if "quantization_config" in source.config:
        info = parse_quantization_config(source.config, str(model))
    if info.kv_cache:
        register()
    _check_memory(source, device)
    skeleton: Any = build_skeleton(config, str(model), attention=NAME if info.kv_cache else "sdpa")
    checkpoint = ModelCheckpoint(source, skeleton)
    info = in_model_names(info, checkpoint)
    replace_linears(skeleton, checkpoint, info)
    _fill(skeleton, checkpoint, dtype or _dtype_of(config))
    if info.kv_cache:
        attach_quantizers(skeleton, checkpoint, info)
        generate_with_packed_cache(skeleton)
    skeleton.to(device)
    if fused:
        patch(skeleton, fresh_prompts=fresh_prompts)
    for quantizer in quantizers(skeleton):
        quantizer.fresh_prompts = fresh_prompts
    if info.schemes:
        save_as_checkpoint(skeleton, source)
    _generation_config(skeleton, checkpoint.path)
    return skeleton.eval()


def _check_memory(checkpoint: Checkpoint, device: str) -> None:
    """Refuse before anything is read what the device cannot hold.

    Raises:
        QuantkitError: there is no such device, or too little memory is free on it.
    """
    if torch.device(device).type != "cuda":
        return
    if not torch.cuda.is_available():
        raise QuantkitError(f"--device {device}: no CUDA device was found; use --device cpu")
    free, total = torch.cuda.mem_get_info(device)
    needed = checkpoint.bytes + _REPACKING_BYTES
    if needed > free:
        raise QuantkitError(
            f"{checkpoint.path}: needs {needed / 2**30:.1f} GiB on {device}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; "
            "free some, or use --device cpu"
        )


def _dtype_of(config: Any) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def replace_linears(model: nn.Module, checkpoint: Checkpoint, info: QuantizationInfo) -> None:
    """Put an empty `QuantLinear` in the place of each quantized linear.

    Raises:
        QuantkitError: the model has no such linear, or its tensors are not those of its scheme.
    """
    stored: dict[str, set[str]] = {}
    for tensor in checkpoint.tensors:
        module, _, suffix = tensor.rpartition(".")
        stored.setdefault(module, set()).add(suffix)
    for name, scheme in info.schemes.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = nn.Identity()
        if not isinstance(linear, nn.Linear):
            raise QuantkitError(
                f"{checkpoint.path}: config.json says {name} is quantized; the model has no such linear"
            )
        expected = expected_tensors(scheme, linear.out_features, linear.in_features)
        for suffix in sorted(stored.get(name, set()) - expected.keys() - {"bias"}):
            # A zero point, say: whoever wrote it meant other numbers than we would read.
            raise QuantkitError(
                f"{checkpoint.path}: {name}.{suffix} is not a tensor of {scheme}; the checkpoint was changed"
            )
        for suffix, (dtype, shape) in expected.items():
            found = checkpoint.tensors.get(f"{name}.{suffix}")
            if found is None or (found.dtype, found.shape) != (dtype, shape):
                what = f"is {found.dtype} {list(found.shape)}" if found else "is missing"
                raise QuantkitError(
                    f"{checkpoint.path}: {name}.{suffix} {what}; {dtype} {list(shape)} is expected"
                )
        parent, _, child = name.rpartition(".")
        packed = QuantLinear(
            linear.in_features, linear.out_features, linear.bias is not None, scheme
        )
        setattr(model.get_submodule(parent), child, packed)


def _fill(model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Give every parameter and stored buffer its tensor; none may be left without."""
    model.tie_weights()
    check_complete(model, checkpoint)
    state: dict[str, torch.Tensor] = {}
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    for name in model.state_dict(keep_vars=True):
        if name not in checkpoint.tensors:
            continue
        tensor = checkpoint.read(name) if quantized else checkpoint.load(name)
        module, _, kind = name.rpartition(".")
        packed = module in quantized and kind != "bias"
        state[name] = tensor if packed else tensor.to(dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise QuantkitError(
            f"{checkpoint.path}: nothing fills {left[0]!r}; the checkpoint is not complete"
        )


def attach_quantizers(model: nn.Module, checkpoint: Checkpoint, info: QuantizationInfo) -> None:
    """One KVQuantizer per attention layer, with its post-RoPE scale where the file has one."""
    assert info.kv_cache
    scales: dict[str, torch.Tensor] = {}
    path = checkpoint.path / KV_FILE
    if path.is_file():
        try:
            scales = load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise QuantkitError(f"{path}: cannot be read ({error})") from None
    elif info.meta.get("post_rope_scale"):
        raise QuantkitError(
            f"{path}: is missing; the keys of this checkpoint cannot be read without it"
        )
    # A decoder layer may know its number too: the innermost module that does is the attention.
    known = [(n, m) for n, m in model.named_modules() if getattr(m, "layer_idx", None) is not None]
    attentions: list[Any] = [
        m for n, m in known if not any(other.startswith(f"{n}.") for other, _ in known)
    ]
    for attention in attentions:
        scale = scales.get(str(attention.layer_idx))
        if scale is None and info.meta.get("post_rope_scale"):
            raise QuantkitError(f"{path}: holds nothing for layer {attention.layer_idx}")
        attention.kv_quantizer = KVQuantizer(info.kv_cache, scale)


def _generation_config(model: Any, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(path))
        except Exception as error:  # validation errors of several kinds
            raise QuantkitError(
                f"{path / 'generation_config.json'}: not valid ({' '.join(str(error).split())[:120]})"
            ) from None
