"""Several processes on one run, as torchrun and `accelerate launch` start them: who does what, and what is added up.

Each process has a part of the calibration samples, loads every layer, and solves a part of its linears; the first
one alone writes and speaks. `ALONE` is a process without others: all that it is asked to share comes back as it was.

Between processes go tensors and JSON. Tensors on a CUDA device go by nccl, all else by gloo, which notices at once when a
process at the other end is gone; so before tensors go by nccl, gloo is asked whether all are there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from quantkit import memory
from quantkit.errors import InternalError, QuantkitError, WriteError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
# What a shared piece of work gives: tensors, and plain data.
Found = tuple[tuple["torch.Tensor", ...], Any]

# The longest that a process waits for another which is alive: the first may verify a large output meanwhile.
_PATIENCE = timedelta(hours=6)
# Seconds in which the processes of a failed run let go of what they hold, before the first of them is gone.
_LEAVING = timedelta(seconds=8)
_PIECE_BYTES = 64 << 20
_FAILED, _LEFT = "quantkit/failed", "quantkit/left"
# The narrower first.
_ERRORS = {e.__name__: e for e in (WriteError, QuantkitError, InternalError, KeyboardInterrupt)}


class Ranks:
    """The processes of a run; this class is one process alone.

    Attributes:
        rank: this process's number.
        size: how many there are.
        on_this_machine: how many of them share this machine's memory.
    """

    rank = 0
    size = 1
    on_this_machine = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def device(self, named: torch.device) -> torch.device:
        """Where this process computes, of the device that a user named."""
        return named

    @contextmanager
    def leader_works(self) -> Iterator[None]:
        """The others only wait: the first process takes all of its machine's cores."""
        yield

    def span(self, count: int) -> tuple[int, int]:
        """First and last (exclusive) of `count` things in a row that are this process's."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def total(self, tensor: torch.Tensor) -> None:
        """The sum over all processes, in place."""

    def largest(self, tensor: torch.Tensor) -> None:
        """The elementwise maximum over all processes, in place."""

    def joined(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows [n, ...] of all processes, one process's behind the other's."""
        return tensor

    def everyones(self, data: Any) -> list[Any]:
        """Plain data of each process."""
        return [data]

    def leaders(self, data: Any) -> Any:
        """Plain data of the first process."""
        return data

    def leaders_tensor(self, tensor: torch.Tensor) -> None:
        """The first process's values, in place."""

    def share_out(
        self, items: Sequence[Item], costs: Sequence[float], work: Callable[[Item], Found]
    ) -> Iterator[tuple[Item, Found]]:
        """Each item with what `work` gives for it; every item is worked on by one process, and all get the result."""
        for item in items:
            yield item, work(item)

    def collect(self, tensor: torch.Tensor, write: Callable[[torch.Tensor], None]) -> None:
        """The first process's `write` gets the rows [n, ...] of all, in pieces and in order."""
        write(tensor)

    def hand_out(self, tensor: torch.Tensor, read: Callable[[torch.Tensor], None]) -> None:
        """The other way round: the first process's `read` fills pieces, which become the rows [n, ...] of each."""
        read(tensor)


ALONE = Ranks()


@contextmanager
def joined(
    device: str = "cpu", say: Callable[[BaseException], int] | None = None
) -> Iterator[Ranks]:
    """The processes that this one was started with, `ALONE` without any; left in good order, also by exceptions.

    When one process fails, all end: the first to fail says why, the others end in silence.

    Args:
        device: as a user names it; it decides what tensors travel by.
        say: tells the user of an exception, and gives the exit code that goes with it; without it the first to fail
            raises its own.

    Raises:
        QuantkitError: the processes do not reach each other.
        SystemExit: this process or another has failed, and it has been said why.
    """
    # Schedulers of clusters set RANK and WORLD_SIZE for machines too: LOCAL_RANK is the launchers' own.
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE
        return
    ranks = _Group(device)
    try:
        yield ranks
    except BaseException as error:
        code = ranks.fail(error, say)
        if code is None:
            raise
        raise SystemExit(code) from error
    ranks.leave()


