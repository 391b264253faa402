"""Runs quantkit on one mutated input in a fork, and says what it did that it must not."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutations import CHECKPOINT, QUANTIZED, change_recipe

SECONDS = 120
# What a healthy run of the tiny model takes beside the file itself.
WORK_BYTES = 300 << 20


@dataclass(frozen=True)
class Case:
    """One mutated input: what is changed (by index and seed), and the command that reads it."""

    kind: str
    mutation: int
    seed: int
    command: str


@dataclass
class Result:
    what: str = ""
    code: int = 0
    stderr: str = ""
    grown: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def cases(choice: random.Random, count: int) -> list[Case]:
    found = []
    for _ in range(count):
        kind = choice.choices(["plain", "quantized", "recipe"], [6, 3, 2])[0]
        size = {"plain": len(CHECKPOINT), "quantized": len(QUANTIZED), "recipe": 1}[kind]
        commands = {
            "plain": ["quantize int4", "quantize fireq", "quantize fireq", "plan"],
            "quantized": ["verify", "load", "inspect"],
            "recipe": ["plan", "quantize"],
        }[kind]
        seed = choice.randrange(2**32)
        found.append(Case(kind, choice.randrange(size), seed, choice.choice(commands)))
    return found


def run_case(sources: dict[str, Path], folder: Path, case: Case) -> Result:
    """Mutate a copy of a source, run the command in a fork, compare the folder before and after."""
    sandbox = folder / "sandbox"
    (sandbox / "work").mkdir(parents=True)
    model = sandbox / "model"
    shutil.copytree(sources["quantized" if case.kind == "quantized" else "plain"], model)
    choice, result = random.Random(case.seed), Result()
    arguments = _arguments(case, sources, sandbox, model, choice, result)
    before = _tree(sandbox)
    out = sandbox / "work" / "out"
    _fork(arguments, sandbox / "work", result, folder / "output.txt")
    after = _tree(sandbox)
    _judge(result, case, before, after, out, _bytes(model))
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _arguments(
    case: Case,
    sources: dict[str, Path],
    sandbox: Path,
    model: Path,
    choice: random.Random,
    result: Result,
) -> list[str]:
    out = str(sandbox / "work" / "out")
    calibration = ["--calib", str(sources["text"]), "--samples", "2", "--seqlen", "32"]
    if case.kind == "recipe":
        from quantkit import Recipe

        file = sandbox / "recipe.yaml"
        data: dict[str, Any] = Recipe.load(choice.choice(["fireq", "crossquant"])).model_dump(
            mode="json"
        )
        result.what = change_recipe(file, data, choice)
        if case.command == "plan":
            return ["plan", str(model), "-r", str(file)]
        # Without -o: the recipe's name goes into the output's.
        return ["quantize", str(model), "-r", str(file), *calibration]
    mutations = QUANTIZED if case.kind == "quantized" else CHECKPOINT
    result.what = f"{case.command}: " + mutations[case.mutation](model, choice)
    if case.command == "plan":
        return ["plan", str(model), "-r", "fireq"]
    if case.command.startswith("quantize"):
        return ["quantize", str(model), "-r", case.command.split()[1], "-o", out, *calibration]
    if case.command == "load":
        return ["generate", str(model), "Hello", "--max-new-tokens", "2"]
    return [case.command, str(model)]


def _fork(arguments: list[str], work: Path, result: Result, output: Path) -> None:
    """Run quantkit's main in a fork; its peak of memory over what this process had is the kernel's."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(arguments, work, output)
    deadline, status = started + SECONDS, 0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            result.faults.append(f"hung: over {SECONDS} s")
            break
        time.sleep(0.01)
    result.seconds = time.monotonic() - started
    result.code = os.waitstatus_to_exitcode(status)
    lines = output.read_text(errors="replace").splitlines() or [""]
    grown = [line.split()[1] for line in lines if line.startswith("GROWN ")]
    result.stderr = "\n".join(line for line in lines if not line.startswith("GROWN "))[-3000:]
    result.grown = int(grown[-1]) if grown else 0


def _child(arguments: list[str], work: Path, output: Path) -> None:
    code: Any = 1
    try:
        os.chdir(work)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        from quantkit import memory
        from quantkit.cli import main as cli

        before = memory.resident()
        sys.argv = ["quantkit", *arguments]
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        print(f"\nGROWN {memory.peak() - before}", flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        code = 99
    finally:
        os._exit(code if isinstance(code, int) else 1)


def _tree(folder: Path) -> dict[str, str]:
    """Every file below, with its content's hash or its link's target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = "-> " + os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _judge(
    result: Result, case: Case, before: dict[str, str], after: dict[str, str], out: Path, size: int
) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if "Traceback" in result.stderr:
        result.faults.append("a traceback")
    if result.code not in (0, 2):
        result.faults.append(f"exit code {result.code}")
    if result.code == 2 and len(errors) != 1 and case.command != "verify":
        result.faults.append(f"{len(errors)} error lines")
    if result.code == 2 and errors and len(errors[0]) > 1000:
        result.faults.append("an error of over 1000 characters")
    changed = [p for p in {*before, *after} if before.get(p) != after.get(p)]
    made = out if case.kind != "recipe" else out.parent
    allowed = result.code == 0
    for path in changed:
        inside = Path(path).is_relative_to(made)
        if not (inside and allowed):
            result.faults.append(f"changed {path}")
    if result.grown > WORK_BYTES + 2 * size:
        result.faults.append(f"took {result.grown >> 20} MiB")
