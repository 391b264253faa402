import json
from pathlib import Path

import pytest
import torch

from quantkit.calibration.data import calibration_blocks, read_text, tokenize
from quantkit.errors import QuantkitError
from quantkit.models.names import bundled_path
from quantkit.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny())


def test_blocks_are_pieces_of_the_text_without_overlap(tokenizer, text: Path):
    whole = tokenize(tokenizer, text.read_text())
    found = calibration_blocks(tokenizer, str(text), 20, 64, seed=0)
    assert found.tokens.shape == (20, 64)
    starts = []
    for block in found.tokens:
        at = [i for i in range(0, whole.numel() - 63, 64) if torch.equal(whole[i : i + 64], block)]
        starts.append(at[0])
    assert starts == sorted(starts)


def test_the_seed_decides_and_the_hash_tells(tokenizer, text: Path):
    a, b, c = (calibration_blocks(tokenizer, str(text), 8, 64, seed=s) for s in (0, 0, 1))
    assert a.sha256 == b.sha256 != c.sha256
    assert torch.equal(a.tokens, b.tokens)
    one = {"name": str(text), "samples": 8, "sha256": a.sha256}
    assert a.to_dict() == one | {"seqlen": 64, "sources": [one]}


def write_records(path: Path, count: int, words: int = 12) -> str:
    entries = [{"text": f"record {n}: " + "and so on " * (n % words)} for n in range(count)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_records_are_laid_end_to_end_and_blocks_begin_as_prompts_do(tmp_path: Path):
    tokenizer = load_tokenizer(bundled_path())
    bos = tokenizer.bos_token_id
    name = write_records(tmp_path / "a.jsonl", 60)
    found = calibration_blocks(tokenizer, name, 12, 32, seed=0)
    assert found.tokens.shape == (12, 32)
    assert bool((found.tokens[:, 0] == bos).all())
    assert found.to_dict()["sources"][0]["records"] <= 60
    # Every piece between two beginnings is a record, whole or cut to a block's length.
    whole = {json.loads(line)["text"] for line in Path(name).read_text().splitlines()}
    words = tokenizer.decode([t for block in found.tokens.tolist() for t in block[1:]])
    for piece in words.split("<s>")[1:-1]:
        assert any(piece.strip() in text for text in whole), piece
    again = calibration_blocks(tokenizer, name, 12, 32, seed=0)
    other = calibration_blocks(tokenizer, name, 12, 32, seed=1)
    assert found.sha256 == again.sha256 != other.sha256


def test_a_long_record_gives_no_more_than_a_block(tokenizer, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "long " * 5000}) + "\n" + json.dumps({"text": "short"}))
    with pytest.raises(QuantkitError, match="2 records give 1 samples of 64 tokens, 4 are wanted"):
        calibration_blocks(tokenizer, str(path), 4, 64, seed=0)


def test_a_mixture_has_its_numbers_from_each(tokenizer, text: Path, tmp_path: Path):
    name = write_records(tmp_path / "a.jsonl", 500)
    found = calibration_blocks(tokenizer, f"{text}:6,{name}:2", 8, 64, seed=0)
    from_text = calibration_blocks(tokenizer, str(text), 6, 64, seed=0)
    rows = {tuple(row) for row in found.tokens.tolist()}
    assert sum(tuple(row) in rows for row in from_text.tokens.tolist()) == 6
    # Not all of one before all of the other: the first blocks are what searches look at.
    assert not torch.equal(found.tokens[:6], from_text.tokens)
    parts = found.to_dict()["sources"]
    assert [(part["name"], part["samples"]) for part in parts] == [(str(text), 6), (name, 2)]
    assert parts[0]["sha256"] == from_text.sha256
    assert len({found.sha256, *(part["sha256"] for part in parts)}) == 3
    assert calibration_blocks(tokenizer, f"{text}:6,{name}:2", 4, 64, 0).tokens.shape == (4, 64)


def test_wikitext_from_the_file_that_the_variable_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "wiki.txt"
    path.write_text(" = Title = \n")
    monkeypatch.setenv("QUANTKIT_WIKITEXT", str(path))
    assert read_text("wikitext", split="test") == " = Title = \n"
    # It is the test split: calibrating on it would be calibrating on what is measured.
    with pytest.raises(QuantkitError, match="wikitext: not to be had here"):
        read_text("wikitext", split="train")


def test_the_real_wikitext_where_it_is_at_hand(monkeypatch: pytest.MonkeyPatch):
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2-raw-test.txt"
    if not path.is_file():
        pytest.skip("no copy of wikitext-2's test split beside the repository")
    monkeypatch.setenv("QUANTKIT_WIKITEXT", str(path))
    assert len(read_text("wikitext", split="test")) > 1_000_000
