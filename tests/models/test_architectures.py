"""Every architecture with every recipe: the table in docs/architectures.md, and that it is true.

`python tests/models/test_architectures.py` writes the table. The whole matrix is slow; a few of its cells are not.
"""

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from tiny_models import VARIANTS, VOCAB, save_model, skeleton_of, structure_of  # noqa: E402

import quantkit  # noqa: E402
from quantkit.errors import QuantkitError  # noqa: E402
from quantkit.plan import find_basis, left_out, refused  # noqa: E402
from quantkit.recipe import Recipe, recipe_names  # noqa: E402
from quantkit.verify import verify  # noqa: E402

DOCUMENT = TESTS.parent / "docs" / "architectures.md"
MARKS = ("<!-- table: python tests/models/test_architectures.py -->\n", "<!-- end -->")
# As users know them.
TITLES = {
    "llama": "Llama 2, 3", "llama-biases": "Llama with biases", "mistral": "Mistral", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma 2", "gemma3": "Gemma 3 (text)", "phi3": "Phi-3",
    "opt": "OPT", "opt-350m": "OPT-350m (norms after, other embedding size)", "gpt-neox": "GPT-NeoX, Pythia",
    "falcon": "Falcon 7B", "falcon-40b": "Falcon 40B", "bloom": "Bloom", "mixtral": "Mixtral",
    "qwen2-moe": "Qwen2-MoE", "qwen3-moe": "Qwen3-MoE", "llama4": "Llama 4 (text)",
}  # fmt: skip
CELLS = [(variant, recipe) for variant in VARIANTS for recipe in recipe_names()]
QUICK = [("opt", "crossquant"), ("gemma3", "fireq"), ("mixtral", "quest-hadamard")]


# What a user is told to set where a recipe is refused.
SETTINGS = ("kv_cache=null", "rotation={block: 128}", "rotation=null")


def settings_for(variant: str, recipe: str) -> list[str] | None:
    """The settings that the recipe needs with this structure; each must be what its refusal names. None: no way."""
    needed: list[str] = []
    while True:
        loaded = Recipe.load(recipe, needed)
        try:
            why = refused(structure_of(variant), loaded)
            if not why:
                find_basis(skeleton_of(variant), structure_of(variant), loaded, variant)
        except QuantkitError as error:
            why = str(error)
        if not why:
            return needed
        if loaded.weights is None:
            return None
        needed.append(next(s for s in SETTINGS if s in why and s not in needed))


def cell(variant: str, recipe: str) -> str:
    """What the table says."""
    settings = settings_for(variant, recipe)
    if settings is None:
        return "no"
    inner = cell_of(structure_of(variant), Recipe.load(recipe, settings))
    if not settings:
        return inner
    given = ", ".join(f"`--set {_quoted(s)}`" for s in settings)
    return f"with {given}" + ("" if inner == "yes" else f"; {inner}")


def _quoted(setting: str) -> str:
    return f"'{setting}'" if " " in setting else setting


def cell_of(structure, recipe: Recipe) -> str:
    notes = [note.partition(":")[0] for note in left_out(structure, recipe)]
    places = [note.removeprefix("no factor at ") for note in notes if "factor at" in note]
    rest = [note for note in notes if "factor at" not in note]
    return "; ".join(rest + ([f"no factor at {', '.join(places)}"] if places else [])) or "yes"


def table() -> str:
    columns: dict[tuple[str, ...], list[str]] = {}
    for recipe in recipe_names():
        columns.setdefault(tuple(cell(v, recipe) for v in VARIANTS), []).append(recipe)
    head = [", ".join(f"`{r}`" for r in recipes) for recipes in columns.values()]
    lines = ["| model | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for number, variant in enumerate(VARIANTS):
        lines.append(f"| {TITLES[variant]} | " + " | ".join(c[number] for c in columns) + " |")
    return "\n".join(lines) + "\n"


def test_the_table_is_current():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.partition(MARKS[0])[2].partition(MARKS[1])[0] == table(), (
        "run: python tests/models/test_architectures.py"
    )


def check(variant: str, recipe: str, source: Path, text: Path, folder: Path) -> dict:
    """A cell is as the table says: quantized, verified, loaded, generating; or refused in one line."""
    settings = settings_for(variant, recipe)
    if settings is None:
        with pytest.raises(QuantkitError, match="cannot be kept in four bits"):
            quantkit.quantize(str(source), recipe, folder, calib=str(text))
        return {}
    if settings:
        with pytest.raises(QuantkitError) as error:
            quantkit.quantize(str(source), recipe, folder, calib=str(text))
        assert f"--set {_quoted(settings[0])}" in str(error.value)
    few = ["refine.steps=4"] if Recipe.load(recipe).refine else []
    report = quantkit.quantize(
        str(source), recipe, folder, calib=str(text), samples=8, seqlen=64, overrides=few + settings
    )
    assert not verify(folder, against=str(source)).problems
    ids = torch.randint(2, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    original, model = (quantkit.load(str(p), dtype=torch.float32) for p in (source, folder))
    with torch.no_grad():
        want, got = original(ids).logits, model(ids).logits
        part = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=part.past_key_values).logits
    apart = float((got - want).norm() / want.norm())
    formats = str(report["layers"][0]["linears"])
    assert apart < (0.12 if "W8" in formats else 0.9 if "A4" in formats else 0.7)
    # An activation at the edge of one of sixteen levels falls to either side, by how a sum was ordered.
    bound = 0.4 if "A4" in formats else 0.1
    assert float((last - got[:, -1:]).norm() / got[:, -1:].norm()) < bound, "decoding differs"
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)
    assert out.shape == (1, 28)
    return report


@pytest.mark.parametrize(("variant", "recipe"), QUICK)
def test_some(variant: str, recipe: str, text: Path, tmp_path: Path):
    report = check(
        variant, recipe, save_model(tmp_path / "source", variant), text, tmp_path / "out"
    )
    experts = {n: f for n, f in report["layers"][0]["linears"].items() if ".experts." in n}
    assert bool(experts) == (variant == "mixtral")
    for name, figures in experts.items():
        few = figures["tokens"] < 256
        fallback = "nearest" if name.endswith("w2") else "shared"
        assert figures.get("fallback") == (fallback if few else None), name
    if experts:
        # Two of four experts for each token, three linears in each.
        assert sum(f["tokens"] for f in experts.values()) == 8 * 64 * 2 * 3
        assert {f.get("fallback") for f in experts.values()} >= {None, "shared", "nearest"}


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "recipe"), CELLS)
def test_all(variant: str, recipe: str, text: Path, tmp_path: Path):
    check(variant, recipe, save_model(tmp_path / "source", variant), text, tmp_path / "out")


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    DOCUMENT.write_text(before + MARKS[0] + table() + MARKS[1] + after, encoding="utf-8")
