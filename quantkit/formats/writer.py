"""Writing an output folder so that it never looks finished before it is, and so that a killed run can go on.

Everything goes into `DIR/.unfinished/` first; at the end the files move up one by one, config.json last.

    .unfinished/lock          held by the run that writes; the system lets go of it when that run dies
    .unfinished/state.json    what is safe on disk, and of which run; replaced in one step
    .unfinished/shard-*       tensors, appended as they come
    .unfinished/output/       the finished files, before they move up
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from quantkit.errors import InternalError, QuantkitError, WriteError
from quantkit.formats.checkpoint import INDEX, SINGLE, read_json
from quantkit.formats.shards import Pieces, ShardWriter, hash_shard

UNFINISHED = ".unfinished"
_STATE = "state.json"
DEFAULT_SHARD_BYTES = 4 * 10**9


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into one line that says where and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full:
            raise WriteError(
                f"{path}: the disk is full; free space or choose another folder with -o"
            ) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise WriteError(f"{path}: cannot be written ({error.strerror})") from None
        raise WriteError(f"{path}: cannot be written ({error})") from None


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


def clear_up(folder: Path) -> None:
    """Remove what a run that was killed while it cleared up left beside its finished output; of no other run anything."""
    work = folder / UNFINISHED
    if not (folder / "config.json").is_file() or not work.is_dir() or (work / _STATE).exists():
        return
    with writing(work), (work / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # somebody has just begun to replace the output
        shutil.rmtree(work)


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


def write_json(path: Path, data: Any) -> None:
    """A JSON file that is there whole or not at all, also after a loss of power.

    Raises:
        QuantkitError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, default=str)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Names made or moved in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class OutputFolder:
    """An output being written. Use as a context manager.

    On the way out, what cannot be gone on with is removed: everything, unless `save` was called and the exit is
    no `QuantkitError` but a `WriteError` (which says that the disk is full, not that the input is bad).

    Args:
        path: the folder to end up with.
        overwrite: whether a finished output of ours, or another run's unfinished one, may be replaced.
        shard_bytes: a shard is closed when it holds at least this much.
        tensors: about how many tensors will come.

    Attributes:
        file_name: what files call a tensor that `add` and `tensor` are given under the model's name.

    Raises:
        QuantkitError: the folder exists and is not ours, is ours and `overwrite` is not set, or cannot be made.
    """

    def __init__(
        self,
        path: Path,
        *,
        overwrite: bool = False,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        tensors: int = 1000,
    ) -> None:
        self.path = path
        self.work = path / UNFINISHED
        self.output = self.work / "output"
        self.file_name: Callable[[str], str] = str
        self._overwrite = overwrite
        self._shard_bytes, self._tensors = shard_bytes, tensors
        self._writer: ShardWriter | None = None
        self._run: dict[str, Any] = {}
        self._lock: IO[bytes] | None = None
        self._can_go_on = False
        self._check()
        self._made = not path.exists()

    def _check(self) -> None:
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
        if (
            (self.path / "config.json").is_file()
            and not self._overwrite
            and not self._saved().get("publishing")
        ):
            raise QuantkitError(
                f"{self.path}: exists already; --overwrite replaces it, -o chooses another folder"
            )

    def __enter__(self) -> OutputFolder:
        try:
            with writing(self.path):
                self.work.mkdir(parents=True, exist_ok=True)
                self._take_lock()
        except BaseException:  # an interrupt too: `with` only cleans up after what it has entered
            self._remove_if_empty()
            raise
        self._can_go_on = (self.work / _STATE).is_file()
        return self

    def _take_lock(self) -> None:
        lock = (self.work / "lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise QuantkitError(
                f"{self.path}: another run is writing it; wait for it, or choose another folder with -o"
            ) from None
        self._lock = lock

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if self._writer is not None:
            self._writer.abandon()
        bad_input = kind is not None and issubclass(kind, QuantkitError)
        started = self._writer is not None
        if (
            kind is None
            or not self._can_go_on
            or (bad_input and started and kind is not WriteError)
        ):
            with suppress(OSError):
                # The state first: killed in the middle, what speaks of the rest is gone.
                (self.work / _STATE).unlink(missing_ok=True)
            shutil.rmtree(self.work, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        if self._made and self.path.is_dir():
            if self._lock is None and self.work.is_dir() and not any(self.work.iterdir()):
                self.work.rmdir()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def _saved(self) -> dict[str, Any]:
        """The state of an unfinished run, or nothing."""
        try:
            return read_json(self.work / _STATE)
        except QuantkitError:
            return {}

    def begin(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """Start writing, or go on with what an earlier start of the same run left.

        Args:
            run: what the output is made of, plain data: compared with that of the unfinished run. Without it
                (or without a call of `begin`) nothing is gone on with.

        Returns:
            What `save` was last given, or None for a new start.

        Raises:
            QuantkitError: the folder holds another run's unfinished output, or what did not pass `finish`'s check, and
                `overwrite` is not set.
        """
        run = json.loads(json.dumps(run, default=str))
        self._run, saved = run, self._saved()
        if saved and run and saved.get("run") != run and not self._overwrite:
            what = difference(saved.get("run") or {}, run)
            raise QuantkitError(
                f"{self.path}: holds the unfinished output of another run ({what}); "
                "--overwrite discards it, -o chooses another folder"
            )
        same, failed = bool(run) and saved.get("run") == run, saved.get("failed")
        if same and failed and not self._overwrite:
            raise QuantkitError(failed)
        if same and not failed:
            try:
                self._writer = ShardWriter(
                    self.work, self._shard_bytes, self._tensors, saved["writer"]
                )
                kept: dict[str, Any] = saved["kept"]
                return kept
            except (ValueError, KeyError, TypeError, OSError):
                pass  # damaged by hand or by the disk: a new start gives the same output
        with writing(self.path):
            # The state first: what it speaks of is going.
            (self.work / _STATE).unlink(missing_ok=True)
            for old in self.work.iterdir():
                if old.name != "lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        self._can_go_on = False
        self._writer = ShardWriter(self.work, self._shard_bytes, self._tensors)
        return None

    def save(self, kept: dict[str, Any], **more: Any) -> None:
        """What is written so far is safe from here on, and `kept` (plain data) is what `begin` will return."""
        with writing(self.work):
            state = {"run": self._run, "writer": self._shards.state(), "kept": kept} | more
            write_json(self.work / _STATE, state)
            self._shards.state_is_safe()
        self._can_go_on = True

    @property
    def _shards(self) -> ShardWriter:
        if self._writer is None:
            self.begin({})
        assert self._writer is not None
        return self._writer

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into the current shard."""
        with writing(self.work):
            self._shards.add(self.file_name(name), tensor)

    @contextmanager
    def tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[Pieces]:
        """Put a tensor into the current shard, piece by piece; dtype is safetensors' name of it."""
        with writing(self.work), self._shards.tensor(self.file_name(name), dtype, shape) as pieces:
            yield pieces

    def end_of_layer(self) -> None:
        """A layer is complete: a shard may end here."""
        with writing(self.work):
            self._shards.boundary()

    def finish(
        self,
        side_files: dict[str, Callable[[Path], None]],
        config: Callable[[dict[str, str]], dict],
        check: Callable[[Path], None] | None = None,
    ) -> None:
        """Name the shards, write the rest, move everything into place; config.json comes last.

        Args:
            side_files: relative path -> a function that writes it there.
            config: from {shard file: sha256} to the content of config.json.
            check: called with the folder of the finished files before they move into place; what it raises
                leaves nothing that looks whole.
        """
        if self._writer is None:
            self.begin({})
        kept = self._saved().get("kept") or {}
        if self._saved().get("publishing"):
            self._publish()
            return
        with writing(self.work):
            self._shards.close()
            self.save(kept)
            self.output.mkdir(exist_ok=True)
        names = self._name_shards()
        for relative, write in side_files.items():
            target = self.output / relative
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                write(target)
        try:
            write_json(self.output / "config.json", config(self._hashes(names)))
            if check is not None:
                check(self.output)
        except InternalError as error:
            # Gone on with, the same bytes would only fail again.
            self.save(kept, failed=str(error))
            raise
        with writing(self.output):
            for file in self.output.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
                elif file.is_dir():
                    sync_folder(file)
        self.save(kept, publishing=sorted(f.name for f in self.output.iterdir()))
        self._publish()

    def _name_shards(self) -> list[str]:
        shards = self._shards.shards
        total = len(shards)
        names = (
            [SINGLE] if total == 1
            else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
        )  # fmt: skip
        with writing(self.output):
            for number, name in enumerate(names, start=1):
                if not (self.output / name).is_file():
                    self._shards.path(number).rename(self.output / name)
        if total > 1:
            weight_map = {e["name"]: name for name, shard in zip(names, shards) for e in shard}
            size = sum(e["bytes"] for shard in shards for e in shard)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(self.output / INDEX, index)
        return names

    def _hashes(self, names: list[str]) -> dict[str, str]:
        """The sha256 of each shard, whose tensors are seen to be on the disk as they were in memory."""
        hashes = {}
        for name, shard in zip(names, self._shards.shards):
            hashes[name], damaged = hash_shard(self.output / name, shard)
            if damaged:
                raise InternalError(
                    f"{self.path}: {damaged[0]} is on the disk in other bytes than were written, look after the disk and the "
                    "memory of this machine; quantize --overwrite makes it anew"
                )
        return hashes

    def _publish(self) -> None:
        """Move the finished files up; killed in the middle, the next start goes on with it."""
        names: list[str] = self._saved()["publishing"]
        with writing(self.path):
            if (self.output / "config.json").is_file():
                # An older output must not look whole while its files are being replaced.
                (self.path / "config.json").unlink(missing_ok=True)
                sync_folder(self.path)
                moved = {name for name in names if not (self.output / name).exists()}
                for old in self.path.iterdir():
                    if old.name != UNFINISHED and old.name not in moved:
                        shutil.rmtree(old) if old.is_dir() else old.unlink()
                for name in sorted(names, key=lambda n: n == "config.json"):
                    if (self.output / name).exists():
                        if name == "config.json":
                            sync_folder(self.path)
                        (self.output / name).rename(self.path / name)
                sync_folder(self.path)


def difference(old: Any, new: Any, where: str = "") -> str:
    """The first thing in which two runs differ, as `recipe.weights.bits: 4 there, 8 here`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            if old.get(key) != new.get(key):
                return difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    return f"{where or 'run'}: {_short(old)} there, {_short(new)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-18:]
