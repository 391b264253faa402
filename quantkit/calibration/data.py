"""Text -> blocks of tokens, for calibration and evaluation."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.records import encode, has_records, read_records, shuffled
from quantkit.calibration.sources import (
    BUNDLED_CALIBRATION,
    BUNDLED_SAMPLE,
    WIKITEXT,
    check_sources,
    parse_sources,
    share_samples,
)
from quantkit.errors import QuantkitError

_WIKITEXT_VARIABLE = "QUANTKIT_WIKITEXT"


@dataclass(frozen=True)
class CalibrationSet:
    """Token blocks [samples, seqlen] int64, with what is recorded of them in the output.

    Attributes:
        sources: of each source its name, samples, the sha256 of its tokens and, of records, how many were used.
    """

    name: str
    tokens: torch.Tensor
    sha256: str
    sources: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        samples, seqlen = self.tokens.shape
        whole = {"name": self.name, "samples": samples, "seqlen": seqlen, "sha256": self.sha256}
        return whole | {"sources": list(self.sources)}


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
    tokenizer: Any, calib: str, samples: int, seqlen: int, seed: int
) -> CalibrationSet:
    """`samples` blocks of `seqlen` tokens from what `--calib` names.

    A text (`bundled`, `wikitext`, a .txt file) is tokenized as one and cut into windows, of which some are drawn, as
    perplexity is measured (GPTQ's way, arXiv 2210.17323). Records (jsonl, parquet, data sets) come in a seeded order,
    each with its special tokens and at most `seqlen` tokens long, and are laid end to end into blocks that begin as
    each of the model's prompts does: with the first special token, where the tokenizer sets one. Nothing is padded and
    no record is left out for being short. A mixture's blocks are put in a seeded order.

    Args:
        calib: as `sources.parse_sources` reads it.
        samples: in all; a mixture's weights are shares of it.
        seed: of what is drawn.

    Raises:
        QuantkitError: a source cannot be read, or has fewer tokens than that.
    """
    check_sources(calib)
    sources = parse_sources(calib)
    drawn, facts = [], []
    for source, count in zip(sources, share_samples(sources, samples)):
        if count:
            draw = _from_records if has_records(source.name) else _from_text
            blocks, found = draw(tokenizer, source.name, count, seqlen, seed)
            drawn.append(blocks)
            facts.append({"name": source.name, "samples": count, "sha256": _hash(blocks)} | found)
    tokens = torch.cat(drawn)
    if len(drawn) > 1:
        tokens = tokens[torch.randperm(samples, generator=torch.Generator().manual_seed(seed))]
    return CalibrationSet(calib, tokens, _hash(tokens), tuple(facts))


def _hash(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _from_text(
    tokenizer: Any, name: str, samples: int, seqlen: int, seed: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Windows [samples, seqlen] of one text, in its order."""
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
    return tokens[: blocks * seqlen].view(blocks, seqlen)[order.sort().values], {}


def _from_records(
    tokenizer: Any, name: str, samples: int, seqlen: int, seed: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Blocks [samples, seqlen] of records laid end to end, and how many records that took."""
    first = _first_token(tokenizer)
    blocks: list[list[int]] = []
    waiting: list[int] = []
    records = 0
    for record in shuffled(read_records(name), seed):
        ids = encode(record, tokenizer)
        if not ids:
            continue
        records += 1
        waiting += ids[:seqlen]
        while len(blocks) < samples and len(waiting) >= seqlen:
            head = [] if first is None or waiting[0] == first else [first]
            taken = seqlen - len(head)
            blocks.append(head + waiting[:taken])
            del waiting[:taken]
        if len(blocks) == samples:
            return torch.tensor(blocks, dtype=torch.int64), {"records": records}
    raise QuantkitError(
        f"calibration data {name}: {records} records give {len(blocks)} samples of {seqlen} tokens, {samples} are "
        "wanted; use fewer --samples, more records or a smaller --seqlen"
    )


def _first_token(tokenizer: Any) -> int | None:
    """What the tokenizer sets before each text, or None."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = getattr(tokenizer, "bos_token_id", None)
    return int(bos) if bos is not None and ids and ids[0] == bos else None