def speaks() -> bool:
    """Whether this process prints what all processes that were started together would print alike."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


class _Group(Ranks):
    """Two processes or more."""

    def __init__(self, device: str) -> None:
        import torch
        import torch.distributed as dist

        # Imported when the group is there, its functions' defaults keep the group alive after its end: gloo's threads
        # then run into the interpreter's end, which aborts the process now and then.
        import torch.distributed.nn.functional

        self._dist = dist
        self.on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._local = int(os.environ["LOCAL_RANK"])
        self._where = torch.device("cpu")
        # torchrun gives each process one thread where the user has not said otherwise.
        self._threads = max(1, memory.threads() // self.on_this_machine)
        torch.set_num_threads(self._threads)
        cuda = device.startswith("cuda") and torch.cuda.is_available()
        try:
            store, self.rank, self.size = next(dist.rendezvous("env://"))  # type: ignore[no-untyped-call]
            self._store = dist.PrefixStore("quantkit", store)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=_PATIENCE,
            )
        except (RuntimeError, ValueError) as error:
            raise QuantkitError(
                f"the processes of this run do not reach each other ({str(error).splitlines()[0][:160]}); "
                "start them with torchrun, and name the network in GLOO_SOCKET_IFNAME"
            ) from None

    def device(self, named: torch.device) -> torch.device:
        import torch

        if named.type != "cuda":
            return named
        if self._local >= torch.cuda.device_count():
            raise QuantkitError(
                f"{self.on_this_machine} processes on a machine with {torch.cuda.device_count()} CUDA devices; "
                "start one for each"
            )
        torch.cuda.set_device(self._local)
        self._where = torch.device("cuda", self._local)
        return self._where

    @contextmanager
    def leader_works(self) -> Iterator[None]:
        import torch

        torch.set_num_threads(memory.threads())
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)

    def total(self, tensor: torch.Tensor) -> None:
        self._call(self._dist.all_reduce, tensor)

    def largest(self, tensor: torch.Tensor) -> None:
        self._call(self._dist.all_reduce, tensor, op=self._dist.ReduceOp.MAX)

    def leaders_tensor(self, tensor: torch.Tensor) -> None:
        self._call(self._dist.broadcast, tensor, src=0)

    def joined(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        parts = []
        for rank, rows in enumerate(self._counts(tensor.shape[0])):
            part = (
                tensor.contiguous()
                if rank == self.rank
                else tensor.new_empty(rows, *tensor.shape[1:])
            )
            self._call(self._dist.broadcast, part, src=rank)
            parts.append(part)
        return torch.cat(parts)

    def everyones(self, data: Any) -> list[Any]:
        mine = _encode(data)
        whole, found, first = self.joined(mine), [], 0
        for length in self._counts(len(mine)):
            found.append(_decode(whole[first : first + length]))
            first += length
        return found

    def leaders(self, data: Any) -> Any:
        import torch

        mine = _encode(data) if self.leads else torch.empty(0, dtype=torch.uint8)
        return _decode(self.joined(mine))

    def share_out(
        self, items: Sequence[Item], costs: Sequence[float], work: Callable[[Item], Found]
    ) -> Iterator[tuple[Item, Found]]:
        owners = share(costs, self.size)
        mine = {n: work(item) for n, item in enumerate(items) if owners[n] == self.rank}
        forms = [[n, [_form(t) for t in tensors], data] for n, (tensors, data) in mine.items()]
        known = {n: (form, data) for each in self.everyones(forms) for n, form, data in each}
        for n, item in enumerate(items):
            form, data = known[n]
            tensors = (
                mine.pop(n)[0]
                if n in mine
                else tuple(_empty(dtype, shape, self._where) for dtype, shape in form)
            )
            tensors = tuple(tensor.contiguous() for tensor in tensors)
            for tensor in tensors:
                self._call(self._dist.broadcast, tensor, src=owners[n])
            yield item, (tensors, data)

    def collect(self, tensor: torch.Tensor, write: Callable[[torch.Tensor], None]) -> None:
        counts = self._counts(tensor.shape[0])
        if not self.leads:
            for piece in _pieces(tensor):
                self._call(self._dist.send, piece.contiguous(), dst=0)
            return
        write(tensor)
        for rank in range(1, self.size):
            for rows in _piece_rows(tensor, counts[rank]):
                piece = tensor.new_empty(rows, *tensor.shape[1:])
                self._call(self._dist.recv, piece, src=rank)
                write(piece)

    def hand_out(self, tensor: torch.Tensor, read: Callable[[torch.Tensor], None]) -> None:
        counts = self._counts(tensor.shape[0])
        if not self.leads:
            for piece in _pieces(tensor):
                self._call(self._dist.recv, piece, src=0)
            return
        read(tensor)
        for rank in range(1, self.size):
            for rows in _piece_rows(tensor, counts[rank]):
                piece = tensor.new_empty(rows, *tensor.shape[1:])
                read(piece)
                self._call(self._dist.send, piece, dst=rank)

    def leave(self) -> None:
        with suppress(RuntimeError):
            self._dist.destroy_process_group()

    def fail(self, error: BaseException, say: Callable[[BaseException], int] | None) -> int | None:
        """End this process's part, when the others have noticed or time is up; the exit code, None where `error` has to
        be raised to be seen."""
        kind = next((name for name, e in _ERRORS.items() if isinstance(error, e)), "InternalError")
        word = json.dumps([self.rank, kind, str(error)])
        code: int | None = {"QuantkitError": 2, "WriteError": 2, "KeyboardInterrupt": 130}.get(
            kind, 1
        )
        if self._store.compare_set(_FAILED, "", word).decode() == word:
            # Before the others notice: once one of them is gone, the launcher ends this one too.
            code = say(error) if say else None
        self.leave()  # the others' calls fail from here on
        with suppress(RuntimeError):
            if self._store.add(_LEFT, 1) == self.size:
                self._store.set(_LEFT + "/all", "")
            # Whoever ends first is noticed by the launcher, which ends the others wherever they are.
            self._store.wait([_LEFT + "/all"], _LEAVING)
        return code

    def _counts(self, count: int) -> list[int]:
        """A number of each process."""
        import torch

        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = count
        self._call(self._dist.all_reduce, counts)
        return [int(n) for n in counts]

    def _call(self, function: Callable[..., Any], tensor: torch.Tensor, **arguments: Any) -> None:
        try:
            if tensor.device.type == "cuda":
                self._dist.all_reduce(tensor.new_zeros(1, device="cpu"))
            function(tensor, **arguments)
        except RuntimeError as error:
            raise self._why() from error

    def _why(self) -> BaseException:
        """What ended the other process, in its own words if it left any."""
        with suppress(RuntimeError):
            self._store.wait([_FAILED], timedelta(seconds=2))
            _, kind, message = json.loads(self._store.get(_FAILED))
            return _ERRORS[kind](message)
        return InternalError(
            "another process of this run was lost (killed, or out of memory); started again, quantize goes on"
        )


def _form(tensor: torch.Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _empty(dtype: str, shape: list[int], device: torch.device) -> torch.Tensor:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)


def share(costs: Sequence[float], processes: int) -> list[int]:
    """A process for each piece of work: the costliest first, each to the one that has least to do."""
    owners, loads = [0] * len(costs), [0.0] * processes
    for n in sorted(range(len(costs)), key=lambda n: -costs[n]):
        owners[n] = loads.index(min(loads))
        loads[owners[n]] += costs[n]
    return owners


def _piece_rows(like: torch.Tensor, rows: int) -> list[int]:
    """`rows` cut into numbers of rows that are sent at a time."""
    bytes_of_one = max(1, like[0:1].numel() * like.element_size())
    step = max(1, _PIECE_BYTES // bytes_of_one)
    return [min(step, rows - first) for first in range(0, rows, step)]


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from tensor.split(_piece_rows(tensor, tensor.shape[0])) if tensor.shape[0] else ()


def _encode(data: Any) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(json.dumps(data, default=str).encode()), dtype=torch.uint8)


def _decode(tensor: torch.Tensor) -> Any:
    return json.loads(tensor.numpy().tobytes())
