import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from quantkit.errors import QuantkitError
from quantkit.evaluate.store import keep
from quantkit.recipe import Recipe
from quantkit.report.documents import MARK, front_matter, render_card, render_page, write_documents
from quantkit.report.facts import collect
from quantkit.verify import verify

SECTIONS = ["perplexity", "size", "layer-error", "linear-error", "bits", "outliers", "zero-fraction", "time",
            "servers", "recipe"]  # fmt: skip
_VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Sections with their pictures and text; fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: dict[str, int] = {}
        self.words: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "section":
            self.now = dict(attrs)["id"]
            self.sections[self.now] = 0
        if tag == "svg":
            self.sections[self.now] += 1

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.sections:
            self.words[self.now] = self.words.get(self.now, "") + data


def copy(folder: Path, tmp_path: Path) -> Path:
    target = Path(shutil.copytree(folder, tmp_path / "ours"))
    (target / "quantkit" / "eval.json").unlink(missing_ok=True)
    return target


def measured(model: str = "ours", baseline: str = "model") -> dict:
    figures = {"tokens": 128, "windows": 2, "seqlen": 64, "protocol": "gptq"}
    return {
        "model": model,
        "ppl": {"/a/b/text.txt": {"ppl": 21.5, "stderr": 0.5} | figures},
        "baseline": {"/a/b/text.txt": {"ppl": 20.0, "stderr": 0.4} | figures},
        "baseline_model": baseline,
        "divergence": {"/a/b/text.txt": {"ratio": 1.075, "ratio_stderr": 0.003, "kl": 0.0123, "kl_stderr": 0.0004,
                                         "top1": 0.91, "top1_stderr": None, "tokens": 126}},
        "tasks": {model: {"arc": {"acc,none": 0.25}}, baseline: {"arc": {"acc,none": 0.5}}},
    }  # fmt: skip


