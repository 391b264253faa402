"""What a report and a model card say, collected once from the files of an output."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import QuantkitError
from quantkit.evaluate.store import stored
from quantkit.formats.checkpoint import read_json
from quantkit.formats.writer import is_ours
from quantkit.models.names import BUNDLED
from quantkit.recipe import Recipe

_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Facts:
    """Of one output.

    Attributes:
        name: of its folder.
        report: quantkit/report.json.
        config: config.json.
        evaluation: quantkit/eval.json, or None if nothing was measured yet.
        base: the original's hub id, or its folder's name: no path of the machine it was made on.
        base_is_hub_id: whether others can find it under that name.
        source_card: front matter of the original's own card (license, language), empty if it has none.
    """

    name: str
    report: dict[str, Any]
    config: dict[str, Any]
    evaluation: dict[str, Any] | None
    base: str
    base_is_hub_id: bool
    source_card: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe_name(self) -> str:
        return str((self.report.get("recipe") or {}).get("name"))

    @property
    def layers(self) -> list[dict[str, Any]]:
        return list(self.report.get("layers") or [])

    @property
    def schemes(self) -> dict[str, int]:
        """Scheme in words -> how many linears have it."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            for figures in layer.get("linears", {}).values():
                scheme = str(figures.get("scheme", "?"))
                counts[scheme] = counts.get(scheme, 0) + 1
        return counts

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized linears, scales counted in."""
        found = [f for layer in self.layers for f in layer.get("linears", {}).values()]
        if not found or any("bits" not in f or "weights" not in f for f in found):
            return None
        return sum(f["bits"] * f["weights"] for f in found) / sum(f["weights"] for f in found)

    @property
    def fallbacks(self) -> list[str]:
        """Linears whose Hessian could not be inverted: rounded plainly instead."""
        return [
            f"layer {number}, {name}"
            for number, layer in enumerate(self.layers)
            for name, figures in layer.get("linears", {}).items()
            if figures.get("fell_back")
        ]

    @property
    def recipe_yaml(self) -> str:
        """The recipe as a file that `--recipe` takes: nothing inherited, only what is not the default."""
        recipe = dict(self.report.get("recipe") or {})
        try:
            short = Recipe(**recipe).model_dump(exclude_defaults=True, mode="json")
        except (ValueError, QuantkitError):  # written by a version with other settings
            short = recipe
        short.pop("name", None)
        return str(yaml.safe_dump(short, sort_keys=False, width=100)).strip()

    @property
    def is_named_recipe(self) -> bool:
        """Whether the recipe is, setting for setting, the one that this version has under its name."""
        try:
            return bool(Recipe.load(self.recipe_name).model_dump() == self.report.get("recipe"))
        except QuantkitError:
            return False

    @property
    def calibration_name(self) -> str:
        """What it was calibrated on, files without their folders."""
        data = self.report["calibration"]
        sources = data.get("sources", [])
        if len(sources) < 2:
            return Path(str(data["name"])).name
        return ",".join(f"{Path(each['name']).name}:{each['samples']}" for each in sources)

    @property
    def command(self) -> str:
        """What makes this output again."""
        recipe = self.recipe_name if self.is_named_recipe else "recipe.yaml"
        words = ["quantkit quantize", self.base, "--recipe", recipe]
        data = self.report.get("calibration")
        if data:
            words += ["--calib", self.calibration_name]
            words += [f"--samples {data['samples']} --seqlen {data['seqlen']}"]
            words += [f"--seed {data['seed']}"] if data.get("seed") else []
        return " ".join(words)


def collect(folder: Path, name: str | None = None) -> Facts:
    """Read what there is to say about the output in a folder.

    Args:
        folder: an output of quantkit.
        name: what to call it; the folder's own name if left out.

    Raises:
        QuantkitError: it is no output of quantkit, or its report is missing or not readable.
    """
    if not is_ours(folder):
        raise QuantkitError(
            f"{folder}: not an output of quantkit; name a folder that `quantize` made"
        )
    path = folder / "quantkit" / "report.json"
    if not path.is_file():
        raise QuantkitError(f"{folder}: has no quantkit/report.json, which `quantize` writes")
    report = read_json(path)
    if not isinstance(report.get("layers"), list) or not isinstance(report.get("recipe"), dict):
        raise QuantkitError(f"{path}: not a report of quantkit")
    source = str(report.get("source", "?"))
    base, hub = _base(source)
    return Facts(
        name=name or folder.resolve().name,
        report=report,
        config=read_json(folder / "config.json"),
        evaluation=stored(folder),
        base=base,
        base_is_hub_id=hub,
        source_card=_front_matter(Path(source) / "README.md") if source != BUNDLED else {},
    )


def _base(source: str) -> tuple[str, bool]:
    """The original's public name, and whether it is a hub id."""
    cached = _HUB_CACHE.search(source)
    if cached:
        return f"{cached[1]}/{cached[2]}", True
    if _HUB_ID.fullmatch(source) and not source.startswith((".", "/")):
        return source, True
    return Path(source).name, False


def _front_matter(readme: Path) -> dict[str, Any]:
    """The YAML between the first two `---` of a card; empty if there is none that can be read."""
    try:
        text = readme.read_text(encoding="utf-8")
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        data = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}
