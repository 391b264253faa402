"""A *scheme*: the resolved numeric format of one module. Plain data, no pydantic: the runtime reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quantkit.formats.bits import packed_words


@dataclass(frozen=True)
class WeightFormat:
    """How a weight [N, K] is stored.

    `group_size` None means one scale per output channel. `scale` says how the group scales are rounded:
    `bf16`, `fp8_channel` (FP8 code times a channel scale) or `fp8_tensor` (FireQ's one power of two per
    tensor). `half` is QuEST's half-integer grid: the value is (code + 1/2) * scale.
    """

    bits: int
    group_size: int | None
    scale: str = "bf16"
    half: bool = False


@dataclass(frozen=True)
class ActivationFormat:
    """How an activation [T, K] is rounded on the way in: dynamic, one scale per token.

    `type` is `int` or `float` (e4m3); `half` is QuEST's half-integer grid with Gaussian clipping.
    """

    bits: int
    type: str = "int"
    half: bool = False


@dataclass(frozen=True)
class Scheme:
    """The format of one linear layer. `rotation` is the block of the online Hadamard rotation."""

    weights: WeightFormat
    activations: ActivationFormat | None = None
    rotation: int | None = None

    def __str__(self) -> str:
        acts = self.activations
        name = f"W{self.weights.bits}A{acts.bits if acts else 16}"
        if acts:
            name += "-FP8" if acts.type == "float" else "-INT"
        name += f" g{self.weights.group_size}" if self.weights.group_size else " channel"
        if self.rotation:
            name += f" H{self.rotation}"
        return name + (" half-grid" if self.weights.half else "")

    @property
    def packs(self) -> bool:
        """Whether codes are packed into 32-bit words; else they are bytes, as servers' INT8 products read them."""
        weights, acts = self.weights, self.activations
        bytewise = weights.bits == 8 and weights.group_size is None and not weights.half
        return not (bytewise and acts is not None and acts.type == "int")

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Bytes on disk of a weight [rows, columns] with its scales."""
        groups = columns // self.weights.group_size if self.weights.group_size else 1
        codes = 4 * packed_words(columns, self.weights.bits) if self.packs else columns
        return rows * codes + rows * groups * 2 + (16 if self.packs else 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        acts = data.get("activations")
        return cls(
            WeightFormat(**data["weights"]),
            ActivationFormat(**acts) if acts else None,
            data.get("rotation"),
        )

    def check(self) -> None:
        """Raises ValueError where a value read from a file is none that a scheme can have."""
        weights, acts = self.weights, self.activations
        _number("bits", weights.bits, 2, 8)
        if weights.group_size is not None:
            _number("group_size", weights.group_size, 1, 1 << 20)
        if self.rotation is not None:
            _number("rotation", self.rotation, 1, 1 << 20)
        if not isinstance(weights.half, bool) or not isinstance(weights.scale, str):
            raise ValueError(f"weights {weights}")
        if acts is not None:
            _number("activation bits", acts.bits, 2, 8)
            if acts.type not in ("int", "float") or not isinstance(acts.half, bool):
                raise ValueError(f"activations {acts}")


@dataclass(frozen=True)
class KVFormat:
    """Keys and values in the cache: INT4 with a signed scale per token and KV head, no zero point.

    `scale` is the storage type of that scale, `bf16` or `fp8`; `query` is `fp8` (per token and head) or
    None (16-bit). Post-RoPE scales, where a layer has them, lie beside the model in quantkit/kv.safetensors.
    """

    bits: int = 4
    scale: str = "bf16"
    query: str | None = "fp8"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> None:
        """As `Scheme.check`."""
        _number("kv_cache.bits", self.bits, 4, 4)
        if self.scale not in ("bf16", "fp8") or self.query not in ("fp8", None):
            raise ValueError(f"kv_cache {self}")


def _number(what: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} {str(value)[:40]}, {least} to {most} is expected")
