from pathlib import Path

import pytest

from quantkit.calibration.sources import (
    Source,
    check_sources,
    named_samples,
    parse_sources,
    share_samples,
)
from quantkit.errors import QuantkitError
from quantkit.recipe import Recipe


def test_one_name_a_number_and_a_mixture():
    assert parse_sources("c4") == [Source("c4")]
    assert parse_sources("c4:64") == [Source("c4", 64)]
    mixture = "c4:64, ultrachat:32,some/where.jsonl:1"
    assert parse_sources(mixture) == [
        Source("c4", 64), Source("ultrachat", 32), Source("some/where.jsonl", 1)
    ]  # fmt: skip
    assert named_samples(mixture) == 97
    assert named_samples("c4") is None


def test_a_file_whose_name_looks_like_a_mixture(tmp_path: Path):
    odd = tmp_path / "a:b,c:d.txt"
    odd.write_text("text")
    assert parse_sources(str(odd)) == [Source(str(odd))]
    check_sources(str(odd))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c4:many", "'many' is no number of samples"),
        ("c4:0", "'0' is no number"),
        ("c4:-1", "'-1' is no number"),
        ("c4:1.5", "'1.5' is no number"),
        ("c4:", "'' is no number"),
        ("c4:٣", "is no number"),
        ("c4,ultrachat:64", "c4 has no number of samples"),
        ("c4:64,", "an empty name has no number"),
        ("c4:64,c4:1", "c4 is named twice"),
        ("wikitext2", "wikitext2: no such text; did you mean wikitext?"),
        ("ultrachat:64,nothing.jsonl:1", "nothing.jsonl: no such text; bundled, wikitext"),
    ],
)
def test_refused(text: str, message: str):
    with pytest.raises(QuantkitError) as error:
        check_sources(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_shares():
    sources = parse_sources("c4:3,ultrachat:2,wikitext:1")
    assert share_samples(sources, 6) == [3, 2, 1]
    assert share_samples(sources, 3) == [2, 1, 0]
    assert [sum(share_samples(sources, n)) for n in range(1, 50)] == list(range(1, 50))
    assert share_samples(parse_sources("c4"), 64) == [64]


def test_recipes_say_the_same(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("extends: fireq\ncalibration: {source: 'c4:64,ultrachat:64'}\n")
    found = Recipe.load(str(path)).calibration
    assert (found.source, found.samples) == ("c4:64,ultrachat:64", 128)
    assert Recipe.load(str(path), ["calibration.samples=10"]).calibration.samples == 10
    path.write_text("extends: fireq\ncalibration: {source: 'c4:x'}\n")
    with pytest.raises(QuantkitError, match=r"calibration.source: .*'x' is no number"):
        Recipe.load(str(path))
