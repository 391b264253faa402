"""The recipe: a YAML file that says what is quantized and how; checked on reading, resolved per module."""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantkit.calibration.sources import BUNDLED_CALIBRATION, named_samples
from quantkit.errors import QuantkitError
from quantkit.formats.scheme import ActivationFormat, KVFormat, Scheme, WeightFormat
from quantkit.methods.hadamard import known_block, widest_block
from quantkit.models.groups import PLACES, Place
from quantkit.models.structure import Structure

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Weights(_Strict):
    """Weights: bits, groups, how scales are chosen (`clip`) and stored (`scale`), how values are rounded."""

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 4
    group_size: Literal[32, 64, 128, 256] | Literal["channel"] = 128
    grid: Literal["integer", "half"] = "integer"
    scale: Literal["bf16", "fp8_channel", "fp8_tensor"] = "bf16"
    clip: Literal["absmax", "mse", "gaussian"] = "absmax"
    rounding: Literal["nearest", "gptq"] = "nearest"

    @model_validator(mode="after")
    def _supported(self) -> Weights:
        if self.bits > 4 and self.scale != "bf16":
            raise ValueError(f"bits: {self.bits} is not supported with FP8 group scales; 4 is")
        if self.group_size == "channel" and self.scale != "bf16":
            raise ValueError("scale: FP8 group scales need groups; group_size: 128 has them")
        if self.clip == "gaussian" and self.grid != "half":
            raise ValueError(
                "clip: gaussian belongs to grid: half; mse or absmax fit the integer grid"
            )
        return self


class Activations(_Strict):
    """Activations, quantized per token while the model runs."""

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    type: Literal["int", "float"] = "int"
    grid: Literal["integer", "half"] = "integer"

    @model_validator(mode="after")
    def _supported(self) -> Activations:
        if self.grid == "integer" and self.bits not in (4, 8):
            raise ValueError(f"bits: {self.bits} is supported on grid: half only; 4 and 8 on both")
        if self.type == "float" and (self.bits != 8 or self.grid == "half"):
            raise ValueError("type: float is FP8: bits 8 on the integer grid")
        return self


class KVCache(_Strict):
    """Keys and values in the cache."""

    bits: Literal[4] = 4
    scale: Literal["bf16", "fp8"] = "bf16"
    query: Literal["fp8"] | None = "fp8"


class ChannelScaling(_Strict):
    """A per-channel factor moved from the activations into the weights; the function is unchanged.

    Methods: `awq` (mean|x|^a), `smoothquant` (max|x|^a / max|w|^(1-a)), `balance` ((rms(x) / rms(w))^a),
    `crossquant` (max|x|^(1-a)), `constant` (FireQ's: a / max|w|). `exponents` are the values of a; with
    several, the one with the least output error of the quantized linears is taken, per place, no factor
    at all among them.
    """

    method: Literal["awq", "smoothquant", "balance", "crossquant", "constant"]
    exponents: list[float] = Field(min_length=1)
    places: list[Place] = Field(default=list(PLACES), min_length=1)


class RopeScaling(_Strict):
    """FireQ's factors on keys: alpha before RoPE, beta after it on each head's top_k outlier channels, or `all`.

    `strength` is the exponent of the factor before RoPE; FireQ's is 1. Each may be a list: with several settings, per
    layer the one with the least error of attention's output is taken.
    """

    alpha: list[Positive] | None = Field(default=[1.0], min_length=1)
    strength: list[Positive] = Field(default=[1.0], min_length=1)
    beta: list[Positive] | None = Field(default=[1.0], min_length=1)
    top_k: list[Count | Literal["all"]] = Field(default=[3], min_length=1)

    @field_validator("alpha", "strength", "beta", "top_k", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, list) else [value]


class Rotation(_Strict):
    """Hadamard rotations, which spread outliers. Those that the weights can take in cost nothing at run time.

    Attributes:
        residual: the residual stream, turned in the weights: the inputs of qkv and gate_up.
        values: each value head, turned in v_proj and o_proj: the input of o.
        inputs: places whose input is rotated while the model runs, in blocks.
        block: of those: a power of two or one times 12, 20, 28, ...; `full` is the widest that divides an input.
    """

    residual: bool = False
    values: bool = False
    inputs: list[Place] | Literal["all", "none"] = "all"
    block: int | Literal["full"] = 128

    @field_validator("block")
    @classmethod
    def _known(cls, block: int | str) -> int | str:
        if isinstance(block, int) and (block < 2 or not known_block(block)):
            raise ValueError(
                f"{block} is no known Hadamard order; a power of two is, or one times 12, 20, 28, ..."
            )
        return block

    @model_validator(mode="after")
    def _once(self) -> Rotation:
        offline = [*(("qkv", "gate_up") if self.residual else ()), *(("o",) if self.values else ())]
        twice = [place for place in self.online if place in offline]
        if twice:
            raise ValueError(
                f"inputs: {', '.join(twice)}: turned in the weights already; "
                f"inputs: {[p for p in self.online if p not in offline] or 'none'} goes with it"
            )
        if not (offline or self.online):
            raise ValueError("inputs: none, and nothing else is rotated; rotation: null says that")
        return self

    @property
    def online(self) -> tuple[str, ...]:
        """The places whose input is rotated while the model runs."""
        return (
            PLACES if self.inputs == "all" else () if self.inputs == "none" else tuple(self.inputs)
        )

    def block_of(self, place: str, columns: int) -> int | None:
        """The online rotation of a place with `columns` inputs, or None."""
        if place not in self.online:
            return None
        return widest_block(columns) if self.block == "full" else self.block


