"""safetensors files that grow tensor by tensor: nothing is held in memory, and a killed run can go on.

A shard in the making has room for its header before the data; the header is written when the shard is closed.
What is in it up to the last `state()` survives whatever happens to the process: what came after is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.int64: "I64", torch.uint64: "U64", torch.float64: "F64",
}  # fmt: skip
SIZES = {name: torch.empty(0, dtype=dtype).element_size() for dtype, name in DTYPES.items()}

# Room for a header: 160 bytes a tensor, at least the first and at most the second number of bytes.
_HEADER_ROOM = (4096, 8 << 20)
# Below this many bytes a closed shard is written again without the unused room.
_COMPACT = 64 << 20
_CHUNK = 4 << 20


class Entry(dict[str, Any]):
    """A tensor of a shard: name, dtype (safetensors' name), shape, bytes, start (from the first data byte), crc (CRC-32 of
    the bytes before they went to the disk)."""


class ShardWriter:
    """Writes shards `shard-00001.safetensors`, ... into a folder; the one in the making is called `.part`.

    Args:
        folder: where; it exists.
        shard_bytes: a shard is closed, at `boundary()`, when it holds at least this much.
        tensors: about how many tensors will come, for the header's room.
        state: what `state()` gave in an earlier run.

    Raises:
        OSError: on writing.
        ValueError: the state does not fit the folder.
    """

    def __init__(
        self, folder: Path, shard_bytes: int, tensors: int, state: dict[str, Any] | None = None
    ) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._room = min(max(4096 * (-(-tensors * 160 // 4096)), _HEADER_ROOM[0]), _HEADER_ROOM[1])
        self.shards: list[list[Entry]] = []
        self._file: IO[bytes] | None = None
        self._names: set[str] = set()
        # Shards that were rewritten since the last state: until the next one, that needs what they came from.
        self._rewritten: list[int] = []
        if state:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.shards = [[Entry(entry) for entry in shard] for shard in state["shards"]]
        self._names = {entry["name"] for shard in self.shards for entry in shard}
        closed_shards = len(self.shards) - bool(state["open"])
        if not (self._folder / "output").is_dir() and not all(
            self.path(number).is_file() for number in range(1, closed_shards + 1)
        ):
            raise ValueError("a closed shard is missing")
        if not state["open"]:
            return
        number = len(self.shards)
        part, closed = self._part(number), self.path(number)
        if not part.is_file() and closed.is_file():
            # It was closed, but what came after the state is lost: open it again.
            closed.rename(part)
        end = 8 + self._room + _end(self.shards[-1])
        if not part.is_file() or part.stat().st_size < end:
            raise ValueError(f"{part.name} is missing or too short")
        closed.unlink(missing_ok=True)
        self._file = part.open("r+b")
        self._file.truncate(end)
        self._file.seek(end)

    def path(self, number: int) -> Path:
        """Of a closed shard; the first is number 1."""
        return self._folder / f"shard-{number:05d}.safetensors"

    def _part(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.part"

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a whole tensor.

        Raises:
            ValueError: there is one of that name.
        """
        with self.tensor(name, DTYPES[tensor.dtype], tuple(tensor.shape)) as pieces:
            pieces.write(tensor)

    @contextmanager
    def tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[Pieces]:
        """Append a tensor piece by piece.

        Raises:
            ValueError: there is one of that name, or the pieces are not as many bytes as it has.
        """
        if name in self._names:
            raise ValueError(f"tensor {name!r} was added twice")
        if self._file is None:
            self.shards.append([])
            self._file = self._part(len(self.shards)).open("w+b")
            self._file.seek(8 + self._room)
        shard = self.shards[-1]
        pieces = Pieces(self._file)
        yield pieces
        want = SIZES[dtype]
        for n in shape:
            want *= n
        if pieces.bytes != want:
            raise ValueError(f"tensor {name!r}: {pieces.bytes} bytes were written, it has {want}")
        shard.append(
            Entry(
                name=name,
                dtype=dtype,
                shape=list(shape),
                bytes=want,
                start=_end(shard),
                crc=pieces.crc,
            )
        )
        self._names.add(name)

    def boundary(self) -> None:
        """A shard may end here: close it if it is large enough."""
        if self._file is not None and _end(self.shards[-1]) >= self._shard_bytes:
            self.close()

    def state(self) -> dict[str, Any]:
        """What is written so far, after it has reached the disk; plain data."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"shards": self.shards, "open": self._file is not None}

    def state_is_safe(self) -> None:
        """The last `state()` has reached the disk: what only an earlier one needs is removed."""
        for number in self._rewritten:
            self._part(number).unlink(missing_ok=True)
        self._rewritten = []

    def close(self) -> None:
        """Finish the shard in the making."""
        if self._file is None:
            return
        number, shard = len(self.shards), self.shards[-1]
        header = _header(shard)
        self._file.flush()
        aligned = all(entry["start"] % SIZES[entry["dtype"]] == 0 for entry in shard)
        if not aligned or len(header) > self._room or _end(shard) < _COMPACT:
            self._rewrite(number, shard)
        else:
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._part(number).rename(self.path(number))
        self._file = None

    def _rewrite(self, number: int, shard: list[Entry]) -> None:
        """Once more, with tensors in the order that keeps each at a multiple of its element's size."""
        assert self._file is not None
        order = sorted(shard, key=lambda entry: -SIZES[entry["dtype"]])
        moved: list[Entry] = []
        for entry in order:
            moved.append(Entry(entry | {"start": _end(moved)}))
        header = _header(moved)
        header = header.ljust(-(-len(header) // 8) * 8)
        target = self.path(number).with_suffix(".new")
        with target.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for entry in order:
                self._file.seek(8 + self._room + entry["start"])
                left = entry["bytes"]
                while left:
                    block = self._file.read(min(left, _CHUNK))
                    file.write(block)
                    left -= len(block)
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        target.rename(self.path(number))
        self._rewritten.append(number)
        self.shards[-1] = moved

    def abandon(self) -> None:
        """Close the open file as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Pieces:
    """Where the pieces of a tensor go, in the order of its memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.bytes = self.crc = 0

    def write(self, piece: torch.Tensor) -> None:
        flat = piece.detach().contiguous().reshape(-1).view(torch.uint8)
        data = flat.numpy().data
        self.crc = zlib.crc32(data, self.crc)
        self._file.write(data)
        self.bytes += flat.numel()


def hash_shard(path: Path, shard: list[Entry]) -> tuple[str, list[str]]:
    """The sha256 of a closed shard, and the tensors in it whose bytes are not those that were given to be written."""
    digest, damaged = hashlib.sha256(), []
    with path.open("rb") as file:
        length = file.read(8)
        digest.update(length)
        digest.update(file.read(int.from_bytes(length, "little")))
        for entry in sorted(shard, key=lambda entry: int(entry["start"])):
            crc, left = 0, int(entry["bytes"])
            while left and (block := file.read(min(left, _CHUNK))):
                digest.update(block)
                crc, left = zlib.crc32(block, crc), left - len(block)
            if left or crc != entry["crc"]:
                damaged.append(str(entry["name"]))
    return digest.hexdigest(), damaged


def _end(shard: list[Entry]) -> int:
    return int(shard[-1]["start"] + shard[-1]["bytes"]) if shard else 0


def _header(shard: list[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for entry in shard:
        span = [entry["start"], entry["start"] + entry["bytes"]]
        header[entry["name"]] = {
            "dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": span
        }  # fmt: skip
    return json.dumps(header, separators=(",", ":")).encode()
