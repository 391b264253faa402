"""`quantkit bench`: the speed of the ops, or of a model beside its original."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.output import JsonOption, note, print_json, print_table, progress_bar, size
from quantkit.errors import QuantkitError


def command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="ops|MODEL",
            help="`ops`: every kernel at a Llama-3-8B's sizes. MODEL: a quantized checkpoint, or random-1b, random-8b.",
        ),
    ],
    op: Annotated[
        list[str] | None, typer.Option(help="ops: only this one; may be repeated.")
    ] = None,
    m: Annotated[str | None, typer.Option("--m", help="ops: rows, comma-separated.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="ops: INPUTSxOUTPUTS of a linear layer; may be repeated."),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="ops: tokens in the cache, comma-separated.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(help="ops: first find the GPU kernels' best configurations, and keep them."),
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="ops: draw the results as a PNG.")] = None,
    recipe: Annotated[str, typer.Option(help="random-1b, random-8b: in whose format.")] = "int4",
    baseline: Annotated[
        str | None,
        typer.Option(
            help="MODEL: what to compare with; the recorded original if left out, `none` for nothing."
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(help="MODEL: tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="MODEL: tokens decoded after it.")] = 32,
    batch: Annotated[int, typer.Option(help="Sequences of attention, and of MODEL.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; all if left out.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="For each case of ops (1), for all of MODEL (10).")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A JSON file.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Measure speed: medians of interleaved runs on cold data, beside bf16."""
    from quantkit.device import find_device

    where = find_device(device)
    for name, value in (
        ("prompt", prompt),
        ("new-tokens", new_tokens),
        ("batch", batch),
        ("threads", threads),
    ):
        if value is not None and value < 1:
            raise QuantkitError(f"--{name} {value}: at least 1 is needed")
    if seconds is not None and not 0 < seconds < 1e6:
        raise QuantkitError(f"--seconds {seconds}: a number above 0 is needed")
    _check_outputs(target, output, picture)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if target == "ops":
        report = _ops(op, m, shape, context, batch, tune, seconds or 1.0, where)
    else:
        report = _model(target, recipe, baseline, batch, prompt, new_tokens, seconds or 10.0, where)
    if output is not None:
        _write(output, report)
    if as_json:
        print_json(report)
    elif target == "ops":
        _print_ops(report)
    else:
        _print_model(report)
    if picture is not None:
        from quantkit.bench.picture import draw

        draw(report, picture)


def _check_outputs(target: str, output: Path | None, picture: Path | None) -> None:
    """What would make the results of minutes of measuring unwritable is said before."""
    for option, path in (("--output", output), ("--picture", picture)):
        if path is not None and not path.parent.is_dir():
            raise QuantkitError(f"{option} {path}: there is no folder {path.parent}")
    if picture is not None and target != "ops":
        raise QuantkitError("--picture: only `bench ops` draws one; leave it out")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise QuantkitError(
            "--picture: matplotlib is not installed; pip install matplotlib, or leave it out"
        )


def _ops(
    ops: list[str] | None,
    m: str | None,
    shapes: list[str] | None,
    contexts: str | None,
    batch: int,
    tune: bool,
    seconds: float,
    device: Any,
) -> dict[str, Any]:
    from quantkit.bench.ops import bench_ops, make_cases, names
    from quantkit.bench.tune import tune_cases

    chosen = ops or names()
    for name in chosen:
        if name not in names():
            raise QuantkitError(f"--op {name}: no such op; {', '.join(names())} are there")
    settings: dict[str, Any] = {"batch": batch}
    if m is not None:
        settings["rows"] = _numbers("--m", m)
    if shapes:
        settings["shapes"] = tuple(_shape(text) for text in shapes)
    if contexts is not None:
        settings["contexts"] = _numbers("--context", contexts)
    cases = make_cases(chosen, device, **settings)
    with progress_bar() as bar:
        for line in tune_cases(cases, device, bar) if tune else ():
            note(line)
        return bench_ops(cases, device, seconds=seconds, progress=bar).to_dict()


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[1-9]\d*\s*", part) for part in parts):
        raise QuantkitError(f"{option} {text}: numbers above 0 with commas between are needed")
    return tuple(int(part) for part in parts)


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise QuantkitError(f"--shape {text}: INPUTSxOUTPUTS is needed, like 4096x6144")
    k, n = int(found[1]), int(found[2])
    if k % 128 or n % 8:
        raise QuantkitError(f"--shape {text}: inputs in 128s and outputs in eights are needed")
    return k, n