class GPTQ(_Strict):
    """`fit_scales`: once codes are chosen, scales are fitted to them and the codes chosen again, if that lowers the error."""

    damping: float = Field(default=0.01, gt=0, lt=1)
    block: int = Field(default=128, gt=0)
    activation_order: bool = False
    fit_scales: bool = False


class Refine(_Strict):
    """Rounding offsets, scales and norms learned per decoder layer against the original model's outputs.

    `steps` of `blocks` calibration blocks each; `rate`, of the offsets, in units of a level; `norms`: whether norms
    learn too; `curvature`: weigh errors by what they cost the model's predictions, else all alike.
    """

    steps: int = Field(default=480, gt=0)
    blocks: int = Field(default=1, gt=0)
    rate: float = Field(default=0.005, gt=0, le=1)
    norms: bool = True
    curvature: bool = True


class Calibration(_Strict):
    """What `--calib`, `--samples` and `--seqlen` say where they are left out.

    `samples` is a mixture's sum where it is left out.
    """

    source: str = BUNDLED_CALIBRATION
    samples: int = Field(default=64, gt=0)
    seqlen: int = Field(default=512, gt=1)

    @model_validator(mode="before")
    @classmethod
    def _sum(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("source"), str):
            return data
        try:
            named = named_samples(data["source"])
        except QuantkitError as error:
            raise ValueError(f"source: {error}") from None
        return ({"samples": named} if named else {}) | data


class Rule(_Strict):
    """For modules whose name matches (shell wildcards): other weights or activations, or `skip`."""

    match: str
    weights: Weights | None = None
    activations: Activations | None = None
    skip: bool = False