@pytest.mark.parametrize("recipe", ["fireq", "crossquant", "quest-hadamard", "int4"])
def test_quantize_leaves_a_whole_page_and_a_card(quantized, recipe: str):
    folder = quantized(recipe)
    text = (folder / "quantkit" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert list(page.sections) == SECTIONS
    calibrated = recipe != "int4"
    assert page.sections["layer-error"] == calibrated
    assert page.sections["outliers"] == {"fireq": 5, "int4": 0}.get(recipe, 4)
    assert page.sections["zero-fraction"] == (4 if recipe == "crossquant" else 0)
    for always in ("size", "linear-error", "bits", "time"):
        assert page.sections[always], always
    for name, count in page.sections.items():
        assert count or len(page.words[name]) > 30, f"{name} is empty and does not say why"
    assert "nan" not in re.sub(r"[\w-]*nan[\w-]+", "", text.lower())
    assert recipe in (folder / "README.md").read_text()
    assert not verify(folder).problems


def test_nothing_is_fetched_from_elsewhere(quantized, tmp_path: Path):
    folder = copy(quantized("fireq"), tmp_path)
    keep(measured(), folder)
    page = Page(render_page(collect(folder)))
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert not [value for _, name, value in page.attributes if name in ("src", "href", "srcset")]
    assert "url(" not in render_page(collect(folder))
    assert "@import" not in render_page(collect(folder))


def test_what_was_measured_is_shown(quantized, tmp_path: Path):
    folder = copy(quantized("int4"), tmp_path)
    assert "quantkit eval ours" in Page(render_page(collect(folder))).words["perplexity"]
    keep(measured(), folder)
    write_documents(folder)
    page = Page((folder / "quantkit" / "report.html").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    for text in (page.words["perplexity"], card):
        for figure in ("21.5000", "20.0000", "1.0750 ± 0.0030", "0.01230 ± 0.00040", "91.00"):
            assert figure in text
        assert "text.txt" in text
        assert "/a/b" not in text, "a path of the machine it was measured on"
    assert "0.2500" in page.words["perplexity"]


def test_names_are_escaped(quantized, tmp_path: Path, change_json):
    folder = copy(quantized("fireq"), tmp_path)
    report = folder / "quantkit" / "report.json"
    data = json.loads(report.read_text())
    data["recipe"]["name"] = data["source"] = "<script>alert(1)</script>"
    data["recipe"]["description"] = "<b>bold</b>"
    data["layers"][0]["linears"]["self_attn.<i>"] = data["layers"][0]["linears"]["mlp.up_proj"]
    report.write_text(json.dumps(data))
    page = Page(render_page(collect(folder, "<u>name</u>")))
    assert not {tag for tag, _, _ in page.attributes} & {"script", "i", "u"} - {"i"}
    assert "<script" not in render_page(collect(folder))


def test_the_front_matter(quantized, tmp_path: Path, change_json):
    folder = copy(quantized("fireq"), tmp_path)
    source = tmp_path / "models--some-org--some.model-7b" / "snapshots" / "0123"
    source.mkdir(parents=True)
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- no\n---\n# Some model\n"
    )
    change_json(folder / "quantkit" / "report.json", source=str(source))
    card = render_card(collect(folder))
    data = yaml.safe_load(card.split("---\n")[1])
    assert data == front_matter(collect(folder))
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "some-org/some.model-7b"
    assert data["base_model_relation"] == "quantized"
    assert {"quantkit", "fireq"} <= set(data["tags"])
    assert str(tmp_path) not in card
    for spoiled in ("---\nlicense: [\n---\n", "no front matter", "---\n- a list\n---\n"):
        (source / "README.md").write_text(spoiled)
        assert "license" not in front_matter(collect(folder))


def test_the_cards_recipe_makes_the_same_again(quantized, tmp_path: Path):
    plain = collect(quantized("fireq"))
    assert plain.is_named_recipe
    assert "--recipe fireq" in plain.command
    changed = collect(quantized("fireq", "llama", "kv_cache=null", "weights.group_size=64"))
    assert "--recipe recipe.yaml" in changed.command
    card = render_card(changed)
    file = tmp_path / "recipe.yaml"
    file.write_text(re.search(r"```yaml\n(.*?)\n```", card, re.DOTALL)[1])
    again, want = Recipe.load(str(file)).model_dump(), changed.report["recipe"]
    assert {k: v for k, v in again.items() if k != "name"} == {k: v for k, v in want.items() if k != "name"}  # fmt: skip
    assert changed.report["calibration"]["sha256"] in card


def test_a_users_own_card_stays(quantized, tmp_path: Path):
    folder = copy(quantized("int4"), tmp_path)
    card = folder / "README.md"
    assert MARK in card.read_text()
    assert len(write_documents(folder)) == 2
    card.write_text("# Mine")
    assert [path.name for path in write_documents(folder)] == ["report.html"]
    assert card.read_text() == "# Mine"
    card.write_bytes(b"\xff\xfe")
    assert [path.name for path in write_documents(folder)] == ["report.html"]


def test_the_sources_card_is_not_copied(tiny, tmp_path: Path):
    from quantkit import quantize

    source = Path(shutil.copytree(tiny(), tmp_path / "source"))
    (source / "README.md").write_text("---\nlicense: mit\n---\n# The original's words\n")
    quantize(str(source), "int8", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The original's words" not in card
    assert "license: mit" in card


def test_eighty_layers_and_experts(quantized, tmp_path: Path):
    """The page of a large model stays one that can be read: a cell per layer, a row for all experts."""
    folder = copy(quantized("fireq"), tmp_path)
    path = folder / "quantkit" / "report.json"
    report = json.loads(path.read_text())
    layer = report["layers"][0]
    for expert in range(16):
        layer["linears"][f"mlp.experts.{expert}.up_proj"] = layer["linears"]["mlp.up_proj"]
    report["layers"] = [layer] * 80
    path.write_text(json.dumps(report))
    text = render_page(collect(folder))
    assert "experts.*.up_proj" in text
    assert "experts.3" not in text
    assert text.count("<title>layer 79") >= 10
    assert len(text) < 1_000_000
    page = Page(text)
    for tag, name, value in page.attributes:
        if tag == "rect" and name in ("x", "y", "width", "height"):
            assert -1 <= float(value) <= 2000


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "quantkit" / "report.json").unlink(), "has no quantkit/report.json"),
        (lambda f: (f / "quantkit" / "report.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "quantkit" / "report.json").write_text("{}"), "not a report"),
        (lambda f: (f / "config.json").unlink(), "not an output of quantkit"),
    ],
)
def test_folders_without_a_report(quantized, tmp_path: Path, spoil, says: str):
    folder = copy(quantized("int4"), tmp_path)
    spoil(folder)
    with pytest.raises(QuantkitError, match=says):
        write_documents(folder)
