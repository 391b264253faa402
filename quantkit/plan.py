"""What a quantization would do, from headers alone: schemes, bytes, memory, who can serve the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.estimate import Estimate, estimate
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.scheme import Scheme
from quantkit.memory import no_collection
from quantkit.models.files import ModelCheckpoint, check_complete
from quantkit.models.names import find_model
from quantkit.models.rotating import ResidualBasis, check_values, residual_basis
from quantkit.models.sizes import check_sizes
from quantkit.models.structure import Structure, build_skeleton, find_structure, load_config
from quantkit.recipe import Recipe
from quantkit.servers import who_serves


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before anything is loaded.

    Attributes:
        schemes: module -> scheme.
        unquantized_linears: linears that stay as they are, also those that transformers does not build.
        linear_bytes: bytes of the quantized linears' weights, before and after.
        total_bytes: bytes of the whole checkpoint, before and after.
        estimate: memory, disk and time.
        servers: server -> what it does with the result.
        whole: tensor-parallel size -> what would be cut, or nothing if groups and heads stay whole.
        notes: transforms of the recipe that this structure cannot take, and why.
        sizes: calibration blocks, and the tokens of each.
        basis: what the residual stream is turned into, or None.
    """

    checkpoint: ModelCheckpoint
    skeleton: Any
    structure: Structure
    recipe: Recipe
    schemes: dict[str, Scheme]
    unquantized_linears: list[str]
    linear_bytes: tuple[int, int]
    total_bytes: tuple[int, int]
    estimate: Estimate
    servers: dict[str, str]
    whole: dict[int, str]
    notes: list[str]
    sizes: tuple[int, int]
    basis: ResidualBasis | None = None

    @property
    def tensor_parallel(self) -> dict[int, bool]:
        """Size -> whether every rank gets whole groups and heads."""
        return {parts: not why for parts, why in self.whole.items()}

    def smaller(self, room: int) -> str:
        """The settings with which a process would get by on so many bytes, or what else helps."""
        recipe, settings = self.recipe, ""
        nearest = recipe.weights and recipe.weights.model_copy(update={"rounding": "nearest"})
        for setting, change in (
            ("refine=null", {"refine": None}),
            ("weights.rounding=nearest", {"weights": nearest}),
        ):
            changed = recipe.model_copy(update=change)
            if changed != recipe:
                recipe, settings = changed, f"{settings}--set {setting} "
                need = self._estimate(recipe)
                if need.host_bytes - need.activation_bytes <= room:
                    return f"{settings}needs {need.host_bytes / 1e9:.2f} GB"
        return "close other programs, or use a machine with more"

    def _estimate(self, recipe: Recipe) -> Estimate:
        return estimate(
            self.checkpoint, self.structure, recipe, self.schemes, self.total_bytes[1], *self.sizes
        )

    def module_bytes(self) -> dict[str, dict[str, Any]]:
        """Module -> its scheme, and the bytes of its weight before and after."""
        found = {}
        for name, scheme in self.schemes.items():
            info = self.checkpoint.tensors[f"{name}.weight"]
            found[name] = {
                "scheme": str(scheme), "before": info.bytes, "after": scheme.packed_bytes(*info.shape)
            }  # fmt: skip
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "architecture": self.structure.architecture,
            "recipe": self.recipe.name,
            "modules": {name: str(scheme) for name, scheme in self.schemes.items()},
            "kept": self.unquantized_linears,
            "linear_bytes": dict(zip(("before", "after"), self.linear_bytes)),
            "total_bytes": dict(zip(("before", "after"), self.total_bytes)),
            "module_bytes": self.module_bytes(),
            "estimate": self.estimate.to_dict(),
            "servers": self.servers,
            "tensor_parallel": self.tensor_parallel,
            "notes": self.notes,
            "tensor_parallel_cuts": {n: why for n, why in self.whole.items() if why},
        }


