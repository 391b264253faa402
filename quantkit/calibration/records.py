"""Records of calibration data: where they come from, and the text of each.

A record is a mapping. In this order, the first of these fields that it has is its text:

    messages, conversations, conversation    a list of turns: the model's chat template is applied
    text, content, document                  a text
    prompt                                   a text, or turns; `completion` or `response` follows it where there is one
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from quantkit.calibration.sources import HUB_SETS
from quantkit.errors import QuantkitError

_TURNS = ("messages", "conversations", "conversation")
_TEXTS = ("text", "content", "document")
_PROMPT, _ANSWERS = "prompt", ("completion", "response")
_FIELDS = (*_TURNS, *_TEXTS, _PROMPT, *_ANSWERS)
# ShareGPT's names of those who speak.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_SUFFIXES = (".jsonl", ".json", ".parquet")
# What is drawn from at a time: enough to be no longer in the order of the file, little enough for any memory.
_POOL_RECORDS, _POOL_CHARACTERS = 10_000, 1 << 26
_LONGEST_LINE = 1 << 26


@dataclass(frozen=True)
class Record:
    """One record and where it stands, as `data.jsonl, line 3`."""

    where: str
    fields: dict[str, Any]


def has_records(name: str) -> bool:
    """Whether a source is a set of records; else it is one text."""
    return name in HUB_SETS or Path(name).suffix.lower() in _SUFFIXES


def read_records(name: str) -> Iterator[Record]:
    """The records of a named set or a file, in its order, read as they are asked for.

    Raises:
        QuantkitError: the set cannot be had here, the file cannot be read, or a record in it is broken.
    """
    if name in HUB_SETS:
        yield from _hub(name)
        return
    path = Path(name).expanduser()
    read = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}[path.suffix.lower()]
    try:
        yield from read(path)
    except OSError as error:
        raise QuantkitError(f"{name}: cannot be read ({error.strerror or error})") from None


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number in range(1, 1 << 62):
            line = file.readline(_LONGEST_LINE)
            if not line:
                return
            where = f"{path}, line {number}"
            if len(line) == _LONGEST_LINE:
                raise QuantkitError(
                    f"{where}: longer than {_LONGEST_LINE >> 20} MiB; one JSON object a line is read"
                )
            if line.strip():
                yield _record(where, _decode(where, line, "one JSON object a line is read"))


def _json(path: Path) -> Iterator[Record]:
    data = _decode(
        str(path), path.read_bytes(), "a list of objects is read; or one a line, in .jsonl"
    )
    if not isinstance(data, list):
        raise QuantkitError(f"{path}: a list of objects is read, not {type(data).__name__}")
    for number, entry in enumerate(data, 1):
        yield _record(f"{path}, record {number}", entry)


def _decode(where: str, data: bytes, form: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise QuantkitError(f"{where}: not UTF-8 (byte {error.start}); convert it first") from None
    except (ValueError, RecursionError) as error:
        raise QuantkitError(f"{where}: not valid JSON ({str(error)[:80]}); {form}") from None


def _record(where: str, entry: Any) -> Record:
    if not isinstance(entry, dict):
        raise QuantkitError(f"{where}: an object is expected, not {type(entry).__name__}")
    return Record(where, entry)


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise QuantkitError(
            f"{path}: reading parquet needs pyarrow; pip install 'quantkit[datasets]'"
        ) from None
    try:
        with ParquetFile(path) as file:
            found = file.schema_arrow.names
            columns = [name for name in _FIELDS if name in found]
            if not columns:
                raise QuantkitError(f"{path}: {_no_field(found)}")
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, row {number}", row)
    # UnicodeDecodeError of a string column is a ValueError.
    except (ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise QuantkitError(f"{path}: not a readable parquet file ({reason})") from None


def _hub(name: str) -> Iterator[Record]:
    wanted = HUB_SETS[name]
    files = {wanted.split: wanted.file} if wanted.file else None
    try:
        from datasets import load_dataset

        rows = load_dataset(wanted.path, data_files=files, split=wanted.split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield Record(f"{name}, record {number}", dict(row))
    # A missing package, no network, no cache, a lost connection: all end in the same advice.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise QuantkitError(
            f"{name}: {wanted.path} is not to be had here ({type(error).__name__}: {reason}); connect to the hub with "
            "`pip install 'quantkit[datasets]'`, or name a .jsonl or .parquet file of it"
        ) from None


def shuffled(records: Iterable[Record], seed: int) -> Iterator[Record]:
    """The records in a seeded order; of many, as many are looked ahead as a pool of bounded size holds."""
    random, pool, characters = Random(seed), [], 0
    for record in records:
        size = _size(record.fields)
        pool.append((record, size))
        characters += size
        while len(pool) > _POOL_RECORDS or characters > _POOL_CHARACTERS:
            at = random.randrange(len(pool))
            pool[at], pool[-1] = pool[-1], pool[at]
            drawn, size = pool.pop()
            characters -= size
            yield drawn
    random.shuffle(pool)
    for record, _ in pool:
        yield record


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return (
        sum(map(_size, value))
        if isinstance(value, list)
        else len(value)
        if isinstance(value, str)
        else 8
    )


def encode(record: Record, tokenizer: Any) -> list[int]:
    """A record's tokens, with the special tokens that the tokenizer, or its chat template, gives; none if it is empty.

    Raises:
        QuantkitError: it has no usable field, or its turns do not fit the model's chat template.
    """
    text, turns = _content(record)
    if turns is not None:
        # The template writes the special tokens itself.
        text = _apply_template(record.where, turns, tokenizer)
    if not text.strip():
        return []
    # verbose: no warning that a text is longer than the model's window, for it is cut.
    ids: list[int] = tokenizer(text, add_special_tokens=turns is None, verbose=False)["input_ids"]
    return ids


def _content(record: Record) -> tuple[str, list[dict[str, Any]] | None]:
    """A record's text, or its turns."""
    fields = {k: v for k, v in record.fields.items() if v is not None}
    for name in (n for n in _TURNS if n in fields):
        return "", _turns(f"{record.where}: {name}", fields[name])
    for name in (n for n in _TEXTS if n in fields):
        return _text(f"{record.where}: {name}", fields[name]), None
    if _PROMPT not in fields:
        raise QuantkitError(f"{record.where}: {_no_field(list(record.fields))}")
    prompt, where = fields[_PROMPT], f"{record.where}: {_PROMPT}"
    answer = next((n for n in _ANSWERS if n in fields), None)
    if isinstance(prompt, list):
        more = _turns(f"{record.where}: {answer}", fields[answer]) if answer else []
        return "", _turns(where, prompt) + more
    return _text(where, prompt) + (
        _text(f"{record.where}: {answer}", fields[answer]) if answer else ""
    ), None


