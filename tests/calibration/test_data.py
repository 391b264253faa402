from pathlib import Path

import pytest
import torch

from quantkit.calibration.data import calibration_blocks, read_text, tokenize
from quantkit.errors import QuantkitError
from quantkit.pipeline import load_tokenizer


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
    assert a.to_dict() == {"name": str(text), "samples": 8, "seqlen": 64, "sha256": a.sha256}


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
