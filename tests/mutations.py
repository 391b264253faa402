"""Broken and hostile inputs, made from whole ones by a seeded choice: what a download or a bad disk could hold."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random], str]

# Values that no field expects.
STRANGE: list[Any] = [
    None, True, -1, 0, 1.5, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\u0000",
    "../../etc/passwd", "/etc/passwd", "a" * 3000, [], {}, [[]], {"x": {"y": []}}, [1, 2, 3], ["../x"],
]  # fmt: skip


def _nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def _paths(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value in a JSON document."""
    found = [here] if here else []
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        found += _paths(value, (*here, key))
    return found


def _put(data: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def change_json(file: str) -> Mutation:
    """One value of a JSON file is replaced by a strange one, removed, or a key added."""

    def mutate(folder: Path, choice: random.Random) -> str:
        data = json.loads((folder / file).read_text())
        path = choice.choice(_paths(data)[:400])
        value = choice.choice(STRANGE)
        _put(data, path, value)
        (folder / file).write_text(json.dumps(data))
        return f"{file}: {'.'.join(map(str, path))} = {str(value)[:40]}"

    return mutate


def change_bytes(file: str, first: int = 4096) -> Mutation:
    """Bytes near the beginning are changed, inserted, or the file is cut."""

    def mutate(folder: Path, choice: random.Random) -> str:
        raw = bytearray((folder / file).read_bytes())
        kind = choice.choice(["flip", "cut", "insert", "zero", "empty", "garbage"])
        at = choice.randrange(min(first, len(raw)))
        if kind == "flip":
            for _ in range(choice.randint(1, 8)):
                raw[choice.randrange(min(first, len(raw)))] ^= 1 << choice.randrange(8)
        elif kind == "cut":
            del raw[choice.randrange(len(raw)) :]
        elif kind == "insert":
            raw[at:at] = choice.randbytes(choice.randint(1, 64))
        elif kind == "zero":
            raw[at : at + 64] = bytes(len(raw[at : at + 64]))
        elif kind == "empty":
            raw.clear()
        else:
            raw = bytearray(choice.randbytes(choice.randint(1, 500)))
        (folder / file).write_bytes(raw)
        return f"{file}: {kind} at {at}"

    return mutate


def nest_json(file: str) -> Mutation:
    def mutate(folder: Path, choice: random.Random) -> str:
        levels = choice.choice([1000, 100_000])
        (folder / file).write_text(f'{{"a": {_nested(levels)}}}')
        return f"{file}: {levels} levels"

    return mutate


def change_header(file: str = "model.safetensors") -> Mutation:
    """A well-formed safetensors header that lies."""

    def mutate(folder: Path, choice: random.Random) -> str:
        raw = (folder / file).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        name = choice.choice([n for n in header if n != "__metadata__"])
        kind = choice.choice(
            ["dtype", "shape", "offsets", "rename", "drop", "length", "entry", "alias"]
        )
        if kind == "dtype":
            header[name]["dtype"] = choice.choice(["F64", "I8", "F4", "x", None, 5, "BF16 ", "I64"])
        elif kind == "shape":
            header[name]["shape"] = choice.choice(
                [
                    [2**40, 2**40],
                    [-1, -1],
                    "12",
                    [1.5],
                    [],
                    [True],
                    [2**62, 4],
                    None,
                    [0],
                    ["8", "8"],
                ]
            )
        elif kind == "offsets":
            header[name]["data_offsets"] = choice.choice(
                [[0, 2**60], [-8, 8], [8, 0], ["0", "8"], [0], None, [0.5, 8], [2**63, 2**64]]
            )
        elif kind == "rename":
            header[choice.choice(["../evil", "/etc/x", "", "a\nb", "\u0000"])] = header.pop(name)
        elif kind == "drop":
            del header[name]
        elif kind == "entry":
            header[name] = choice.choice(STRANGE)
        elif kind == "alias":
            other = choice.choice([n for n in header if n not in ("__metadata__", name)])
            header[name] = dict(header[other])
        new = json.dumps(header).encode()
        claimed = choice.choice([2**63, 2**40, 0, len(new) - 1]) if kind == "length" else len(new)
        (folder / file).write_bytes(struct.pack("<Q", claimed) + new + data)
        return f"{file}: header {kind} of {name}"

    return mutate


def change_index(folder: Path, choice: random.Random) -> str:
    """An index beside the weights that names what it should not."""
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    names = [n for n in header if n != "__metadata__"]
    index: Any = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    kind = choice.choice(
        ["outside", "absolute", "missing", "type", "extra", "none", "folder", "twice"]
    )
    name = choice.choice(names)
    if kind == "outside":
        (folder.parent / "outside.safetensors").write_bytes(raw)
        index["weight_map"][name] = "../outside.safetensors"
    elif kind == "absolute":
        index["weight_map"][name] = str(folder / "model.safetensors")
    elif kind == "missing":
        index["weight_map"][name] = "model-00002.safetensors"
    elif kind == "type":
        index["weight_map"][name] = choice.choice(STRANGE)
    elif kind == "extra":
        index["weight_map"]["no.such.tensor"] = "model.safetensors"
    elif kind == "none":
        index["weight_map"] = choice.choice(STRANGE)
    elif kind == "folder":
        (folder / "sub.safetensors").mkdir()
        index["weight_map"][name] = "sub.safetensors"
    else:
        (folder / "copy.safetensors").write_bytes(raw)
        index["weight_map"][name] = "copy.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"index: {kind} for {name}"


def link_out(folder: Path, choice: random.Random) -> str:
    """A file of the checkpoint is a symbolic link to somewhere else."""
    file = choice.choice(["config.json", "model.safetensors", "tokenizer.json", "extra.json"])
    target = folder.parent / f"secret-{file}"
    if (folder / file).exists():
        (folder / file).rename(target)
    else:
        target.write_text('{"secret": 1}')
    (folder / file).symlink_to(target)
    return f"{file}: a link out of the folder"


def big_config(folder: Path, choice: random.Random) -> str:
    """Sizes for which a model cannot even be laid out."""
    data = json.loads((folder / "config.json").read_text())
    keys = [k for k, v in data.items() if isinstance(v, int) and not isinstance(v, bool)]
    key = choice.choice(keys)
    data[key] = choice.choice([10**6, 10**9, 10**12, 2**31 - 1, -5])
    (folder / "config.json").write_text(json.dumps(data))
    return f"config.json: {key} = {data[key]}"


def own_code(folder: Path, choice: random.Random) -> str:
    """A checkpoint that brings code, which says so if it ever runs."""
    evil = f"open({str(folder.parent / 'RAN')!r}, 'w').close()\nraise SystemExit(3)\n"
    (folder / "modeling_evil.py").write_text(evil)
    (folder / "tokenization_evil.py").write_text(evil)
    where = choice.choice(["config", "tokenizer", "both"])
    if where != "tokenizer":
        data = json.loads((folder / "config.json").read_text())
        data["auto_map"] = {
            "AutoConfig": "modeling_evil.C",
            "AutoModelForCausalLM": "modeling_evil.M",
        }
        data["model_type"] = choice.choice(["evil", data["model_type"]])
        (folder / "config.json").write_text(json.dumps(data))
    if where != "config":
        data = json.loads((folder / "tokenizer_config.json").read_text())
        data["auto_map"] = {"AutoTokenizer": ["tokenization_evil.T", None]}
        data["tokenizer_class"] = "EvilTokenizer"
        (folder / "tokenizer_config.json").write_text(json.dumps(data))
    return f"own code in {where}"


CHECKPOINT: list[Mutation] = [
    change_json("config.json"), big_config, change_bytes("config.json"), nest_json("config.json"),
    change_header(), change_header(), change_bytes("model.safetensors", 3000), change_index, change_index,
    change_json("tokenizer.json"), change_bytes("tokenizer.json"), change_json("tokenizer_config.json"),
    change_bytes("tokenizer_config.json"), nest_json("tokenizer_config.json"),
    change_json("generation_config.json"), link_out, own_code,
]  # fmt: skip
# Of a quantized checkpoint, for the commands that read one.
QUANTIZED: list[Mutation] = [
    change_json("config.json"), change_header(), change_bytes("model.safetensors", 3000),
    change_header("quantkit/kv.safetensors"), change_bytes("quantkit/kv.safetensors", 600),
    change_json("quantkit/report.json"), link_out,
]  # fmt: skip


def change_recipe(file: Path, recipe: dict[str, Any], choice: random.Random) -> str:
    """Write a broken recipe."""
    import yaml

    kind = choice.choice(
        ["value", "value", "value", "key", "bytes", "bomb", "deep", "name", "number"]
    )
    text = yaml.safe_dump(recipe)
    what = ""
    if kind in ("value", "key"):
        path = choice.choice(_paths(recipe))
        if kind == "key" and isinstance(path[-1], str):
            path = (*path[:-1], "bitz")
        value = choice.choice(STRANGE)
        if isinstance(path[-1], int) or not any(isinstance(k, int) for k in path):
            _put(recipe, path, value)
        text, what = yaml.safe_dump(recipe), f"{'.'.join(map(str, path))} = {str(value)[:40]}"
    elif kind == "bytes":
        file.write_bytes(choice.randbytes(300))
        return "recipe: random bytes"
    elif kind == "bomb":
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
        text = "\n".join(lines) + "\n" + text
    elif kind == "deep":
        text += "description: " + _nested(5000) + "\n"
    elif kind == "name":
        text += f"name: {choice.choice(['../../evil', '/tmp/evil', '..', 'a/b', '.'])}\n"
    else:
        text += choice.choice(
            ["description: 2020-99-99\n", "calibration: {samples: " + "9" * 6000 + "}\n"]
        )
    file.write_text(text)
    return f"recipe: {kind} {what}"