def _no_field(found: list[str]) -> str:
    names = ", ".join(map(str, found))[:80] or "nothing"
    return f"none of the fields {', '.join(_TURNS[:1] + _TEXTS + (_PROMPT,))} in it; it has {names}"


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise QuantkitError(f"{where}: a text is expected, not {type(value).__name__}")
    return value


def _turns(where: str, value: Any) -> list[dict[str, Any]]:
    """Turns as chat templates read them: role and content, also from ShareGPT's `from` and `value`."""
    if not isinstance(value, list) or not value:
        raise QuantkitError(f"{where}: a list of turns is expected, not {_kind(value)}")
    turns = []
    for turn in value:
        if isinstance(turn, dict) and "from" in turn and "value" in turn:
            turn = {"role": _ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"]}
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise QuantkitError(
                f"{where}: each turn needs `role` and `content`, this is {_kind(turn)}"
            )
        turns.append(turn)
    return turns


def _kind(value: Any) -> str:
    return (
        "an empty list"
        if value == []
        else str(value)[:60]
        if isinstance(value, dict)
        else type(value).__name__
    )


def _apply_template(where: str, turns: list[dict[str, Any]], tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise QuantkitError(
            f"{where}: is a conversation, and this model's tokenizer has no chat template; calibrate on text"
        )
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split())[:120]
        raise QuantkitError(
            f"{where}: the model's chat template does not take it ({reason}); leave it out or mend it"
        ) from None