class Recipe(_Strict):
    """What is quantized and how.

    Attributes:
        weights: None leaves them in 16 bits: keys and values alone are quantized.
        rules: exceptions by module name; the first that matches holds.
        ignore: modules left as they are, by wildcard; a pattern that matches nothing is an error.
    """

    name: str = "custom"
    description: str = ""
    weights: Weights | None
    activations: Activations | None = None
    kv_cache: KVCache | None = None
    channel_scaling: ChannelScaling | None = None
    rope_scaling: RopeScaling | None = None
    rotation: Rotation | None = None
    gptq: GPTQ = GPTQ()
    refine: Refine | None = None
    calibration: Calibration = Calibration()
    rules: list[Rule] = []
    ignore: list[str] = ["lm_head"]

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        """It goes into the name of the output's folder."""
        if not re.fullmatch(r"[\w+-][\w.+-]{0,99}", name):
            raise ValueError(f"{name[:60]!r} is no plain name; letters, digits and . _ + - are")
        return name

    @model_validator(mode="after")
    def _supported(self) -> Recipe:
        if self.weights is None:
            with_weights = ("activations", "channel_scaling", "rotation", "refine", "rules")
            set_too = next((name for name in with_weights if getattr(self, name)), None)
            if set_too:
                raise ValueError(f"{set_too} goes with quantized weights, and weights is null")
            if not self.kv_cache:
                raise ValueError("weights: null leaves nothing to quantize without kv_cache")
            return self._with_a_cache()
        for rule in (None, *self.rules):
            weights = (rule and rule.weights) or self.weights
            acts = (rule and rule.activations) or self.activations
            if acts and (weights.grid == "half") != (acts.grid == "half"):
                raise ValueError(
                    "grid: half must stand in weights and activations both, or in neither"
                )
            if weights.grid == "half" and (acts is None or self.rotation is None):
                raise ValueError("weights.grid: half needs rotation and quantized activations")
        return self._with_a_cache()

    def _with_a_cache(self) -> Recipe:
        if self.rope_scaling and not self.kv_cache:
            raise ValueError("rope_scaling serves a quantized kv_cache, and there is none")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is learned from text: GPTQ, factors, key statistics."""
        formats = [w for w in (self.weights, *(r.weights for r in self.rules)) if w]
        return bool(
            self.channel_scaling
            or self.rope_scaling
            or self.refine
            or any(w.rounding == "gptq" for w in formats)
        )

    @classmethod
    def load(cls, name: str, overrides: list[str] | None = None) -> Recipe:
        """A recipe by name (those that come with the package) or by the path of a YAML file.

        Args:
            name: `fireq`, or `path/to/recipe.yaml`.
            overrides: `path=value` settings, as of `--set`, the value in YAML.

        Raises:
            QuantkitError: no such recipe, not YAML, an unknown key, a wrong type, an unsupported combination.
        """
        data = _read(name)
        for override in overrides or []:
            _override(data, override)
        data.setdefault("name", Path(name).stem)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise QuantkitError(f"{_where(name)}: {_readable(error)}") from None

    def save(self, path: Path) -> None:
        """A YAML file that `load` reads as this recipe."""
        data = {"name": self.name} | self.model_dump(exclude_defaults=True)
        data["weights"] = self.weights and self.weights.model_dump(exclude_defaults=True)
        path.write_text(yaml.safe_dump(data, sort_keys=False, width=120), encoding="utf-8")

    def rule_for(self, module: str) -> Rule | None:
        return next((rule for rule in self.rules if fnmatch.fnmatch(module, rule.match)), None)

    def weights_of(self, module: str) -> Weights | None:
        rule = self.rule_for(module)
        return (rule and rule.weights) or self.weights

    def uses_gptq(self, module: str) -> bool:
        weights = self.weights_of(module)
        return weights is not None and weights.rounding == "gptq"

    def scheme_of(self, module: str, rotation: int | None = None) -> Scheme | None:
        """The scheme of a linear whose input is rotated online in blocks, or None if it stays as it is."""
        rule = self.rule_for(module)
        if any(fnmatch.fnmatch(module, pattern) for pattern in self.ignore) or (rule and rule.skip):
            return None
        weights = self.weights_of(module)
        if weights is None:
            return None
        acts = (rule and rule.activations) or self.activations
        return Scheme(
            WeightFormat(
                bits=weights.bits,
                group_size=None if weights.group_size == "channel" else weights.group_size,
                scale=weights.scale,
                half=weights.grid == "half",
            ),
            ActivationFormat(acts.bits, acts.type, acts.grid == "half") if acts else None,
            rotation,
        )

    def kv_format(self) -> KVFormat | None:
        return KVFormat(**self.kv_cache.model_dump()) if self.kv_cache else None

    def resolve(self, structure: Structure, linears: list[str]) -> dict[str, Scheme]:
        """Module -> scheme, for every linear of the model's decoder layers.

        Args:
            structure: the model's structure.
            linears: names of all linears of the model, decoder layers and others, for `ignore` to match.

        Raises:
            QuantkitError: a pattern matches nothing, a group size or rotation does not fit, or linears that
                servers fuse would differ.
        """
        for what, pattern in [("rules", r.match) for r in self.rules] + [
            ("ignore", p) for p in self.ignore
        ]:
            if not fnmatch.filter(linears, pattern):
                raise QuantkitError(
                    f"recipe {self.name}: {what}: {pattern!r} matches no linear; names look like {linears[0]}"
                )
        schemes = {}
        places = structure.places()
        for module, (_, columns) in structure.shapes().items():
            online = self.rotation.block_of(places[module], columns) if self.rotation else None
            scheme = self.scheme_of(module, online)
            if scheme is None:
                continue
            self._check_shape(module, scheme, columns)
            schemes[module] = scheme
        if not schemes and self.weights:
            raise QuantkitError(
                f"recipe {self.name}: nothing is left to quantize; see rules and ignore"
            )
        for layer in range(structure.num_layers):
            head_dim = structure.layer(layer).attention.head_dim
            counts = self.rope_scaling.top_k if self.rope_scaling else []
            if most := next((k for k in counts if k != "all" and k > head_dim), None):
                raise QuantkitError(
                    f"recipe {self.name}: rope_scaling.top_k {most}: layer {layer} has "
                    f"heads of {head_dim}; FireQ takes 3"
                )
            for fused in structure.layer(layer).fused:
                # Experts' first and last linears may differ in rotation: no server has that.
                found = {
                    s and replace(s, rotation=None)
                    for s in (schemes.get(structure.prefix(layer) + name) for name in fused)
                }
                if len(found) > 1:
                    names = ", ".join(fused[:3]) + (" and so on" if len(fused) > 3 else "")
                    raise QuantkitError(
                        f"recipe {self.name}: layer {layer}: {names} are fused by servers "
                        "and need one scheme; widen the pattern"
                    )
        return schemes

    def _check_shape(self, module: str, scheme: Scheme, columns: int) -> None:
        for what, size in (
            ("weights.group_size", scheme.weights.group_size),
            ("rotation.block", scheme.rotation),
        ):
            if size and columns % size:
                raise QuantkitError(
                    f"recipe {self.name}: {what} {size} does not divide the {columns} in-features of {module}; "
                    f"--set {what}={_divisor(columns, size)}, or a rule that skips it"
                )
        if scheme.weights.bits <= 4 and columns % 8:
            raise QuantkitError(
                f"recipe {self.name}: {module} has {columns} in-features; up to four bits run eight at a time"
            )


def _divisor(columns: int, size: int) -> int | str:
    fitting = [s for s in (256, 128, 64, 32) if s < size and columns % s == 0]
    return fitting[0] if fitting else "channel"


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(
        f.name[:-5] for f in files("quantkit.recipes").iterdir() if f.name.endswith(".yaml")
    )


def _where(name: str) -> str:
    return name if name.endswith((".yaml", ".yml")) else f"recipes/{name}.yaml"


def _read(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The recipe's data with `extends` resolved: mappings are merged, everything else is replaced."""
    if name in seen:
        raise QuantkitError(f"{_where(name)}: extends itself, by way of {', '.join(seen)}")
    if name in recipe_names():
        text = files("quantkit.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")) or "/" in name:
        try:
            if Path(name).expanduser().exists() and not Path(name).expanduser().is_file():
                raise QuantkitError(f"{name}: is no file; a recipe is a YAML file")
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise QuantkitError(f"{name}: recipe cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise QuantkitError(f"{name}: not a text file; a recipe is YAML") from None
    else:
        close = difflib.get_close_matches(name, recipe_names(), cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else "`quantkit recipes` lists them"
        raise QuantkitError(f"{name}: no such recipe; {hint}")
    try:
        # A few lines of references to references stand for more than any memory holds.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise QuantkitError(f"{_where(name)}: has YAML references (*name); write them out")
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise QuantkitError(
            f"{_where(name)}: not valid YAML ({' '.join(str(error).split())[:300]})"
        ) from None
    if not isinstance(data, dict):
        raise QuantkitError(f"{_where(name)}: a mapping is expected, not {type(data).__name__}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise QuantkitError(f"{_where(name)}: extends: a recipe's name is expected")
    if parent not in recipe_names() and not Path(parent).is_absolute():
        parent = str(Path(name).parent / parent)
    base = _read(parent, (*seen, name))
    base.pop("name", None)
    return _merge(base, data)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def _override(data: dict[str, Any], setting: str) -> None:
    """Apply one `path=value` to a recipe's data."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise QuantkitError(f"--set {setting}: path=value is expected, as in weights.group_size=64")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise QuantkitError(f"--set {setting}: {text!r} is not a YAML value") from None
    *parents, last = path.split(".")
    model: Any = Recipe
    here: dict[str, Any] = data
    for depth, key in enumerate([*parents, last]):
        fields = getattr(model, "model_fields", {})
        if key not in fields:
            close = difflib.get_close_matches(key, fields, cutoff=0.4)
            prefix = ".".join([*parents, last][:depth])
            known = close[0] if close else ", ".join(fields) or "nothing"
            raise QuantkitError(
                f"--set {setting}: {path!r} is not a setting; {prefix + '.' if prefix else ''}{known} is"
            )
        model = _section(fields[key].annotation)
        if depth < len(parents):
            if not isinstance(here.get(key), dict):
                here[key] = {}
            here = here[key]
    here[last] = value
    if path == "kv_cache" and value is None:
        data.pop("rope_scaling", None)  # it serves the cache alone


def _section(annotation: Any) -> Any:
    """The pydantic model within an annotation such as `KVCache | None`."""
    options = getattr(annotation, "__args__", (annotation,))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-12:]


def _readable(error: ValidationError) -> str:
    """pydantic's first error as `weights.bits: what is wrong`."""
    # A misspelt key also makes the right one missing: name the cause.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = ".".join(
        str(p)
        for p in first["loc"]
        if not (isinstance(p, str) and p.startswith(("literal", "constrained")))
    )
    if first["type"] == "extra_forbidden":
        model: Any = Recipe
        for key in first["loc"][:-1]:
            model = (
                _section(model.model_fields[key].annotation)
                if key in getattr(model, "model_fields", {})
                else model
            )
        close = difflib.get_close_matches(
            str(first["loc"][-1]), getattr(model, "model_fields", {}), cutoff=0.4
        )
        return f"{path}: unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "literal_error":
        message = f"{_short(first['input'])} is not supported; {first.get('ctx', {}).get('expected', '')} is"
    elif first["type"] == "missing":
        message = "is required"
    elif first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {_short(first['input'])}"
    if (
        first["type"] == "value_error"
        and ": " in message
        and path
        and not path.startswith(message.split(":")[0])
    ):
        return f"{path}.{message}"
    return f"{path}: {message}" if path else message
