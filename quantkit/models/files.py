"""A checkpoint under the names of the model.

Files and transformers' modules name some tensors differently: a prefix is there or not, `embed_out` is `lm_head`,
`block_sparse_moe` is `mlp`, the experts of a layer lie in one tensor. Whoever reads a checkpoint sees the names of
the model as `build_skeleton` makes it; whoever writes one uses `file_name`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import TORCH_DTYPES, Checkpoint, TensorInfo
from quantkit.formats.config import QuantizationInfo
from quantkit.models.experts import LinearExperts, Stack

_STACKED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class _Slice:
    """A matrix of one expert within a tensor of all: `gate`, `up` or `down`."""

    tensor: TensorInfo
    expert: int
    matrix: str


class ModelCheckpoint(Checkpoint):
    """A checkpoint whose tensors have the names that the model gives them.

    Args:
        source: the checkpoint as its files name things.
        skeleton: the model, from `build_skeleton`.
    """

    def __init__(self, source: Checkpoint, skeleton: Any) -> None:
        self.__dict__.update(source.__dict__)
        self._to_file: dict[str, str] = {}
        self._slices: dict[str, _Slice] = {}
        experts: dict[str, LinearExperts] = {
            name: m for name, m in skeleton.named_modules() if isinstance(m, LinearExperts)
        }
        # Not the modules: a layer's weights live as long as anything holds them.
        self._stacks = {name: module.stack for name, module in experts.items()}
        # (stack and number, matrix) of the expert that was read last.
        self._last: tuple[tuple[int, int], torch.Tensor] | None = None
        naming = _Naming(skeleton, set(experts))
        self.tensors = {}
        for name, info in source.tensors.items():
            ours = naming.in_model(name)
            module, _, kind = ours.rpartition(".")
            if module in experts and kind in _STACKED and len(info.shape) == 3:
                self._unstack(module, experts[module], kind, info, name.rpartition(".")[0])
                continue
            self.tensors[ours] = info
            self._to_file[module] = name.rpartition(".")[0]
        if self._slices:
            # transformers' own names; servers know those of the original files.
            self._to_file = {name: naming.in_files(name) for name in self._to_file}
        self._to_model = {file: module for module, file in self._to_file.items()}

    def _unstack(
        self, module: str, experts: LinearExperts, kind: str, info: TensorInfo, file: str
    ) -> None:
        gate, up, down = experts.names
        parts = {gate: "gate", up: "up"} if kind == "gate_up_proj" else {down: "down"}
        for number in range(experts.num_experts):
            for linear, matrix in parts.items():
                name = f"{module}.{number}.{linear}"
                layer: Any = experts.expert(number)
                shape = tuple(layer._modules[linear].weight.shape)
                size = info.bytes // experts.num_experts // len(parts)
                self.tensors[f"{name}.weight"] = TensorInfo(
                    info.file, info.dtype, shape, size, info.offset
                )
                self._slices[f"{name}.weight"] = _Slice(info, number, matrix)
                self._to_file[name] = f"{file}.{number}.{linear}"

    def file_name(self, name: str) -> str:
        """What a tensor of this name in the model is called in files."""
        module, _, kind = name.rpartition(".")
        return f"{self.file_module(module)}.{kind}" if module else kind

    def file_module(self, module: str) -> str:
        return self._to_file.get(module, module)

    def model_module(self, module: str) -> str:
        """The model's name of a module that files call so."""
        return self._to_model.get(module, module)

    def read(
        self, name: str, *, rows: tuple[int, int] | None = None, finite: bool = False
    ) -> torch.Tensor:
        if name not in self._slices:
            return super().read(name, rows=rows, finite=finite)
        matrix = self._expert_rows(name, rows or (0, self.tensors[name].shape[0]))
        if finite:
            self._check_finite(name, matrix)
        return matrix.contiguous()

    def _expert_rows(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """Rows of one expert's matrix; no more is read than they, where they lie as rows."""
        part = self._slices[name]
        stack = self._stack(name)
        form = part.tensor.shape[1:]
        row = part.tensor.bytes // part.tensor.shape[0] // form[0]
        first = part.expert * form[0]

        def stored(here: slice) -> torch.Tensor:
            raw = self._bytes(name, (first + here.start) * row, (first + here.stop) * row)
            return raw.view(TORCH_DTYPES[part.tensor.dtype]).reshape(-1, form[1])

        if (place := stack.stored_rows(part.matrix, rows, form[0])) is not None:
            return stored(slice(place.start, place.stop))[:: place.step]
        # They lie across: the whole expert is read, once for all who ask for its rows one after the other.
        key = (id(part.tensor), part.expert)
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next one takes as much
            self._last = (key, stored(slice(0, form[0])))
        return stack.matrix(self._last[1], part.matrix)[rows[0] : rows[1]]

    def _stack(self, name: str) -> Stack:
        """How the module keeps its experts that a slice is of."""
        return self._stacks[name.rpartition(".")[0].rsplit(".", 2)[0]]

    @property
    def kept_bytes(self) -> int:
        """The most that reading keeps in memory: an expert whose rows lie across."""
        return max(
            (
                part.tensor.bytes // part.tensor.shape[0]
                for name, part in self._slices.items()
                if self._stack(name).transposed
            ),
            default=0,
        )

    def load(self, name: str, *, finite: bool = False) -> torch.Tensor:
        return self.read(name, finite=finite)

    def raw(self, name: str, size: int = 16 << 20) -> Iterator[torch.Tensor]:
        if name not in self._slices:
            yield from super().raw(name, size)
            return
        count = self.tensors[name].shape[0]
        step = max(1, size * count // max(self.tensors[name].bytes, 1))
        for first in range(0, count, step):
            rows = (first, min(first + step, count))
            yield self.read(name, rows=rows).reshape(-1).view(torch.uint8)

    def close(self) -> None:
        self._last = None
        super().close()


def check_complete(model: Any, checkpoint: Checkpoint) -> None:
    """Every parameter and stored buffer of a model has its tensor in the file, in its shape; from headers alone.

    Raises:
        QuantkitError: one is missing, or of another shape.
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for name, empty in model.state_dict(keep_vars=True).items():
        found = checkpoint.tensors.get(name)
        if found is None and name not in tied:
            raise QuantkitError(
                f"{checkpoint.path}: tensor {name!r} is missing; the checkpoint is not complete"
            )
        if found is not None and found.shape != tuple(empty.shape):
            raise QuantkitError(
                f"{checkpoint.path}: tensor {name!r} is {list(found.shape)}, config.json implies {list(empty.shape)}"
            )


class _Naming:
    """File's name of a tensor -> the model's."""

    def __init__(self, skeleton: Any, experts: set[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self._modules = {
            name for name, module in skeleton.named_modules()
            if module._parameters or module._buffers or name in experts
        }  # fmt: skip
        self._prefix = f"{skeleton.base_model_prefix}."
        self._renamings = [
            t for t in get_model_conversion_mapping(skeleton, add_legacy=False)
            if not isinstance(t, WeightConverter)
        ]  # fmt: skip

    def in_files(self, module: str) -> str:
        """What the original files of such a model call a module."""
        for renaming in reversed(self._renamings):
            module = (
                renaming.reverse_transform().rename_source_key(f"{module}.")[0].removesuffix(".")
            )
        return module

    def in_model(self, name: str) -> str:
        """The model's name; the file's own if the model has no module for it."""
        renamed = name
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for candidate in (name, renamed):
            for variant in (
                candidate,
                self._prefix + candidate,
                candidate.removeprefix(self._prefix),
            ):
                if variant.rpartition(".")[0] in self._modules:
                    return variant
        return name


def in_model_names(info: QuantizationInfo, checkpoint: ModelCheckpoint) -> QuantizationInfo:
    """What config.json says, with its modules under the model's names."""
    return replace(info, schemes={checkpoint.model_module(n): s for n, s in info.schemes.items()})
