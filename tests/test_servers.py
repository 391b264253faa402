"""docs/serving.md says of each recipe what the code says."""

from contextlib import suppress
from pathlib import Path

import pytest

from quantkit.cli.main import main
from quantkit.formats.scheme import ActivationFormat, Scheme, WeightFormat
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, recipe_names
from quantkit.servers import SERVERS, VLLM_CPU, VLLM_GPU, VLLM_HOPPER, who_serves

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"


def table() -> dict[str, list[str]]:
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").split("## Who runs what")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and set(cells[0]) != {"-"}:
            rows[cells[0]] = cells[1:]
        elif line.startswith("##"):
            break
    return rows


def test_every_recipe_and_server_has_a_cell():
    rows = table()
    assert rows.pop("recipe") == list(SERVERS)
    assert {name.split(",")[0].strip("`") for name in rows} == set(recipe_names())


@pytest.mark.parametrize("row", [row for row in table() if row != "recipe"])
def test_the_page_says_what_plan_says(row: str, tiny):
    name, _, setting = row.partition(", ")
    recipe = Recipe.load(name.strip("`"), [setting.strip("`")] if setting else None)
    servers = make_plan(str(tiny()), recipe).servers
    assert [servers[s].partition(":")[0].partition(";")[0] for s in SERVERS] == table()[row]


def test_transformers_stacks_no_experts_of_bytes():
    plain, packed = (
        Scheme(WeightFormat(8, None), ActivationFormat(8)), Scheme(WeightFormat(4, 128))
    )  # fmt: skip
    name = "model.layers.0.mlp.experts.0.up_proj"
    assert who_serves({name: plain}, None)["transformers"].startswith("plugin")
    assert who_serves({name: packed}, None)["transformers"] == "native"


def test_int4_activations_are_not_transformers_own():
    """Its codes of negative maxima are undecided, whatever the weights have."""
    for bits in (3, 4):
        said = who_serves({"a": Scheme(WeightFormat(bits, 128), ActivationFormat(4))}, None)
        assert said["transformers"].startswith("plugin")
        assert said["transformers"].endswith("native with other codes of negative maxima")
        assert "maxima" not in said["SGLang"]
    for activations in (None, ActivationFormat(8), ActivationFormat(8, "float")):
        said = who_serves({"a": Scheme(WeightFormat(4, 128), activations)}, None)
        assert said["transformers"] == "native"


@pytest.mark.parametrize("server", [VLLM_CPU, VLLM_HOPPER, VLLM_GPU])
def test_experts_under_vllm(server: str):
    """On a CPU by quantkit, which brings no fused experts to GPUs."""
    mixed, packed = Scheme(WeightFormat(4, 128), ActivationFormat(8)), Scheme(WeightFormat(4, 128))
    linear, expert = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts.0.up_proj"

    def how(schemes: dict[str, Scheme]) -> str:
        return who_serves(schemes, None)[server]

    assert not how({linear: mixed}).startswith("refused")
    if server == VLLM_CPU:
        assert how({linear: mixed, expert: mixed}).startswith("emulated")
        assert how({expert: packed}).startswith("plugin")
        assert how({expert: packed}).endswith("without it, refused")
    else:
        assert how({linear: mixed, expert: mixed}).startswith("refused")
        assert how({expert: packed}) == "native"


def test_what_servers_would_compute_wrongly_says_so_wherever_a_user_looks(
    quantized, tiny, capsys, monkeypatch
):
    """Online rotations: in the plan, in the verification and on the model card."""
    folder = quantized("quest-hadamard")
    for arguments in (
        ["plan", str(tiny()), "--recipe", "quest-hadamard"],
        ["verify", str(folder)],
    ):
        monkeypatch.setattr("sys.argv", ["quantkit", *arguments])
        with suppress(SystemExit):
            main()
        said = " ".join(capsys.readouterr().out.split())
        assert "transformers plugin: import quantkit; without it, refused" in said
        assert "SGLang refused; `quantkit export` writes what it takes" in said
    card = (folder / "README.md").read_text()
    assert "| transformers | plugin: import quantkit; without it, refused |" in card
    assert "| SGLang | refused; `quantkit export` writes what it takes |" in card
