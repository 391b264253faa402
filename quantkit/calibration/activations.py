"""Where the activations between layers live: in memory, or in mapped files where they do not fit; and their copies
on disk that a killed run goes on from."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import torch

from quantkit.ranks import ALONE, Ranks

_CHUNK = 64 << 20


class Activations:
    """Tensors float32 [samples, seqlen, width] of one run; of several processes each has some of the samples.

    Args:
        folder: for the files.
        offload: keep them in mapped files: pages that memory has no room for go to the disk.
    """

    def __init__(self, folder: Path, *, offload: bool = False, ranks: Ranks = ALONE) -> None:
        self._folder = folder
        self.offload = offload
        self._ranks = ranks
        self._maps: list[mmap.mmap] = []

    def empty(self, *shape: int) -> torch.Tensor:
        """A tensor to be written to.

        Raises:
            OSError: the disk has no room for it.
        """
        if not self.offload or not math.prod(shape):
            return torch.empty(shape)
        path = self._folder / f"offload-{self._ranks.rank}-{len(self._maps)}.bin"
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
        """A copy on disk of all processes' samples, whole or not there at all; the first process writes it.

        Raises:
            OSError: it cannot be written.
        """
        if not self._ranks.leads:
            self._ranks.collect(tensor, self._refuse)
            return
        path = self._path(name)
        temporary = path.with_suffix(".new")
        with temporary.open("wb", buffering=0) as file:

            def write(samples: torch.Tensor) -> None:
                data = _bytes(samples.detach().contiguous())
                for first in range(0, len(data), _CHUNK):
                    piece = data[first : first + _CHUNK]
                    while piece:
                        piece = piece[file.write(piece) :]
                    self.release()

            self._ranks.collect(tensor, write)
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, name: str, *shape: int) -> torch.Tensor:
        """This process's samples of what `save` kept, as a tensor of this shape to be written to.

        Raises:
            OSError: it is not there, or not of this size.
        """
        tensor = self.empty(*shape)
        samples = sum(self._ranks.everyones(shape[0]))
        if not self._ranks.leads:
            self._ranks.hand_out(tensor, self._refuse)
            return tensor
        path = self._path(name)
        if path.stat().st_size != samples * math.prod(shape[1:]) * tensor.element_size():
            raise OSError(f"{path}: has another size")
        with path.open("rb", buffering=0) as file:

            def read(samples: torch.Tensor) -> None:
                data = _bytes(samples)
                while data and (count := file.readinto(data[:_CHUNK])):
                    data = data[count:]
                    self.release()

            self._ranks.hand_out(tensor, read)
        return tensor

    def keep_only(self, names: set[str]) -> None:
        """Remove the copies of other names."""
        keep = {self._path(name) for name in names}
        for path in self._folder.glob("activations-*.bin"):
            if self._ranks.leads and path not in keep:
                path.unlink()

    def _path(self, name: str) -> Path:
        return self._folder / f"activations-{name}.bin"

    @staticmethod
    def _refuse(_: torch.Tensor) -> None:
        raise AssertionError("only the first process reads and writes")


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(-1).numpy().data).cast("B")