def _model(
    target: str,
    recipe: str,
    baseline: str | None,
    batch: int,
    prompt: int,
    new_tokens: int,
    seconds: float,
    device: Any,
) -> dict[str, Any]:
    from quantkit.bench.model import bench_model
    from quantkit.bench.random_model import PREFIX, random_baseline, write_random
    from quantkit.cli.models import source_of, weights_bytes
    from quantkit.formats.checkpoint import Checkpoint
    from quantkit.models.names import find_model
    from quantkit.models.structure import build_skeleton, load_config
    from quantkit.runtime.load import load

    settings: dict[str, Any] = {
        "batch": batch, "prompt": prompt, "new_tokens": new_tokens, "seconds": seconds,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder, progress_bar() as bar:
        if target.startswith(PREFIX):
            bar(0, 1, "writing")
            name = str(write_random(target, recipe, Path(folder) / target))
            other = None if baseline == "none" else lambda: random_baseline(target, device)
            original_bytes = 0
        else:
            name = target
            if "quantization_config" not in Checkpoint(find_model(name)).config:
                raise QuantkitError(f"{name}: is not quantized; quantize it first, then compare")
            source = source_of(name) if baseline is None else baseline
            source = None if source == "none" else source
            other = None if source is None else lambda: load(str(source), device=str(device))
            original_bytes = 0 if source is None else weights_bytes(source)
        sizes = {"quantkit": weights_bytes(name), "bf16": original_bytes}
        # Libraries are imported before the clock starts.
        build_skeleton(load_config(Checkpoint(find_model(name)).config, name), name)
        report = bench_model(
            lambda: load(name, device=str(device)), other, sizes, device, **settings, progress=bar
        )
    return {"model": target} | report.to_dict()


def _write(path: Path, report: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise QuantkitError(f"{path}: cannot be written ({error.strerror})") from None


def _print_ops(report: dict[str, Any]) -> None:
    machine = report["machine"]
    print(_machine(machine))
    rates = ", ".join(f"{v / 1e12:.2f} {n}" for n, v in machine["operations_per_second"].items())
    print(f"reached by torch: {machine['bytes_per_second'] / 1e9:.1f} GB/s; TFLOP/s: {rates}")
    others = sorted({n for r in report["results"] for n in r["ratio"] if n != "bf16"})
    rows = [
        [
            "op",
            "size",
            "M",
            "time",
            "quartiles",
            "bf16",
            "x bf16",
            *(f"x {n}" for n in others),
            "roofline",
        ]
    ]
    for result in report["results"]:
        ours, bf16 = (result["seconds"][n] for n in ("quantkit", "bf16"))
        spread = f"{_time(ours['low'])}..{_time(ours['high'])}"
        ratios = [
            f"{result['ratio'][n]:.2f}" if n in result["ratio"] else "-" for n in ("bf16", *others)
        ]
        rows.append(
            [result["op"], result["size"], str(result["rows"]), _time(ours["median"]), spread,
             _time(bf16["median"]), *ratios, f"{result['roofline']:.0%}"]
        )  # fmt: skip
    print_table(rows)
    for line in dict.fromkeys(report["skipped"]):
        note(f"not timed: {line}")


def _print_model(report: dict[str, Any]) -> None:
    print(_machine(report["machine"]))
    settings = report["settings"]
    print(
        f"batch {settings['batch']}, prompt of {settings['prompt']} tokens, "
        f"{settings['new_tokens']} decoded after it"
    )
    rows = [["", "load", "file", "tensors", "process", "prompt tok/s", "decode tok/s", "a step"]]
    for name in reversed(list(report["loaded"])):
        loaded = report["loaded"][name]
        prompt, decode = report["prefill"][name], report["decode"][name]
        file = ["-", "-"]  # a random original, which is in no file
        if loaded["packed_bytes"]:
            file = [f"{loaded['seconds']:.2f} s", size(loaded["packed_bytes"])]
        rows.append(
            [name, *file,
             size(loaded["tensor_bytes"]), size(max(0, loaded["process_bytes"])), f"{prompt['tokens_per_second']:.1f}",
             f"{decode['tokens_per_second']:.1f}", _time(decode["seconds"]["median"])]
        )  # fmt: skip
    if "ratio" in report["decode"]:
        ratios = [f"{report[part]['ratio']:.2f}" for part in ("prefill", "decode")]
        rows.append(["ratio", "", "", "", "", *ratios, ""])
    print_table(rows)


def _machine(machine: dict[str, Any]) -> str:
    threads = (
        f", {machine['threads']} threads, {machine['instructions']}" if "threads" in machine else ""
    )
    return f"{machine['device']}{threads}; torch {machine['torch']}, quantkit {machine['quantkit']}"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
