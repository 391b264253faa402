"""Reading a safetensors checkpoint, headers first: nothing is trusted, nothing is loaded before it is asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from quantkit.errors import QuantkitError
from quantkit.finite import all_finite

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# safetensors' own limit on a header; larger is a corrupted or hostile file. A JSON file is no larger either.
_MAX_HEADER = 100_000_000
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from its file's header."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    offset: int  # of its first byte in the file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; QuantkitError if it is missing, not JSON or not an object."""
    try:
        if path.stat().st_size > _MAX_HEADER:
            raise QuantkitError(
                f"{path}: has {path.stat().st_size} bytes, too many for a JSON file"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuantkitError(f"{path}: cannot be read ({error.strerror})") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, not JSON, numbers of thousands of digits
        raise QuantkitError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise QuantkitError(f"{path}: holds a {type(data).__name__}, an object is expected")
    return data


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, checked against the file's size.

    Raises:
        QuantkitError: the file is truncated, its header is no JSON, or its offsets do not fit.
    """

    def broken(why: str) -> QuantkitError:
        return QuantkitError(
            f"{path}: corrupted safetensors file: {why}; copy or download it again"
        )

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise broken(f"its header claims {length} bytes, the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise QuantkitError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise broken("its header is not JSON") from None
    if not isinstance(header, dict):
        raise broken("its header is not an object")

    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            why, info = _entry(path.name, entry, 8 + length)
            if info is None:
                raise broken(f"{_shown(name)} {why}")
            tensors[name] = info
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if info.offset + info.bytes > size:
            raise broken(f"{_shown(name)} ends beyond the end of the file (truncated?)")
        if info.offset != end:
            raise broken(
                f"{_shown(name)} begins at byte {info.offset}, {end} is the end of the one before"
            )
        end = info.offset + info.bytes
    if end != size:
        raise broken(f"{size - end} bytes belong to no tensor")
    return tensors


def _entry(file: str, entry: Any, start: int) -> tuple[str, TensorInfo | None]:
    """A header's entry, or why it is none."""

    def numbers(value: list[Any]) -> bool:
        return all(type(n) is int and 0 <= n < 2**63 for n in value)

    if not isinstance(entry, dict):
        return "has a malformed entry", None
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        return f"has the unknown type {_shown(dtype)}", None
    if not isinstance(shape, list) or not isinstance(span, list) or len(span) != 2:
        return "has a malformed shape or place", None
    if not numbers(shape) or not numbers(span) or span[0] > span[1]:
        return "has a malformed shape or place", None
    if (span[1] - span[0]) * 8 != math.prod(shape) * _DTYPE_BITS[dtype]:
        return f"has {span[1] - span[0]} bytes, its shape {_shown(shape)} needs others", None
    return "", TensorInfo(file, dtype, tuple(shape), span[1] - span[0], start + span[0])


def _shown(value: Any) -> str:
    """For a message: on one line, and not long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-12:]


def _is_plain(name: str) -> bool:
    """Whether it names a file of the same folder."""
    return name.isprintable() and len(name) < 256 and Path(name).name == name and "\\" not in name


def check_links(folder: Path) -> None:
    """Refuse symbolic links that lead out of a folder: what was downloaded must not choose what is read here.

    The hub's cache is made of links, from `snapshots/<revision>/` to `blobs/` of the same repository: they may.

    Raises:
        QuantkitError: a link leads elsewhere.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    inside = (
        Path(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files)
    )
    for path in inside:
        if path.is_symlink():
            target = path.resolve()
            if not any(target.is_relative_to(place) for place in allowed):
                raise QuantkitError(
                    f"{path}: is a link out of the folder, to {os.readlink(path)}; replace it by the file itself"
                )


class Checkpoint:
    """A folder with config.json and safetensors weights, opened lazily.

    Attributes:
        path: the folder.
        config: config.json as a dictionary.
        tensors: name -> TensorInfo, from the headers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise QuantkitError(f"{path}: no such folder")
        if not (path / "config.json").is_file():
            raise QuantkitError(
                f"{path}: no config.json in it; a Hugging Face checkpoint is expected"
            )
        check_links(path)
        self.config = read_json(path / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files():
            header = read_header(path / file)
            for name in header.keys() & self.tensors.keys():
                raise QuantkitError(
                    f"{path}: tensor {_shown(name)} is in {self.tensors[name].file} and in {file}"
                )
            self.tensors.update(header)
        self._check_index()
        self._open: dict[str, Any] = {}
        self._files_open: dict[str, IO[bytes]] = {}

    def _files(self) -> list[str]:
        if (self.path / INDEX).is_file():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise QuantkitError(f"{self.path / INDEX}: has no weight_map")
            files = sorted({str(file) for file in weight_map.values()})
            for name, file in weight_map.items():
                if not isinstance(file, str):
                    raise QuantkitError(
                        f"{self.path / INDEX}: names {_shown(file)} for {_shown(name)}, a file is expected"
                    )
            for file in files:
                # A name with a folder in it could lead anywhere on this machine.
                if not _is_plain(file) or not file.endswith(".safetensors"):
                    raise QuantkitError(
                        f"{self.path / INDEX}: names {_shown(file)}; only .safetensors files of the same folder are read"
                    )
                if not (self.path / file).is_file():
                    raise QuantkitError(
                        f"{self.path}: shard {file} is missing, {INDEX} names it; download it again"
                    )
            return files
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*")):
            raise QuantkitError(
                f"{self.path}: only pickle weights (.bin, .pt), which can run code when loaded; "
                "convert them to safetensors first"
            )
        raise QuantkitError(f"{self.path}: no weights in it ({SINGLE} or {INDEX} expected)")

    def _check_index(self) -> None:
        if not (self.path / INDEX).is_file():
            return
        for name, file in read_json(self.path / INDEX)["weight_map"].items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise QuantkitError(
                    f"{self.path / INDEX}: says tensor {_shown(name)} is in {file}; it is not"
                )

    def load(self, name: str, *, finite: bool = False) -> torch.Tensor:
        """One tensor, copied out of the memory-mapped file, in its stored type.

        Raises:
            QuantkitError: there is no such tensor, it cannot be read, or (`finite`) it holds NaN or infinity.
        """
        if name not in self.tensors:
            raise QuantkitError(f"{self.path}: has no tensor {name!r}")
        file = self.tensors[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.path / file), framework="pt", device="cpu")
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise QuantkitError(
                f"{self.path / file}: tensor {name!r} cannot be read ({error})"
            ) from None
        if finite:
            self._check_finite(name, tensor)
        return tensor

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        if not all_finite(tensor):
            raise QuantkitError(
                f"{self.path / self.tensors[name].file}: tensor {name!r} holds NaN or infinity; "
                "the checkpoint is damaged"
            )

    def read(
        self, name: str, *, rows: tuple[int, int] | None = None, finite: bool = False
    ) -> torch.Tensor:
        """One tensor, or rows [first, last) of it, in memory of its own: nothing of the file stays mapped.

        Raises:
            QuantkitError: there is no such tensor, it cannot be read, or (`finite`) it holds NaN or infinity.
        """
        if name not in self.tensors:
            raise QuantkitError(f"{self.path}: has no tensor {name!r}")
        info = self.tensors[name]
        first, last, shape = 0, info.bytes, info.shape
        if rows is not None:
            row = info.bytes // info.shape[0]
            first, last, shape = rows[0] * row, rows[1] * row, (rows[1] - rows[0], *info.shape[1:])
        tensor = self._bytes(name, first, last).view(TORCH_DTYPES[info.dtype]).reshape(shape)
        if finite:
            self._check_finite(name, tensor)
        return tensor

    def gather(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a tensor [N, ...], int64 [n] -> [n, ...]; only they are read.

        Raises:
            QuantkitError: as `read`.
        """
        if name not in self.tensors:
            raise QuantkitError(f"{self.path}: has no tensor {name!r}")
        info = self.tensors[name]
        wanted, place = rows.unique(return_inverse=True)
        if not info.shape or (len(wanted) and int(wanted[-1]) >= info.shape[0]):
            raise QuantkitError(
                f"{self.path}: the tokenizer gives token {int(wanted[-1])}, {name} is {list(info.shape)}; "
                "they do not belong together"
            )
        size = info.bytes // max(info.shape[0], 1)
        table = torch.empty(len(wanted), size, dtype=torch.uint8)
        for number, row in enumerate(wanted.tolist()):
            table[number] = self._bytes(name, row * size, row * size + size)
        tensor = table.view(-1).view(TORCH_DTYPES[info.dtype]).view(-1, *info.shape[1:])
        self._check_finite(name, tensor)
        return tensor[place]

    def pieces(self, name: str, size: int = 16 << 20) -> Iterator[torch.Tensor]:
        """A tensor's elements in pieces [n] of at most `size` bytes, each read when it is asked for.

        Raises:
            QuantkitError: as `read`, with `finite`.
        """
        for raw in self.raw(name, size):
            piece = raw.view(TORCH_DTYPES[self.tensors[name].dtype])
            self._check_finite(name, piece)
            yield piece

    def raw(self, name: str, size: int = 16 << 20) -> Iterator[torch.Tensor]:
        """A tensor's bytes uint8 [n], in pieces of at most `size`."""
        end = self.tensors[name].bytes
        for first in range(0, end, size):
            yield self._bytes(name, first, min(first + size, end))

    def _bytes(self, name: str, first: int, last: int) -> torch.Tensor:
        """Bytes [first, last) of a tensor."""
        info = self.tensors[name]
        buffer = torch.empty(last - first, dtype=torch.uint8)
        view, at = memoryview(buffer.numpy().data), info.offset + first
        try:
            handle = self._handle(info.file)
            while view and (count := os.preadv(handle, [view], at)):
                view, at = view[count:], at + count
        except OSError as error:
            raise QuantkitError(
                f"{self.path / info.file}: tensor {name!r} cannot be read ({error.strerror})"
            ) from None
        if view:
            raise QuantkitError(f"{self.path / info.file}: tensor {name!r} is cut off")
        return buffer

    def _handle(self, file: str) -> int:
        if file not in self._files_open:
            self._files_open[file] = (self.path / file).open("rb", buffering=0)
        return self._files_open[file].fileno()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def files(self) -> list[str]:
        return sorted({info.file for info in self.tensors.values()})

    def close(self) -> None:
        self._open.clear()
        for file in self._files_open.values():
            file.close()
        self._files_open.clear()
