"""`quantkit eval`: models on texts and tasks, each beside its original."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.models import model_or_last, source_of
from quantkit.cli.output import JsonOption, note, out, print_json, print_table, progress_bar, size
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.evaluate.evaluation import Evaluation


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="One or several. Left out: the one quantized last in this folder.",
        ),
    ] = None,
    ppl: Annotated[
        list[str] | None,
        typer.Option("--ppl", help="sample, wikitext, or a UTF-8 file; may be repeated."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What to compare with; the recorded original if left out, `none` for nothing."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Of ppl, kl and top1, comma-separated; all if left out. The last two need the original in "
            "memory beside the model."
        ),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens in a window; 2048 or the model's maximum.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use at most so many windows, and examples of a task.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-eval's tasks or task files, comma-separated (needs lm-eval)."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Write the results to this file as JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity (protocol gptq: consecutive windows, mean token loss) and the distance to the original."""
    from quantkit.device import find_device
    from quantkit.evaluate.evaluation import METRICS, evaluate

    started = time.monotonic()
    if limit is not None and limit < 1:
        raise QuantkitError(f"--limit {limit}: at least 1 is needed")
    if seqlen is not None and seqlen < 2:
        raise QuantkitError(f"--seqlen {seqlen}: at least 2 is needed")
    find_device(device)
    names = _split(tasks)
    texts = list(dict.fromkeys(ppl or ([] if names else ["sample"])))
    if not models:
        models = [model_or_last(None)]
        note(f"model: {models[0]}, quantized last in this folder")
    target = _writable(output)
    with progress_bar() as bar:
        found = evaluate(
            {model: _original(model, baseline) for model in models},
            texts,
            metrics=tuple(_split(metrics)) or METRICS,
            tasks=names,
            seqlen=seqlen,
            limit=limit,
            device=device,
            progress=bar,
        )
    each = [result.to_dict() for result in found]
    data = (
        each[0]
        if len(each) == 1
        else {"models": each, "seconds": round(time.monotonic() - started, 2)}
    )
    _keep(each)
    if target:
        _write(target, data)
    if as_json:
        print_json(data)
        return
    if texts:
        _print(found, texts)
    if names:
        _print_tasks(found)


def _split(words: str | None) -> list[str]:
    return [word.strip() for word in (words or "").split(",") if word.strip()]


def _original(model: str, baseline: str | None) -> str | None:
    """What a model is compared with; never with itself."""
    from quantkit.models.names import find_model

    other = source_of(model) if baseline is None else baseline
    if other is None or other == "none":
        return None
    return None if find_model(other).resolve() == find_model(model).resolve() else other


def _writable(output: str | None) -> Path | None:
    """A file that could not be written is refused before anything is measured."""
    if output is None:
        return None
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir():
        raise QuantkitError(f"-o {output}: name a file in a folder that exists")
    return path


def _write(path: Path, data: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise QuantkitError(f"-o {path}: cannot be written ({error.strerror})") from None


def _keep(results: list[dict[str, Any]]) -> None:
    """Beside each model that is an output of ours; its report and its card show them from then on."""
    from quantkit.evaluate.store import keep
    from quantkit.models.names import find_model
    from quantkit.report.documents import write_documents

    for result in results:
        folder = find_model(result["model"])
        if keep(result, folder):
            with suppress(QuantkitError):  # the results are what was asked for
                write_documents(folder)


def _print(found: list[Evaluation], texts: list[str]) -> None:
    """A row per model, its original above it."""
    compared = any(result.divergence for result in found)
    measured = any(d.kl is not None for result in found for d in result.divergence.values())
    table = [["model", "weights"]]
    for text in texts:
        name = Path(text).name
        table[0] += [f"ppl {name}", *(["ratio"] if compared else [])]
        table[0] += ["KL", "same top-1"] if measured else []
    shown: set[str] = set()
    alone = {result.model for result in found}
    for result in found:
        if result.original and result.original not in shown | alone:
            shown.add(result.original)
            row = [result.original, size(result.original_bytes or 0)]
            for text in texts:
                row += [_number(result.original_ppl[text].ppl, result.original_ppl[text].stderr)]
                row += [""] * (compared + 2 * measured)
            table.append(row)
        row = [result.model, size(result.bytes)]
        for text in texts:
            row.append(_number(result.ppl[text].ppl, result.ppl[text].stderr))
            other = result.divergence.get(text)
            if compared:
                row.append(_number(other.ratio, other.ratio_stderr) if other else "")
            if measured:
                row += (
                    [_number(other.kl, other.kl_stderr, 5), _percent(other.top1, other.top1_stderr)]
                    if other
                    else ["", ""]
                )
        table.append(row)
    print_table(table)
    first = next(iter(found[0].ppl.values()))
    counts = ", ".join(
        f"{Path(t).name}: {r.windows} windows, {r.tokens} tokens" for t, r in found[0].ppl.items()
    )
    out.print(
        f"protocol {first.protocol}: windows of {first.seqlen} tokens, last partial one dropped; {counts}",
        markup=False,
    )
    if measured:
        out.print("KL(original || model) in nats per token; +- is a standard error over windows")
    if len({tuple(r.tokens for r in result.ppl.values()) for result in found}) > 1:
        note("these models cut the texts into different tokens: their perplexities do not compare")


def _number(value: float | None, error: float | None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" +- {error:.{digits}f}" if error is not None else "")


def _percent(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" + (f" +- {100 * error:.2f}" if error is not None else "")


def _print_tasks(found: list[Evaluation]) -> None:
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for result in found:
        if result.original and result.original_tasks:
            scores.setdefault(result.original, result.original_tasks)
        scores[result.model] = result.tasks
    rows = [["task", "metric", *scores]]
    for task, metrics in found[0].tasks.items():
        for metric in metrics:
            cells = [s.get(task, {}).get(metric) for s in scores.values()]
            rows.append([task, metric, *("" if c is None else f"{c:.4f}" for c in cells)])
    print_table(rows)
