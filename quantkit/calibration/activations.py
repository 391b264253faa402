"""Where the activations between layers live: in memory, or in mapped files where they do not fit; and their copies
on disk that a killed run goes on from."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import torch

_CHUNK = 64 << 20


class Activations:
    """Tensors float32 [samples, seqlen, width] of one run.

    Args:
        folder: for the files.
        offload: keep them in mapped files: pages that memory has no room for go to the disk.
        suffix: tells the files of several processes apart.
    """

    def __init__(self, folder: Path, *, offload: bool = False, suffix: str = "") -> None:
        self._folder = folder
        self.offload = offload
        self._suffix = suffix
        self._maps: list[mmap.mmap] = []

    def empty(self, *shape: int) -> torch.Tensor:
        """A tensor to be written to.

        Raises:
            OSError: the disk has no room for it.
        """
        if not self.offload or not math.prod(shape):
            return torch.empty(shape)
        path = self._folder / f"offload-{len(self._maps)}{self._suffix}.bin"
        size = math.prod(shape) * 4
        with path.open("w+b") as file:
            # Now, and not by a signal in the middle of the work, is when a full disk shows.
            os.posix_fallocate(file.fileno(), 0, size)
            self._maps.append(mmap.mmap(file.fileno(), size))
        path.unlink()  # it lives as long as the map does, and a killed run leaves none
        return torch.frombuffer(self._maps[-1], dtype=torch.float32).view(shape)

    def release(self) -> None:
        """Let go of the mapped pages: their contents stay in the files."""
        for each in self._maps:
            each.madvise(mmap.MADV_DONTNEED)

    def save(self, name: str, tensor: torch.Tensor) -> None:
        """A copy on disk, whole or not there at all.

        Raises:
            OSError: it cannot be written.
        """
        path = self._path(name)
        temporary = path.with_suffix(".new")
        data = memoryview(tensor.detach().contiguous().view(-1).numpy().data).cast("B")
        with temporary.open("wb", buffering=0) as file:
            for first in range(0, len(data), _CHUNK):
                piece = data[first : first + _CHUNK]
                while piece:
                    piece = piece[file.write(piece) :]
                self.release()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, name: str, *shape: int) -> torch.Tensor:
        """What `save` kept, as a tensor of this shape to be written to.

        Raises:
            OSError: it is not there, or not of this size.
        """
        tensor = self.empty(*shape)
        data = memoryview(tensor.view(-1).numpy().data).cast("B")
        if self._path(name).stat().st_size != len(data):
            raise OSError(f"{self._path(name)}: has another size")
        with self._path(name).open("rb", buffering=0) as file:
            while data and (count := file.readinto(data[:_CHUNK])):
                data = data[count:]
                self.release()
        return tensor

    def keep_only(self, names: set[str]) -> None:
        """Remove the copies of other names that this process made."""
        keep = {self._path(name) for name in names}
        for path in self._folder.glob(f"activations-*{self._suffix}.bin"):
            if path not in keep:
                path.unlink()

    def _path(self, name: str) -> Path:
        return self._folder / f"activations-{name}{self._suffix}.bin"
