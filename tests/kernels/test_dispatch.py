import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from quantkit.kernels.dispatch import Op
from quantkit.kernels.int4_linear import int4_linear
from quantkit.kernels.quantize_fp8 import quantize_fp8
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode


def _add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _add_one_cpu(x: torch.Tensor) -> torch.Tensor:
    return x + 1.0


def _check(x: torch.Tensor) -> None:
    if x.dim() != 1:
        raise ValueError(f"x must be [N], got {tuple(x.shape)}")


add_one = Op(
    "test_add_one", _add_one, check=_check, fake=lambda x: x.new_empty(x.shape), cpu=_add_one_cpu
)
reference_only = Op(
    "test_reference_only", _add_one, check=_check, fake=lambda x: x.new_empty(x.shape)
)


def test_picks_by_device() -> None:
    x = torch.zeros(3)
    assert add_one.backend(x) == "cpu"
    assert reference_only.backend(x) == "reference"
    assert reference_only.backend(x=x) == "reference"
    assert torch.equal(add_one(x), torch.ones(3))


@pytest.mark.parametrize("forced", ["reference", "cpu"])
def test_environment_forces(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_BACKEND", forced)
    assert add_one.backend(torch.zeros(3)) == forced
    assert torch.equal(add_one(torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize(
    ("op", "forced", "message"),
    [
        (add_one, "gpu", "QUANTKIT_BACKEND=gpu is unknown: use one of reference, cpu, triton"),
        (reference_only, "cpu", "QUANTKIT_BACKEND=cpu cannot run test_reference_only: there is no"),
        (add_one, "triton", "QUANTKIT_BACKEND=triton cannot run test_add_one: there is no"),
    ],
)
def test_environment_refuses(
    op: Op, forced: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_BACKEND", forced)
    for call in (op, op.backend):
        with pytest.raises(ValueError, match=message) as caught:
            call(torch.zeros(3))
        assert "\n" not in str(caught.value)


def test_check_runs_before_every_implementation() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        add_one(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        add_one(torch.zeros(2, 2, device="meta"))


def test_meta_tensors() -> None:
    values, scale = quantize_fp8(torch.zeros(2, 3, 8, device="meta"))
    assert values.shape == (2, 3, 8)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.shape == (2, 3, 1)


def test_registered_with_torch() -> None:
    torch.library.opcheck(torch.ops.quantkit.test_add_one.default, (torch.zeros(3),))
    assert int4_linear.name in dir(torch.ops.quantkit)


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_without_a_graph_break(grad: bool) -> None:
    compiled = torch.compile(lambda x: add_one(x) * 2, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(torch.zeros(3)), torch.full((3,), 2.0))


class _Watched(torch.Tensor):
    """A class of its own sees what is done with it."""


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


def _under(mode: AbstractContextManager[object]) -> Callable[[torch.Tensor], object]:
    def run(x: torch.Tensor) -> object:
        with mode:
            return add_one(x)

    return run


WATCHERS: dict[str, Callable[[torch.Tensor], object]] = {
    "autograd": _under(torch.enable_grad()),
    "a dispatch mode": _under(_Mode()),
    "a device": _under(torch.device("cpu")),
    "a profiler": _under(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])),
    "a class": lambda x: add_one(x.as_subclass(_Watched)),
    "a class, by name": lambda x: add_one(x=x.as_subclass(_Watched)),
    "no numbers": lambda x: add_one(x.to("meta")),
    "functorch": lambda x: torch.func.functionalize(add_one)(x),
    "a tracer": lambda x: torch.jit.trace(lambda y: add_one(y), x),
    "export": lambda x: make_fx(add_one)(x),
    "fake tensors": lambda x: add_one(FakeTensorMode().from_tensor(x)),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("watcher", [None, *WATCHERS])
def test_the_dispatcher_is_left_out_where_nobody_watches(
    watcher: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = add_one._overload, []
    monkeypatch.setattr(add_one, "_overload", lambda *a, **k: calls.append(a) or whole(*a, **k))
    if watcher is None:
        assert torch.equal(add_one(torch.zeros(3)), torch.ones(3))
    else:
        WATCHERS[watcher](torch.zeros(3))
    assert bool(calls) == (watcher is not None)


def test_overhead_is_microseconds() -> None:
    x = torch.zeros(3)

    def seconds(function: object) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(200):
                function(x)  # type: ignore[operator]
            times.append((time.perf_counter() - start) / 200)
        return min(times)

    assert seconds(add_one) - seconds(_add_one_cpu) < 50e-6
