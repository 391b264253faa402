"""Proof that an output is whole: hashes, every target quantized, scales sound, names and shapes as servers want them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.data import read_text, tokenize
from quantkit.errors import QuantkitError
from quantkit.finite import all_finite
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.config import QuantizationInfo, parse_quantization_config
from quantkit.formats.packed import expected_tensors
from quantkit.formats.writer import sha256
from quantkit.models.files import ModelCheckpoint, in_model_names
from quantkit.models.folding import may_change
from quantkit.models.names import find_model
from quantkit.models.rotating import ResidualBasis, turned_tensors
from quantkit.models.sizes import check_sizes
from quantkit.models.structure import build_skeleton, find_structure, load_config

_SANITY_TOKENS = 128
# The mean token loss of a model that knows nothing is ln(vocabulary); a broken one lies well above it.
_SANITY_MARGIN = 1.0


@dataclass
class Verification:
    """What was checked, and what was found wrong (empty if nothing)."""

    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": not self.problems, "checks": self.checks, "problems": self.problems}


def verify(
    model: str | Path, *, against: str | None = None, trust_remote_code: bool = False
) -> Verification:
    """Check a quantized checkpoint.

    Args:
        model: the folder.
        against: the original; every tensor of it must be there, quantized or byte for byte.
        trust_remote_code: run Python code that comes with the checkpoint, where its model type needs it.

    Raises:
        QuantkitError: the checkpoint cannot be read at all, or was not written by quantkit.
    """
    path = find_model(str(model))
    source = Checkpoint(path)
    check_sizes(source.config, source)
    config = load_config(source.config, str(path), code=path if trust_remote_code else None)
    info = parse_quantization_config(source.config, str(path))
    skeleton = build_skeleton(config, str(path))
    checkpoint = ModelCheckpoint(source, skeleton)
    info = in_model_names(info, checkpoint)
    result = Verification()
    _check_hashes(checkpoint, info, result)
    _check_modules(checkpoint, skeleton, info, result)
    if against is not None:
        original = ModelCheckpoint(Checkpoint(find_model(against)), skeleton)
        _check_source(checkpoint, skeleton, info, original, result)
    if not result.problems:
        _check_text(checkpoint, config, trust_remote_code, result)
    return result


def _check_hashes(checkpoint: Checkpoint, info: QuantizationInfo, result: Verification) -> None:
    shards = info.meta.get("shards") or {}
    if not isinstance(shards, dict):
        raise QuantkitError(f"{checkpoint.path}: malformed quantization_config.quantkit.shards")
    if set(shards) != set(checkpoint.files):
        result.problems.append(
            f"shards {sorted(checkpoint.files)} do not match the recorded {sorted(shards)}"
        )
    for name, want in shards.items():
        file = checkpoint.path / name
        if Path(name).name == name and file.is_file() and sha256(file) != want:
            result.problems.append(
                f"{name}: its sha256 is not the recorded one; the file was changed or damaged"
            )
    result.checks.append(f"sha256 of {len(shards)} shard{'s' if len(shards) != 1 else ''}")


def _check_modules(
    checkpoint: ModelCheckpoint, skeleton: Any, info: QuantizationInfo, result: Verification
) -> None:
    linears: dict[str, Any] = {
        n: m for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)
    }
    for name, scheme in info.schemes.items():
        if name not in linears:
            result.problems.append(f"{name}: recorded as quantized, the model has no such linear")
            continue
        rows, columns = linears[name].out_features, linears[name].in_features
        for suffix, want in expected_tensors(scheme, rows, columns).items():
            found = checkpoint.tensors.get(f"{name}.{suffix}")
            if found is None or (found.dtype, found.shape) != want:
                got = f"{found.dtype} {list(found.shape)}" if found else "missing"
                result.problems.append(
                    f"{name}.{suffix}: {got}, {want[0]} {list(want[1])} is expected"
                )
        scale_name = f"{name}.weight_scale"
        if scale_name in checkpoint.tensors:
            scale = checkpoint.read(scale_name).float()
            if not all_finite(scale) or not bool((scale > 0).all()):
                result.problems.append(
                    f"{scale_name}: holds a scale that is zero, negative or not finite"
                )
        if scheme.packs and f"{name}.weight" in checkpoint.tensors:
            result.problems.append(f"{name}.weight: lies beside its packed form")
    ignored = set(checkpoint.config["quantization_config"].get("ignore", []))
    for name in linears.keys() - info.schemes.keys():
        if checkpoint.file_module(name) in ignored:
            continue
        result.problems.append(f"{name}: neither quantized nor in `ignore`")
    result.checks.append(f"{len(info.schemes)} quantized linears: names, shapes, types, scales")


def _check_source(
    checkpoint: Checkpoint,
    skeleton: Any,
    info: QuantizationInfo,
    source: Checkpoint,
    result: Verification,
) -> None:
    copied = 0
    structure = find_structure(skeleton, str(checkpoint.path))
    basis = info.meta.get("residual_basis")
    turned = ResidualBasis(**basis) if basis else None
    rotation = info.meta.get("recipe", {}).get("rotation") or {}
    changed = may_change(structure) | turned_tensors(
        structure, turned, bool(rotation.get("values"))
    )
    for name, there in source.tensors.items():
        module, _, kind = name.rpartition(".")
        if module in info.schemes and kind == "weight":
            continue
        here = checkpoint.tensors.get(name)
        if here is None:
            result.problems.append(f"{name}: in the original, missing here")
        elif (here.dtype, here.shape) != (there.dtype, there.shape):
            result.problems.append(
                f"{name}: {here.dtype} {list(here.shape)} here, not as in the original"
            )
        elif name not in changed:
            # Bytes, not values: NaN differs from itself.
            if not all(map(torch.equal, checkpoint.raw(name), source.raw(name))):
                result.problems.append(f"{name}: differs from the original")
            copied += 1
    result.checks.append(
        f"{len(source.tensors)} tensors of the original, {copied} of them byte for byte"
    )
    if turned:
        _check_turned(checkpoint, source, turned, result)


def _check_turned(
    checkpoint: Checkpoint, source: Checkpoint, basis: ResidualBasis, result: Verification
) -> None:
    """What a rotation of the residual stream makes of embedding, head and final norm, done again."""
    for turned in basis.turn_outside(source):
        info, first = checkpoint.tensors.get(turned.name), 0
        same = info is not None and (info.dtype, info.shape) == (
            turned.like.dtype,
            turned.like.shape,
        )
        for want in turned.pieces if same else ():
            span = (first, first := first + len(want))
            got = checkpoint.read(turned.name, rows=span).float()
            # Another machine's sums may round another way in the last place.
            same = same and torch.allclose(got, want.float(), rtol=0.01, atol=1e-4)
        if not same:
            result.problems.append(
                f"{turned.name}: is not the original's, turned into the recorded basis"
            )
    result.checks.append("embedding, head and final norm: the original's, turned")


def _check_text(
    checkpoint: Checkpoint, config: Any, trust_remote_code: bool, result: Verification
) -> None:
    """A short text must give finite logits and a loss below that of a model that knows nothing."""
    from quantkit.models.tokenizer import load_tokenizer
    from quantkit.streamed import streamed_logits

    try:
        tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust_remote_code)
    except QuantkitError:
        result.checks.append("sanity text: skipped, there is no tokenizer")
        return
    vocabulary = int(config.vocab_size)
    tokens = tokenize(tokenizer, read_text("sample", split="test")[:4000])[:_SANITY_TOKENS]
    length = min(tokens.numel(), int(getattr(config, "max_position_embeddings", 2048)))
    ids = tokens[:length].clamp_max(vocabulary - 1)[None]
    logits = streamed_logits(checkpoint.path, ids, trust_remote_code=trust_remote_code)
    if not all_finite(logits):
        result.problems.append("sanity text: the model's outputs are not finite")
        return
    loss = float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
    nothing = math.log(vocabulary)
    if loss > nothing + _SANITY_MARGIN:
        result.problems.append(
            f"sanity text: loss {loss:.2f} per token, worse than knowing nothing ({nothing:.2f})"
        )
    result.checks.append(f"sanity text: loss {loss:.2f} per token (knowing nothing: {nothing:.2f})")
