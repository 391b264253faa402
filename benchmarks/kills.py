"""Kills `quantkit quantize` at random moments (SIGKILL), starts it again until it is done, and compares the output.

    python benchmarks/kills.py --kills 50 --seed 0

Every run is killed at a moment drawn over the time that an undisturbed run takes, four in five of them after the first
file has been written; its output must be that run's byte for byte (the report but for its times), and what a kill
leaves must not look whole. Results go to benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "kills.json"
RECIPES = ("int4", "fireq", "crossquant")


def start(recipe: str, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "quantkit", "quantize", "llama", "-r", recipe, "-o", str(out)]
    command += ["--samples", "16", "--seqlen", "128"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


def contents(out: Path) -> dict[str, str]:
    """File -> hash; the report without its times, and not what is drawn from it."""
    found = {}
    for path in out.rglob("*"):
        if path.is_file() and path.name not in ("README.md", "report.html"):
            raw = path.read_bytes()
            if path.name == "report.json":
                report = json.loads(raw)
                raw = json.dumps(
                    {k: v for k, v in report.items() if k not in ("seconds", "stages")}
                ).encode()
            found[str(path.relative_to(out))] = hashlib.sha256(raw).hexdigest()
    return found


def looks_whole(out: Path) -> bool:
    return (out / "config.json").exists()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    choice, faults, killed, early = random.Random(arguments.seed), [], 0, 0
    with tempfile.TemporaryDirectory() as name:
        whole, seconds = {}, {}
        for recipe in RECIPES:
            begun = time.monotonic()
            assert start(recipe, Path(name) / recipe).wait() == 0
            seconds[recipe] = time.monotonic() - begun
            whole[recipe] = contents(Path(name) / recipe)
        print({r: round(s, 1) for r, s in seconds.items()}, "seconds undisturbed", flush=True)
        for number in itertools.count():
            if killed == arguments.kills:
                break
            recipe, out = RECIPES[number % len(RECIPES)], Path(name) / "out"
            process = start(recipe, out)
            began = time.monotonic()
            while number % 5 and not out.exists() and process.poll() is None:
                time.sleep(0.01)
            moment = choice.random() * max(0.1, seconds[recipe] - time.monotonic() + began)
            time.sleep(moment)
            done = process.poll() is not None
            if not done:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
            begun = out.exists()
            early += not begun
            if (
                looks_whole(out)
                and (contents(out).keys() - {".unfinished/lock"}) < whole[recipe].keys()
            ):
                faults.append(f"{number}: looks whole and is not")
            again = start(recipe, out)
            code = again.wait()
            if code or contents(out) != whole[recipe]:
                faults.append(
                    f"{number}: {recipe} killed after {moment:.2f} s: code {code}, or other bytes"
                )
                print(faults[-1], again.stderr.read()[-300:] if again.stderr else "", flush=True)
            shutil.rmtree(out, ignore_errors=True)
            if number % 10 == 9:
                print(f"{number + 1} runs, {killed} killed, {len(faults)} faults", flush=True)
    summary = {"runs": number, "killed": killed, "before_anything_was_written": early,
               "seed": arguments.seed, "faults": faults}  # fmt: skip
    print(summary)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
