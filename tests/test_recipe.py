from pathlib import Path

import pytest
from tiny_models import make_config

from quantkit.errors import QuantkitError
from quantkit.formats.scheme import ActivationFormat, Scheme, WeightFormat
from quantkit.models.structure import build_skeleton, find_structure
from quantkit.recipe import Recipe, recipe_names


@pytest.fixture(scope="module")
def structure():
    return find_structure(build_skeleton(make_config("llama"), "tiny"), "tiny")


@pytest.fixture(scope="module")
def linears(structure):
    return [name for name, _ in structure.modules()] + ["lm_head"]


def test_every_recipe_of_the_package_resolves(structure, linears):
    assert recipe_names() == [
        "crossquant",
        "crossquant-w4a4",
        "crossquant-w4a8",
        "fireq",
        "gptq",
        "gptq-refined",
        "int4",
        "int8",
        "kv4",
        "quest-hadamard",
        "quest-hadamard-offline",
        "quest-hadamard-w4a4",
        "quest-hadamard-w4a4kv4",
        "quest-hadamard-w8a8",
    ]
    for name in recipe_names():
        assert len(Recipe.load(name).resolve(structure, linears)) == (0 if name == "kv4" else 14)


def test_weights_may_stay_in_16_bits_beside_a_quantized_cache(tmp_path):
    recipe = Recipe.load("kv4")
    assert recipe.needs_calibration
    recipe.save(tmp_path / "again.yaml")
    assert Recipe.load(str(tmp_path / "again.yaml")) == recipe
    for setting, complaint in (
        ("kv_cache=null", "nothing to quantize"),
        ("activations={bits: 8}", "activations goes with quantized weights"),
        ("rotation={block: 128}", "rotation goes with quantized weights"),
    ):
        with pytest.raises(QuantkitError, match=complaint):
            Recipe.load("kv4", [setting])


def test_schemes_are_what_the_names_say():
    module = "model.layers.0.mlp.up_proj"
    assert Recipe.load("int4").scheme_of(module) == Scheme(WeightFormat(4, 128))
    assert Recipe.load("int8").scheme_of(module) == Scheme(
        WeightFormat(8, None), ActivationFormat(8)
    )
    assert Recipe.load("crossquant-w4a8").scheme_of(module) == Scheme(
        WeightFormat(4, 128), ActivationFormat(8)
    )
    assert Recipe.load("fireq").scheme_of(module) == Scheme(
        WeightFormat(4, 128, "fp8_channel"), ActivationFormat(8, "float")
    )
    assert Recipe.load("quest-hadamard-w4a4").scheme_of(module) == Scheme(
        WeightFormat(4, 128, half=True), ActivationFormat(4, half=True)
    )


def test_each_rotation_is_where_the_recipe_says(structure, linears):
    def online(*settings: str) -> dict[str, int | None]:
        schemes = Recipe.load("quest-hadamard", list(settings)).resolve(structure, linears)
        names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
        return {name: schemes[f"model.layers.1.{name}"].rotation for name in names}

    assert list(online().values()) == [None, None, None, 128]
    assert list(online("rotation.block=full").values()) == [None, None, None, 384]
    assert list(online("rotation.inputs=none").values()) == [None] * 4
    assert list(online("rotation={inputs: [o], block: full}").values()) == [None, 256, None, None]


