"""One op, up to three implementations with one signature and one meaning.

`reference` is plain torch and defines the op, `cpu` uses torch's native CPU ops, `triton` is a
kernel for NVIDIA GPUs. Each op is registered as `torch.ops.quantkit.<name>` with a fake
implementation, so that torch.compile and CUDA graphs treat it as one opaque node.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.library import infer_schema

BACKENDS = ("reference", "cpu", "triton")
ENV = "QUANTKIT_BACKEND"

_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")


def interpreting() -> bool:
    """Whether Triton's interpreter is on, so that Triton kernels take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(device: torch.device) -> bool:
    """Whether ops on this device run Triton where they can: on a GPU, or forced to in the interpreter."""
    return device.type == "cuda" or (interpreting() and os.environ.get(ENV) == "triton")


class Op:
    """A callable op that picks its implementation by device and shape at every call.

    Args:
        name: the op is `torch.ops.quantkit.<name>`.
        reference: defines the op and, by its annotations, the schema.
        check: raises ValueError on bad shapes or dtypes; runs before every implementation.
        fake: the outputs' shapes and dtypes; called after `check`.
        cpu: may be `reference` itself, where plain torch already is the native way.
        triton: None until there is a tested kernel.
        triton_supports: whether the kernel takes these arguments (default: always).
        mutates: the arguments that are written to.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        check: Callable[..., None],
        fake: Callable[..., Any],
        cpu: Callable[..., Any] | None = None,
        triton: Callable[..., Any] | None = None,
        triton_supports: Callable[..., bool] | None = None,
        mutates: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.reference = reference
        self.implementations = {"reference": reference, "cpu": cpu, "triton": triton}
        self._check = check
        self._fake = fake
        self._triton_supports = triton_supports
        _LIBRARY.define(name + infer_schema(reference, mutates_args=mutates))
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"quantkit::{name}", self._run_fake, lib=_LIBRARY)
        self._overload = getattr(torch.ops.quantkit, name).default
        self.__doc__ = reference.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._overload(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Op({self.name})"

    def backend(self, *args: Any, **kwargs: Any) -> str:
        """Which implementation would run for these arguments: one of `BACKENDS`.

        Raises:
            ValueError: `QUANTKIT_BACKEND` names none, or one that cannot take these arguments.
        """
        forced = os.environ.get(ENV)
        if forced:
            self._require(forced, args, kwargs)
            return forced
        device = _device(args, kwargs)
        choice = "triton" if device == "cuda" else device
        return choice if self._why_not(choice, device, args, kwargs) is None else "reference"

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self._check(*args, **kwargs)
        implementation = self.implementations[self.backend(*args, **kwargs)]
        assert implementation is not None  # `backend` names only those that are there
        return implementation(*args, **kwargs)

    def _run_fake(self, *args: Any, **kwargs: Any) -> Any:
        self._check(*args, **kwargs)
        return self._fake(*args, **kwargs)

    def _require(self, forced: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if forced not in BACKENDS:
            raise ValueError(f"{ENV}={forced} is unknown: use one of {', '.join(BACKENDS)}")
        reason = self._why_not(forced, _device(args, kwargs), args, kwargs)
        if reason is not None:
            raise ValueError(f"{ENV}={forced} cannot run {self.name}: {reason}")

    def _why_not(
        self, backend: str, device: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """Why `backend` cannot run this call, or None if it can."""
        if self.implementations.get(backend) is None:
            return "there is no such implementation"
        if backend == "cpu" and device != "cpu":
            return f"the tensors are on {device}"
        if backend == "triton":
            if device != "cuda" and not (device == "cpu" and interpreting()):
                return f"the tensors are on {device}"
            if self._triton_supports is not None and not self._triton_supports(*args, **kwargs):
                return "the kernel does not support these shapes or dtypes"
        return None


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device.type
    raise ValueError("an op needs at least one tensor")
