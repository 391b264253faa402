"""Writing an output folder so that it never looks finished before it is.

Everything goes into `DIR/.unfinished/` first; at the end the files move up one by one, config.json last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import INDEX, SINGLE, read_json

UNFINISHED = ".unfinished"
DEFAULT_SHARD_BYTES = 4 * 10**9


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into one line that says where and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full:
            raise QuantkitError(
                f"{path}: the disk is full; free space or choose another folder with -o"
            ) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise QuantkitError(f"{path}: cannot be written ({error.strerror})") from None
        raise QuantkitError(f"{path}: cannot be written ({error})") from None


def is_ours(folder: Path) -> bool:
    """Whether quantkit made this folder: a finished output, or an unfinished one."""
    if (folder / UNFINISHED).is_dir():
        return True
    if not (folder / "config.json").is_file():
        return False
    try:
        config = read_json(folder / "config.json")
    except QuantkitError:
        return False
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and "quantkit" in quantization


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file with the permissions that any new file gets: safetensors' own are the owner's alone."""
    save_file(tensors, str(path), metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


class OutputFolder:
    """An output being written. Use as a context manager: what is not finished is removed on the way out.

    Args:
        path: the folder to end up with.
        overwrite: whether a finished output of ours may be replaced.
        shard_bytes: a shard is closed when it holds at least this much.

    Raises:
        QuantkitError: the folder exists and is not ours, is ours and `overwrite` is not set, or cannot be made.
    """

    def __init__(
        self, path: Path, *, overwrite: bool = False, shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self.path = path
        self.work = path / UNFINISHED
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []
        self._check(overwrite)
        self._made = not path.exists()

    def _check(self, overwrite: bool) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise QuantkitError(f"{self.path}: exists and is a file; choose another folder with -o")
        if not any(self.path.iterdir()):
            return
        if not is_ours(self.path):
            raise QuantkitError(
                f"{self.path}: exists and was not written by quantkit; choose another folder with -o"
            )
        if (self.path / "config.json").is_file() and not overwrite:
            raise QuantkitError(
                f"{self.path}: exists already; --overwrite replaces it, -o chooses another folder"
            )

    def __enter__(self) -> OutputFolder:
        try:
            with writing(self.path):
                shutil.rmtree(self.work, ignore_errors=True)
                self.work.mkdir(parents=True)
        except BaseException:  # an interrupt too: `with` only cleans up after what it has entered
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if self._made and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into the current shard."""
        if any(name in shard for shard in self._shards) or name in self._pending:
            raise ValueError(f"tensor {name!r} was added twice")
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.numel() * tensor.element_size()

    def end_of_layer(self) -> None:
        """A layer is complete: write the shard if it is large enough, so that memory stays bounded."""
        if self._pending_bytes >= self._shard_bytes:
            self._flush()

    def _shard_path(self, number: int) -> Path:
        return self.work / f"shard-{number:05d}.safetensors"

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._shard_path(len(self._shards) + 1)
        with writing(path):
            save_tensors(self._pending, path)
        self._shards.append({n: t.numel() * t.element_size() for n, t in self._pending.items()})
        self._pending, self._pending_bytes = {}, 0

    def finish(
        self,
        side_files: dict[str, Callable[[Path], None]],
        config: Callable[[dict[str, str]], dict],
    ) -> None:
        """Name the shards, write the rest, move everything into place; config.json comes last.

        Args:
            side_files: relative path -> a function that writes it there.
            config: from {shard file: sha256} to the content of config.json.
        """
        self._flush()
        names = self._name_shards()
        for relative, write in side_files.items():
            target = self.work / relative
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                write(target)
        hashes = {name: sha256(self.work / name) for name in names}
        self._write_json("config.json", config(hashes))
        self._publish()

    def _name_shards(self) -> list[str]:
        total = len(self._shards)
        names = (
            [SINGLE] if total == 1
            else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
        )  # fmt: skip
        for number, name in enumerate(names, start=1):
            self._shard_path(number).rename(self.work / name)
        if total > 1:
            weight_map = {t: name for name, shard in zip(names, self._shards) for t in shard}
            size = sum(sum(shard.values()) for shard in self._shards)
            self._write_json(INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        return names

    def _write_json(self, relative: str, data: dict[str, Any]) -> None:
        path = self.work / relative
        with writing(path):
            path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def _publish(self) -> None:
        with writing(self.path):
            for file in self.work.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            # An older output must not look whole while its files are being replaced.
            (self.path / "config.json").unlink(missing_ok=True)
            for old in self.path.iterdir():
                if old.name != UNFINISHED:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            for file in sorted(self.work.iterdir(), key=lambda f: f.name == "config.json"):
                file.rename(self.path / file.name)
