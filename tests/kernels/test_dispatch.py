import time

import pytest
import torch
from quantkit.kernels.dispatch import Op
from quantkit.kernels.int4_linear import int4_linear
from quantkit.kernels.quantize_fp8 import quantize_fp8


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


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(lambda x: add_one(x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.zeros(3)), torch.full((3,), 2.0))


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
