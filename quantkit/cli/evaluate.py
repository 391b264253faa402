"""`quantkit eval`: perplexity, the original beside the quantized model."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from quantkit.cli.models import model_or_last, source_of, tokenizer_of, weights_bytes
from quantkit.cli.output import JsonOption, note, out, print_json, print_table, progress_bar, size
from quantkit.errors import QuantkitError


def command(
    model: Annotated[
        str | None, typer.Argument(help="Left out: the one quantized last in this folder.")
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
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity (protocol gptq: consecutive windows, mean token loss)."""
    started = time.monotonic()
    if limit is not None and limit < 1:
        raise QuantkitError(f"--limit {limit}: at least 1 is needed")
    if seqlen is not None and seqlen < 2:
        raise QuantkitError(f"--seqlen {seqlen}: at least 2 is needed")
    name = model_or_last(model)
    names = [task for task in (tasks or "").split(",") if task]
    texts = ppl or ([] if names else ["sample"])
    other = source_of(name) if baseline is None else baseline
    other = None if other == "none" else other
    if model is None:
        note(f"model: {name}, quantized last in this folder")
    # The baseline's existence is checked before the first model costs its minutes.
    sizes = {m: weights_bytes(m) for m in (name, other) if m is not None}
    found = _evaluate(name, texts, seqlen, limit, device) if texts else {}
    compared = _evaluate(other, texts, seqlen, limit, device) if other and texts else None
    scores = {m: _tasks(m, names, limit, device) for m in sizes} if names else {}
    seconds = time.monotonic() - started
    if as_json:
        print_json(
            {
                "model": name,
                "ppl": found,
                "baseline": compared,
                "bytes": sizes[name],
                "seconds": round(seconds, 2),
            }
            | ({"tasks": scores} if names else {})
        )
        return
    if texts:
        _print(name, other, texts, found, compared, sizes)
    if names:
        _print_tasks(scores)


def _tasks(model: str, names: list[str], limit: int | None, device: str) -> dict[str, Any]:
    """Task -> its metrics."""
    from quantkit.evaluate.tasks import run_tasks
    from quantkit.runtime.load import load

    return run_tasks(load(model, device=device), tokenizer_of(model), names, limit=limit)


def _print_tasks(scores: dict[str, dict[str, Any]]) -> None:
    models = list(scores)
    rows = [["task", "metric", *models]]
    for task, metrics in scores[models[0]].items():
        for metric, value in metrics.items():
            others = [
                f"{scores[m].get(task, {}).get(metric, float('nan')):.4f}" for m in models[1:]
            ]
            rows.append([task, metric, f"{value:.4f}", *others])
    print_table(rows)


def _evaluate(
    model: str, texts: list[str], seqlen: int | None, limit: int | None, device: str
) -> dict[str, Any]:
    """Text -> its Perplexity as a dictionary."""
    from quantkit.calibration.data import read_text, tokenize
    from quantkit.evaluate.perplexity import DEFAULT_SEQLEN, perplexity
    from quantkit.runtime.load import load

    contents = {text: read_text(text, split="test") for text in texts}
    tokenizer = tokenizer_of(model)
    loaded = load(model, device=device)
    longest = int(getattr(loaded.config, "max_position_embeddings", DEFAULT_SEQLEN))
    if seqlen is not None and seqlen > longest:
        raise QuantkitError(f"--seqlen {seqlen}: {model} was made for at most {longest} tokens")
    results = {}
    with progress_bar() as bar:
        for text, content in contents.items():
            result = perplexity(
                loaded,
                tokenize(tokenizer, content),
                seqlen or min(DEFAULT_SEQLEN, longest),
                limit=limit,
                progress=lambda done, total: bar(done, total, "windows"),
            )
            results[text] = result.to_dict()
    return results


def _print(
    name: str,
    other: str | None,
    texts: list[str],
    found: dict[str, Any],
    compared: dict[str, Any] | None,
    sizes: dict[str, int],
) -> None:
    table = [["model", "weights", *(f"ppl {text}" for text in texts)]]
    rows = [(other, compared)] if other and compared else []
    for model, results in [*rows, (name, found)]:
        table.append([str(model), size(sizes[str(model)]), *(_cell(results[t]) for t in texts)])
    if other and compared:
        ratios = [f"{found[t]['ppl'] / compared[t]['ppl']:.4f}" for t in texts]
        table.append(["ratio", f"{sizes[name] / sizes[other]:.3f}", *ratios])
    print_table(table)
    first = found[texts[0]]
    counts = ", ".join(
        f"{t}: {found[t]['windows']} windows, {found[t]['tokens']} tokens" for t in texts
    )
    out.print(
        f"protocol {first['protocol']}: windows of {first['seqlen']} tokens, last partial one dropped; {counts}"
    )


def _cell(result: dict[str, Any]) -> str:
    error = f" +- {result['stderr']:.3f}" if result["stderr"] is not None else ""
    return f"{result['ppl']:.4f}{error}"
