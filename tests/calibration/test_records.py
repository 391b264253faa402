import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit.calibration import records
from quantkit.calibration.records import Record, encode, has_records, read_records, shuffled
from quantkit.errors import QuantkitError
from quantkit.models.names import bundled_path
from quantkit.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    found = load_tokenizer(bundled_path())
    found.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    return found


def lines(path: Path, *entries: Any) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return str(path)


def refusal(name: str) -> str:
    with pytest.raises(QuantkitError) as error:
        list(read_records(name))
    assert "\n" not in str(error.value)
    return str(error.value)


TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
SHAREGPT = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]
PROMPTED = "<s><user>Who?<assistant>I."


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text": "In the beginning"}, "<s>In the beginning"),
        ({"id": 1, "content": "In the beginning"}, "<s>In the beginning"),
        ({"prompt": "In the"}, "<s>In the"),
        ({"prompt": "In the", "completion": " beginning"}, "<s>In the beginning"),
        ({"messages": TURNS}, PROMPTED),
        ({"prompt": "Who?", "messages": TURNS}, PROMPTED),  # as UltraChat has it
        ({"text": None, "conversations": SHAREGPT}, PROMPTED),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, PROMPTED),
        ({"text": " \n"}, ""),
    ],
)
def test_text_of_a_record(tokenizer, fields: dict, text: str):
    ids = encode(Record("here", fields), tokenizer)
    assert tokenizer.decode(ids) == text
    # One, never two: a template writes it itself.
    assert ids.count(tokenizer.bos_token_id) == (1 if text else 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "a", "label": 3}, "here: none of the fields messages, text, content"),
        ({"text": 7}, "here: text: a text is expected, not int"),
        ({"messages": "hello"}, "here: messages: a list of turns is expected, not str"),
        ({"messages": []}, "not an empty list"),
        ({"messages": [{"speaker": "me"}]}, "each turn needs `role`"),
        ({"messages": [{"role": "nobody", "content": ""}]}, "does not take it (who?)"),
    ],
)
def test_unusable_records(tokenizer, fields: dict, message: str):
    with pytest.raises(QuantkitError) as error:
        encode(Record("here", fields), tokenizer)
    assert message in str(error.value)


def test_a_conversation_without_a_template():
    with pytest.raises(QuantkitError, match="has no chat template"):
        encode(Record("here", {"messages": TURNS}), SimpleNamespace(chat_template=None))


def test_json_files(tmp_path: Path):
    name = lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    Path(name).write_text(Path(name).read_text() + "\n")
    assert [r.fields["text"] for r in read_records(name)] == ["a", "b"]
    whole = tmp_path / "a.json"
    whole.write_text('[{"text": "a"}]')
    assert list(read_records(str(whole))) == [Record(f"{whole}, record 1", {"text": "a"})]
    assert has_records(name)
    assert has_records("c4")
    assert not has_records("wikitext")
    whole.write_text('{"text": "a"}')
    assert "a list of objects is read, not dict" in refusal(str(whole))


def test_broken_lines_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.jsonl"
    for broken, message in [
        (b'{"text": "b"', "line 3: not valid JSON"),
        (b'"text"', "line 3: an object is expected, not str"),
        (b'{"text": "\xff"}', "line 3: not UTF-8 (byte 10)"),
        (b"[" * 100_000, "line 3: not valid JSON"),
    ]:
        path.write_bytes(b'{"text": "a"}\n\n' + broken)
        assert message in refusal(str(path))
    monkeypatch.setattr(records, "_LONGEST_LINE", 1 << 20)
    path.write_bytes(b"{" * (1 << 21))
    assert "line 1: longer than 1 MiB" in refusal(str(path))
    assert "cannot be read" in refusal(str(tmp_path / "gone.jsonl"))


def test_parquet(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = {"id": list(range(200)), "text": [f"text {n}" for n in range(200)]}
    parquet.write_table(pa.table(table), path)
    found = list(read_records(str(path)))
    assert [r.fields for r in found] == [{"text": f"text {n}"} for n in range(200)]
    assert found[-1].where == f"{path}, row 200"
    parquet.write_table(pa.table({"messages": [TURNS]}), path)
    [chat] = read_records(str(path))
    assert tokenizer.decode(encode(chat, tokenizer)) == PROMPTED
    parquet.write_table(pa.table({"id": [1]}), path)
    assert "none of the fields messages, text" in refusal(str(path))
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable parquet file" in refusal(str(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow; pip install" in refusal(str(path))


def test_named_sets_are_streamed(monkeypatch: pytest.MonkeyPatch):
    asked: list = []

    def load_dataset(path: str, **settings: Any) -> Any:
        asked.append((path, settings))
        return ({"text": str(n)} for n in range(1_000_000_000))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("c4", "pile-val", "ultrachat"):
        assert next(read_records(name)) == Record(f"{name}, record 1", {"text": "0"})
    assert [path for path, _ in asked] == [
        "allenai/c4", "mit-han-lab/pile-val-backup", "HuggingFaceH4/ultrachat_200k"
    ]  # fmt: skip
    assert all(settings["streaming"] for _, settings in asked)
    assert [settings["split"] for _, settings in asked] == ["train", "validation", "train_sft"]


def test_datasets_itself_streams_what_we_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The arguments as `datasets` takes them, with a folder in the place of the hub's repository."""
    pytest.importorskip("datasets")
    (tmp_path / "en").mkdir()
    lines(tmp_path / "en" / "part.jsonl", {"text": "a"}, {"text": "b"})
    monkeypatch.setitem(
        records.HUB_SETS, "c4", records.HUB_SETS["c4"].__class__(str(tmp_path), "train", "en/part.jsonl")
    )  # fmt: skip
    assert [r.fields for r in read_records("c4")] == [{"text": "a"}, {"text": "b"}]
    lines(tmp_path / "en" / "part.jsonl", {"text": "a"})
    monkeypatch.setitem(
        records.HUB_SETS, "c4", records.HUB_SETS["c4"].__class__(str(tmp_path), "nothing")
    )
    assert "is not to be had here" in refusal("c4")


def test_shuffling_looks_ahead_within_bounds(monkeypatch: pytest.MonkeyPatch):
    def endless():
        for n in range(10**9):
            yield Record(str(n), {"text": "x" * 10})

    monkeypatch.setattr(records, "_POOL_RECORDS", 20)
    drawn = shuffled(endless(), seed=0)
    first = [int(next(drawn).where) for _ in range(100)]
    assert len(set(first)) == 100
    assert first != sorted(first)
    assert max(first) < 121
    monkeypatch.setattr(records, "_POOL_CHARACTERS", 50)
    assert int(next(shuffled(endless(), seed=0)).where) < 7

    few = [Record(str(n), {}) for n in range(10)]
    assert sorted(r.where for r in shuffled(few, 1)) == [r.where for r in few]
    assert list(shuffled(few, 1)) == list(shuffled(few, 1)) != list(shuffled(few, 2))