def test_extends_merges_and_set_overrides(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: fireq\nweights: {clip: absmax}\n")
    recipe = Recipe.load(str(path), ["weights.group_size=64", "kv_cache.scale=fp8"])
    assert recipe.name == "mine"
    assert recipe.weights.clip == "absmax"
    assert recipe.weights.scale == "fp8_channel"
    assert recipe.weights.group_size == 64
    assert recipe.kv_cache is not None
    assert recipe.kv_cache.scale == "fp8"


def test_removing_the_cache_removes_what_serves_it_alone():
    recipe = Recipe.load("fireq", ["kv_cache=null"])
    assert recipe.kv_cache is None
    assert recipe.rope_scaling is None


def test_rules_give_a_module_another_scheme(structure, linears, tmp_path: Path):
    path = tmp_path / "mixed.yaml"
    path.write_text(
        "extends: crossquant-w4a8\nrules:\n"
        "  - match: '*.down_proj'\n    weights: {bits: 8, group_size: channel}\n"
        "  - {match: '*.layers.0.self_attn.o_proj', skip: true}\n"
    )
    schemes = Recipe.load(str(path)).resolve(structure, linears)
    assert schemes["model.layers.1.mlp.down_proj"].weights.bits == 8
    assert schemes["model.layers.1.mlp.up_proj"].weights.bits == 4
    assert "model.layers.0.self_attn.o_proj" not in schemes
    assert "model.layers.1.self_attn.o_proj" in schemes


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("weights: {bits: 9}", "weights.bits: 9 is not supported; 2, 3, 4, 5, 6, 7 or 8 is"),
        ("weights: {bits: 8, group_size: channel, scale: fp8_channel}", "FP8 group scales; 4 is"),
        ("weights: {bitz: 4}", "weights.bitz: unknown key; did you mean 'bits'?"),
        ("weigths: {bits: 4}", "weigths: unknown key; did you mean 'weights'?"),
        ("weights: {bits: four}", "weights.bits: 'four' is not supported"),
        ("weights: 4", "weights:"),
        ("{}", "weights: is required"),
        ("weights: {}\nrotation: {block: 92}", "rotation.block: 92 is no known Hadamard order"),
        ("weights: {}\ncalibration: {samples: 0}", "calibration.samples"),
        (
            "weights: {}\nrotation: {residual: true, inputs: [qkv, down]}",
            "rotation.inputs: qkv: turned in the weights already; inputs: ['down']",
        ),
        ("weights: {}\nrotation: {inputs: none}", "rotation.inputs: none, and nothing else"),
        (
            "weights: {}\nactivations: {bits: 6}",
            "activations.bits: 6 is supported on grid: half only",
        ),
        ("weights: {grid: half}", "needs rotation"),
        ("weights: [", "not valid YAML"),
        ("- 1", "a mapping is expected, not list"),
        ("extends: nothing-like-it\nweights: {}", "cannot be read"),
        ("extends: me.yaml", "extends itself"),
        ("weights: {}\nrope_scaling: {}", "there is none"),
    ],
)
def test_a_bad_recipe_says_what_and_where(tmp_path: Path, yaml: str, says: str):
    path = tmp_path / "me.yaml"
    path.write_text(yaml)
    with pytest.raises(QuantkitError, match=r"me\.yaml|nothing-like-it") as error:
        Recipe.load(str(path))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("weights.bitz=4", "'weights.bitz' is not a setting; weights.bits is"),
        ("nope.bits=4", "is not a setting"),
        ("weights.bits.more=4", "is not a setting"),
        ("weights.bits", "path=value is expected"),
        ("=4", "path=value is expected"),
        ("weights.bits=[", "is not a YAML value"),
    ],
)
def test_a_bad_setting_says_what(setting: str, says: str):
    with pytest.raises(QuantkitError) as error:
        Recipe.load("int4", [setting])
    assert says in str(error.value)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(QuantkitError, match="did you mean 'fireq'"):
        Recipe.load("firq")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["ignore=[lm_heat]"], "'lm_heat' matches no linear"),
        (["rules=[{match: '*.upproj', skip: true}]"], "'*.upproj' matches no linear"),
        (["weights.group_size=256"], "weights.group_size 256 does not divide the 384 in-features"),
        (["rotation={block: 256}"], "rotation.block 256 does not divide the 384 in-features"),
        (["ignore=['*']"], "nothing is left"),
        (["rules=[{match: '*.q_proj', skip: true}]"], "are fused by servers"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model(structure, linears, settings, says):
    with pytest.raises(QuantkitError) as error:
        Recipe.load("int4", settings).resolve(structure, linears)
    assert says in str(error.value)
