"""What `--calib` names: one source of calibration data, or a mixture with a number of samples from each."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantkitError

BUNDLED_CALIBRATION = "bundled"
BUNDLED_SAMPLE = "sample"
WIKITEXT = "wikitext"
# Texts that are read as one; everything else with a name is a set of records.
TEXTS = (BUNDLED_CALIBRATION, BUNDLED_SAMPLE, WIKITEXT)


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub, streamed: none of these is downloaded whole.

    Attributes:
        path, split: as `datasets.load_dataset` takes them.
        file: the one file of the repository that is read, or None for all of the split.
    """

    path: str
    split: str
    file: str | None = None


# As the field uses them: GPTQ's first file of c4, AWQ's copy of the Pile's validation split (the original is gone),
# the supervised split of UltraChat.
HUB_SETS = {
    "c4": HubSet("allenai/c4", "train", "en/c4-train.00000-of-01024.json.gz"),
    "pile-val": HubSet("mit-han-lab/pile-val-backup", "validation"),
    "ultrachat": HubSet("HuggingFaceH4/ultrachat_200k", "train_sft"),
}
NAMES = (BUNDLED_CALIBRATION, WIKITEXT, *HUB_SETS, BUNDLED_SAMPLE)


@dataclass(frozen=True)
class Source:
    """A name of NAMES or a file, and how many samples it gives (None: all there are to be)."""

    name: str
    weight: int | None = None


def parse_sources(text: str) -> list[Source]:
    """`NAME`, `NAME:64` or `NAME:64,NAME:64`, each NAME one of NAMES or a file (which need not be there yet).

    Raises:
        QuantkitError: a weight is no number of samples, one is missing, or a source is named twice.
    """
    if text in NAMES or Path(text).expanduser().exists():
        return [Source(text)]
    parts = text.split(",")
    found = [_parse(part.strip(), text) for part in parts]
    if len(found) > 1:
        bare = next((source.name for source in found if source.weight is None), None)
        if bare is not None:
            raise QuantkitError(
                f"--calib {text}: {bare or 'an empty name'} has no number of samples; c4:64,ultrachat:64 is the form"
            )
        names = [source.name for source in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise QuantkitError(f"--calib {text}: {twice} is named twice; add its numbers up")
    return found


def _parse(part: str, whole: str) -> Source:
    name, colon, weight = part.rpartition(":")
    if not colon or Path(part).expanduser().exists():
        return Source(part)
    if not re.fullmatch("[1-9][0-9]{0,8}", weight):
        raise QuantkitError(
            f"--calib {whole}: {weight!r} is no number of samples; c4:64,ultrachat:64 is the form"
        )
    return Source(name, int(weight))


def named_samples(text: str) -> int | None:
    """How many samples a mixture names in all; None for one source without a number.

    Raises:
        QuantkitError: as `parse_sources`.
    """
    weights = [source.weight for source in parse_sources(text)]
    return None if None in weights else sum(weight or 0 for weight in weights)


def check_sources(text: str) -> None:
    """Refuse what cannot be had, before anything is read.

    Raises:
        QuantkitError: as `parse_sources`, or neither a known name nor a file.
    """
    for source in parse_sources(text):
        if source.name in NAMES or Path(source.name).expanduser().exists():
            continue
        close = difflib.get_close_matches(source.name, NAMES, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        raise QuantkitError(
            f"{source.name}: no such text; {hint}{', '.join(NAMES)} are known, "
            "and any .txt, .jsonl, .json or .parquet file"
        )


def share_samples(sources: list[Source], samples: int) -> list[int]:
    """How many of `samples` each source gives: its weight's share, the largest remainders rounded up."""
    weights = [source.weight or 1 for source in sources]
    total = sum(weights)
    shares = [samples * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: -(samples * weights[i] % total))
    for i in by_remainder[: samples - sum(shares)]:
        shares[i] += 1
    return shares