@no_collection()
def make_plan(
    model: str,
    recipe: Recipe,
    *,
    samples: int | None = None,
    seqlen: int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Read a model's headers and decide what happens to each module.

    Args:
        trust_remote_code: run Python code that comes with the checkpoint, where its model type needs it.

    Raises:
        QuantkitError: the model or the recipe is bad, or they do not fit each other.
    """
    source = Checkpoint(find_model(model))
    if "quantization_config" in source.config:
        raise QuantkitError(f"{model}: is quantized already; quantize the original checkpoint")
    from quantkit.runtime.attention import NAME, register

    register()
    check_sizes(source.config, source)
    config = load_config(source.config, model, code=source.path if trust_remote_code else None)
    skeleton = build_skeleton(config, model, attention=NAME)
    checkpoint = ModelCheckpoint(source, skeleton)
    structure = find_structure(skeleton, model)
    check_complete(skeleton, checkpoint)
    _check_types(checkpoint, skeleton, structure)

    import torch

    linears = [n for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)]
    schemes = recipe.resolve(structure, linears)
    # Routers are no linears to transformers, but to vLLM they are.
    linears += [name for name in structure.others() if name not in linears]
    strangers = _strangers(checkpoint, skeleton)
    linears += strangers
    if why := refused(structure, recipe):
        raise QuantkitError(f"{model}: {why}")
    before = {name: checkpoint.tensors[f"{name}.weight"].bytes for name in schemes}
    after = {
        name: scheme.packed_bytes(*checkpoint.tensors[f"{name}.weight"].shape)
        for name, scheme in schemes.items()
    }
    linear_bytes = (sum(before.values()), sum(after.values()))
    basis = find_basis(skeleton, structure, recipe, model)
    # A tied head gets weights of its own: the final norm goes into it.
    untied = checkpoint.tensors[f"{basis.embedding}.weight"].bytes if basis and basis.tied else 0
    total_bytes = (
        checkpoint.bytes,
        checkpoint.bytes - linear_bytes[0] + linear_bytes[1] + untied,
    )
    sizes = (
        samples or recipe.calibration.samples,
        min(seqlen or recipe.calibration.seqlen, structure.max_positions),
    )
    return Plan(
        checkpoint=checkpoint,
        skeleton=skeleton,
        structure=structure,
        recipe=recipe,
        schemes=schemes,
        unquantized_linears=[name for name in linears if name not in schemes],
        linear_bytes=linear_bytes,
        total_bytes=total_bytes,
        estimate=estimate(checkpoint, structure, recipe, schemes, total_bytes[1], *sizes),
        servers=who_serves(schemes, recipe.kv_format()),
        whole={n: _cut(structure, schemes, n) for n in (1, 2, 4, 8)},
        sizes=sizes,
        notes=left_out(structure, recipe) + (_beside(strangers) if basis else []),
        basis=basis,
    )


def find_basis(
    skeleton: Any, structure: Structure, recipe: Recipe, where: str
) -> ResidualBasis | None:
    """What a recipe turns the residual stream into.

    Raises:
        QuantkitError: the recipe wants rotations in the weights that this structure cannot take; with the setting
            that goes without them.
    """
    rotation = recipe.rotation
    if rotation is None:
        return None
    try:
        basis = residual_basis(skeleton, structure, where) if rotation.residual else None
        if rotation.values:
            check_values(structure, where)
    except QuantkitError as error:
        # A recipe that rotates nothing at run time is for servers that cannot.
        instead = (
            "--set 'rotation={block: 128}' rotates each input at run time instead"
            if rotation.online
            else "--set rotation=null goes without"
        )
        raise QuantkitError(f"{error}; {instead}") from None
    return basis


def refused(structure: Structure, recipe: Recipe) -> str:
    """Why a structure cannot take a recipe at all, with the setting to change; nothing if it can."""
    why = next(
        (x.attention.why_not_packed for x in structure.kinds if x.attention.why_not_packed), ""
    )
    if recipe.kv_cache and why:
        instead = "--set kv_cache=null leaves them" if recipe.weights else "gptq is for weights"
        return f"keys and values cannot be kept in four bits: {why}; {instead}"
    return ""


def left_out(structure: Structure, recipe: Recipe) -> list[str]:
    """What of the recipe this structure cannot take, and why; one line each."""
    notes: dict[str, None] = {}
    for layer in structure.kinds:
        if recipe.rope_scaling and layer.attention.why_no_factors:
            notes[f"no rope_scaling: {layer.attention.why_no_factors}"] = None
        for group in layer.groups:
            wanted = recipe.channel_scaling and group.place in recipe.channel_scaling.places
            if wanted and group.feeder is None:
                notes[f"no factor at {group.name}: {group.why_not}"] = None
    return list(notes)


def _strangers(checkpoint: ModelCheckpoint, skeleton: Any) -> list[str]:
    """Modules with a matrix that transformers does not build (heads for drafts, mostly); they are kept as they are."""
    known = skeleton.state_dict(keep_vars=True)
    return [
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if name not in known and name.endswith(".weight") and len(info.shape) == 2
    ]


def _beside(strangers: list[str]) -> list[str]:
    """What a turned residual stream means for modules that are kept as they are."""
    if not strangers:
        return []
    count = f"{len(strangers)} modules such as " if len(strangers) > 1 else ""
    return [
        f"no turning of {count}{strangers[0]}: transformers does not build it; if it drafts tokens from the "
        "residual stream, which is turned, serve without speculative decoding"
    ]


def _check_types(checkpoint: Checkpoint, skeleton: Any, structure: Structure) -> None:
    """Every decoder layer's parameters are floats wide enough to be quantized."""
    for name, _ in skeleton.get_submodule(structure.layers).named_parameters():
        full = f"{structure.layers}.{name}"
        kind = checkpoint.tensors[full].dtype
        if kind not in ("BF16", "F16", "F32", "F64"):
            raise QuantkitError(
                f"{checkpoint.path}: tensor {full!r} is {kind}; 16- or 32-bit floats are expected"
            )


def _cut(structure: Structure, schemes: dict[str, Scheme], parts: int) -> str:
    """What `parts` ranks could not get whole, or nothing.

    Inputs of o and down are split (row-parallel): whole groups of scales and rotations. Outputs of the rest are
    split (column-parallel): whole heads, and rows that divide.
    """
    for number, layer in enumerate(structure.layer_structures):
        if layer.attention.kv_heads % parts:
            return f"{layer.attention.kv_heads} KV heads do not divide by {parts}"
        for group in layer.groups:
            for name in group.linears:
                scheme = schemes.get(structure.prefix(number) + name)
                rows, columns = layer.shapes[name]
                if group.place in ("qkv", "gate_up"):
                    if rows % parts:
                        return f"the {rows} outputs of {name} do not divide by {parts}"
                    continue
                unit = max(scheme.weights.group_size or 1, scheme.rotation or 1) if scheme else 1
                if columns % parts or (columns // parts) % unit:
                    return f"{columns} / {parts} inputs of {name} are no whole groups of {unit}"
    return ""


def default_output(model: str, recipe: Recipe) -> Path:
    from quantkit.models.names import short_name

    return Path(f"{short_name(model)}-{recipe.name}")
