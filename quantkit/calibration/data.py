"""Text -> blocks of tokens, for calibration and evaluation."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import QuantkitError

BUNDLED_CALIBRATION = "bundled"
BUNDLED_SAMPLE = "sample"
WIKITEXT = "wikitext"
_WIKITEXT_VARIABLE = "QUANTKIT_WIKITEXT"


@dataclass(frozen=True)
class CalibrationSet:
    """Token blocks [samples, seqlen] int64, with what is recorded of them in the output."""

    name: str
    tokens: torch.Tensor
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        samples, seqlen = self.tokens.shape
        return {"name": self.name, "samples": samples, "seqlen": seqlen, "sha256": self.sha256}


def read_text(name: str, *, split: str) -> str:
    """The text that a user named: `bundled`, `sample`, `wikitext`, or a file.

    Args:
        name: a name or a path.
        split: which split of a dataset: `train` or `test`.

    Raises:
        QuantkitError: no such file, not UTF-8, empty, or a dataset that cannot be had here.
    """
    if name == BUNDLED_CALIBRATION:
        return _asset("calibration.txt")
    if name == BUNDLED_SAMPLE:
        return _asset("sample.txt")
    if name == WIKITEXT:
        return _wikitext(split)
    path = Path(name).expanduser()
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise QuantkitError(
            f"{name}: no such text; name a UTF-8 text file, {WIKITEXT}, {BUNDLED_SAMPLE} or {BUNDLED_CALIBRATION}"
        ) from None
    except OSError as error:
        raise QuantkitError(f"{name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise QuantkitError(
            f"{name}: not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    if "\0" in text:
        raise QuantkitError(f"{name}: not text: it holds zero bytes")
    if not text.strip():
        raise QuantkitError(f"{name}: the text is empty")
    return text


def _asset(name: str) -> str:
    return files("quantkit.assets").joinpath("texts").joinpath(name).read_text(encoding="utf-8")


def _wikitext(split: str) -> str:
    """wikitext-2-raw-v1's split as one text; the test split also from the file that a variable names."""
    local = os.environ.get(_WIKITEXT_VARIABLE)
    if local and split == "test":
        return read_text(local, split=split)
    try:
        from datasets import load_dataset

        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    except (
        Exception
    ) as error:  # a missing package, no network, no cache: all end in the same advice
        raise QuantkitError(
            f"wikitext: not to be had here ({type(error).__name__}); connect to the hub with the "
            f"`datasets` package installed, or name a copy of its test split in ${_WIKITEXT_VARIABLE}"
        ) from None
    return "\n\n".join(rows["text"])


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """The whole text tokenized once, int64 [tokens], without special tokens in between."""
    # Silence the warning that the text is longer than the model's window: it is cut into windows here.
    ids = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_blocks(
    tokenizer: Any, name: str, samples: int, seqlen: int, seed: int
) -> CalibrationSet:
    """`samples` blocks of `seqlen` tokens, drawn without overlap from the text in a seeded order.

    Raises:
        QuantkitError: the text is shorter than that.
    """
    tokens = tokenize(tokenizer, read_text(name, split="train"))
    blocks = tokens.numel() // seqlen
    if blocks < samples:
        raise QuantkitError(
            f"calibration text {name}: {tokens.numel()} tokens, {samples} samples of {seqlen} need "
            f"{samples * seqlen}; use --samples {blocks}, a longer text or a smaller --seqlen"
            if blocks
            else f"calibration text {name}: only {tokens.numel()} tokens, one sample needs {seqlen}; use a longer text"
        )
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))[:samples]
    chosen = tokens[: blocks * seqlen].view(blocks, seqlen)[order.sort().values]
    return CalibrationSet(name, chosen, hashlib.sha256(chosen.numpy().tobytes()).hexdigest())
