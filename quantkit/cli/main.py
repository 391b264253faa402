"""The `quantkit` command: collects the commands and turns errors into one line and an exit code.

Exit codes: 0 done, 2 bad input or usage, 1 a failure of ours, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

import quantkit
from quantkit.cli import (
    bench,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    push,
    quantize,
    recipes,
    report,
    serve,
    verify,
)
from quantkit.cli.output import INTERRUPTED, debugging, say_error
from quantkit.errors import QuantkitError
from quantkit.ranks import speaks

app = typer.Typer(
    name="quantkit",
    help="Post-training quantization for Hugging Face language models. MODEL is a folder, a hub id, or `llama`, "
    "the small Llama that comes with the package.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize.command)
app.command("plan")(plan.command)
app.command("eval")(evaluate.command)
app.command("generate")(generate.command)
app.command("serve")(serve.command)
app.command("export")(export.command)
app.command("push")(push.command)
app.command("inspect")(inspect.command)
app.command("report")(report.command)
app.command("verify")(verify.command)
app.command("recipes")(recipes.command)
app.command("bench")(bench.command)

# Newer releases of typer carry click within, under a name of its own: reach its classes through typer.
_UsageError: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)


def _version(value: bool) -> None:
    if value:
        print(f"quantkit {quantkit.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the libraries' own logs.")
    ] = False,
) -> None:
    pass


def _quiet() -> None:
    """Libraries' notices are not ours to show: a user reads each line we print."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def main() -> NoReturn:
    """What the command line says, done; raises SystemExit with the exit code."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    if debugging():
        # Wherever it stands: a user appends it to the command that failed.
        sys.argv = [sys.argv[0], "--debug", *(a for a in sys.argv[1:] if a != "--debug")]
    else:
        _quiet()
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code, in silence
            raise KeyboardInterrupt
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except _UsageError as error:
        if not speaks():
            sys.exit(2)
        context = getattr(error, "ctx", None)
        what = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        hint = f"(see `{context.command_path if context else 'quantkit'} --help`)"
        sys.exit(say_error(QuantkitError(f"{what} {hint}")))
    except typer.Abort:
        sys.exit(say_error(KeyboardInterrupt()))
    except (KeyboardInterrupt, Exception) as error:
        sys.exit(say_error(error))
    sys.exit(code if isinstance(code, int) else 0)
