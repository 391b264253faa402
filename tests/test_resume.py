"""A run that is killed goes on where it was and gives the same bytes; no other run's state is ever used."""

import json
import shutil
from pathlib import Path

import pytest

from quantkit import quantize
from quantkit.errors import InternalError, QuantkitError
from quantkit.formats import writer
from quantkit.formats.writer import UNFINISHED

SETTINGS = {"samples": 8, "seqlen": 64}


class Killed(BaseException):
    """As abrupt as an exception can be."""


def contents(folder: Path) -> dict[str, object]:
    """All files; the report without its times, and not what is drawn from it."""
    found: dict[str, object] = {
        str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    }
    report = json.loads(found.pop("quantkit/report.json"))  # type: ignore[arg-type]
    # Both are drawn from the report, and show its times.
    del found["README.md"], found["quantkit/report.html"]
    return found | {"report": {k: v for k, v in report.items() if k not in ("seconds", "stages")}}


def kill_after(monkeypatch: pytest.MonkeyPatch, layers: int, *, saved: bool = True) -> None:
    from quantkit.resume import RunState

    real = RunState.save

    def save(self, *arguments) -> None:
        if self.done < layers or saved:
            real(self, *arguments)
        if self.done == layers:
            raise Killed

    monkeypatch.setattr(RunState, "save", save)


@pytest.mark.parametrize("recipe", ["int4", "fireq", "quest-hadamard"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_killed_run_goes_on(tiny, text, tmp_path: Path, monkeypatch, quantized, recipe, saved):
    def once(out: Path) -> None:
        quantize(str(tiny()), recipe, out, calib=str(text), **SETTINGS)

    once(tmp_path / "whole")
    out = tmp_path / "killed"
    with monkeypatch.context() as patched:
        kill_after(patched, 2 if saved else 1 + (recipe != "int4"), saved=saved)
        with pytest.raises(Killed):
            once(out)
    assert not (out / "config.json").exists()
    # Behind the last layer nothing reads the activations.
    assert bool(list(out.rglob("activations-*.bin"))) == (recipe != "int4" and not saved)
    done = []
    from quantkit import pipeline

    name = "round_layer" if recipe == "int4" else "run_layer"
    real = getattr(pipeline, name)
    monkeypatch.setattr(pipeline, name, lambda *arguments: done.append(1) or real(*arguments))
    once(out)
    assert len(done) == (0 if saved else 2 - (recipe != "int4"))
    assert contents(out) == contents(tmp_path / "whole")


def test_the_curvature_is_measured_once(tiny, text, tmp_path: Path, monkeypatch):
    """Hours at 70B: a run that goes on has it on its disk."""

    def once(out: Path) -> None:
        refine = ["refine={steps: 4}"]
        quantize(str(tiny()), "gptq", out, calib=str(text), overrides=refine, **SETTINGS)

    from quantkit import pipeline

    once(tmp_path / "whole")
    out = tmp_path / "killed"
    for layers in (0, 1):
        with monkeypatch.context() as patched:
            kill_after(patched, layers)
            if layers:
                patched.setattr(pipeline, "output_curvature", None)
            with pytest.raises(Killed):
                once(out)
    monkeypatch.setattr(pipeline, "output_curvature", None)
    once(out)
    assert contents(out) == contents(tmp_path / "whole")


def test_another_runs_state_is_not_used(tiny, text, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"

    def once(recipe: str = "int4", *settings: str, **changes) -> None:
        quantize(str(tiny()), recipe, out, overrides=list(settings), **changes)

    with monkeypatch.context() as patched:
        kill_after(patched, 1)
        with pytest.raises(Killed):
            once()
    before = sorted(p.name for p in (out / UNFINISHED).iterdir())
    with pytest.raises(QuantkitError, match=r"recipe.weights.clip: \"absmax\" there, \"mse\" here"):
        once("int4", "weights.clip=mse")
    with pytest.raises(QuantkitError, match="seed: 0 there, 7 here"):
        once(seed=7)
    assert sorted(p.name for p in (out / UNFINISHED).iterdir()) == before
    once("int4", "weights.clip=mse", overwrite=True)
    quantize(str(tiny()), "int4", tmp_path / "other", overrides=["weights.clip=mse"])
    assert contents(out) == contents(tmp_path / "other")


def test_changed_records_of_a_mixture_are_another_run(tiny, text, tmp_path: Path, monkeypatch):
    out, data = tmp_path / "out", tmp_path / "a.jsonl"

    def once() -> None:
        quantize(str(tiny()), "fireq", out, calib=f"{text}:6,{data}:2", seqlen=64)

    data.write_text("".join(json.dumps({"text": f"record {n}"}) + "\n" for n in range(100)))
    with monkeypatch.context() as patched:
        kill_after(patched, 1)
        with pytest.raises(Killed):
            once()
    before = data.read_text()
    data.write_text(before.replace("record", "reword"))
    with pytest.raises(QuantkitError, match=r"another run .calibration.sha256"):
        once()
    data.write_text(before)
    once()
    found = json.loads((out / "config.json").read_text())["quantization_config"]["quantkit"]
    assert [part["samples"] for part in found["calibration"]["sources"]] == [6, 2]


def test_a_changed_model_is_another_run(tiny, tmp_path: Path, monkeypatch):
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    with monkeypatch.context() as patched:
        kill_after(patched, 1)
        with pytest.raises(Killed):
            quantize(str(model), "int4", tmp_path / "out")
    (model / "model.safetensors").touch()
    with pytest.raises(QuantkitError, match=r"unfinished output of another run .model.model.safe"):
        quantize(str(model), "int4", tmp_path / "out")


def test_bad_input_leaves_nothing_and_a_finished_run_is_left_alone(tiny, tmp_path: Path):
    out = tmp_path / "out"
    first = quantize(str(tiny()), "int4", out)
    times = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    assert quantize(str(tiny()), "int4", out)["unchanged"]
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*")} == times
    assert "unchanged" not in first
    with pytest.raises(QuantkitError, match="--overwrite"):
        quantize(str(tiny()), "int8", out)


def test_what_did_not_verify_is_made_anew(tiny, tmp_path: Path, monkeypatch):
    """A bit that a disk turns over; gone on with, the same bytes would only be read again."""
    out, real = tmp_path / "out", Path.rename

    def spoil(self: Path, target: Path) -> Path:
        if self.name == "shard-00001.safetensors":
            data = bytearray(self.read_bytes())
            data[-1] ^= 1
            self.write_bytes(data)
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", spoil)
        with pytest.raises(
            InternalError, match=r"in other bytes than were written.*; quantize --overwrite"
        ):
            quantize(str(tiny()), "int4", out)
    with pytest.raises(
        QuantkitError, match=r"in other bytes than were written.*; quantize --overwrite"
    ):
        quantize(str(tiny()), "int4", out)
    assert not (out / "config.json").exists()
    quantize(str(tiny()), "int4", out, overwrite=True)
    quantize(str(tiny()), "int4", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_two_at_once(tiny, tmp_path: Path):
    from quantkit.formats.writer import OutputFolder

    with (
        OutputFolder(tmp_path / "out"),
        pytest.raises(QuantkitError, match="another run is writing it"),
    ):
        quantize(str(tiny()), "int4", tmp_path / "out")


@pytest.mark.parametrize("moved", range(4))
def test_killed_while_moving_into_place(tiny, tmp_path: Path, monkeypatch, moved: int):
    out, real, count = tmp_path / "out", Path.rename, [0]
    quantize(str(tiny()), "int8", out)

    def rename(self: Path, target: Path) -> Path:
        if self.parent.name == "output":
            if count[0] == moved:
                raise Killed
            count[0] += 1
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            quantize(str(tiny()), "int4", out, overwrite=True)
    assert not (out / "config.json").exists()
    quantize(str(tiny()), "int4", out, overwrite=True)
    quantize(str(tiny()), "int4", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_killed_while_clearing_up(tiny, tmp_path: Path, monkeypatch):
    """The output is whole by then: the next start says so, and clears up the rest."""
    out, work = tmp_path / "out", tmp_path / "out" / UNFINISHED
    with monkeypatch.context() as patched:
        # Whatever else is gone when the end comes, the state is gone before it.
        patched.setattr(writer.shutil, "rmtree", lambda *_, **__: None)
        quantize(str(tiny()), "int4", out)
    assert work.is_dir()
    assert not (work / "state.json").exists()
    assert quantize(str(tiny()), "int4", out)["unchanged"]
    assert not work.exists()


def test_what_is_being_replaced_is_not_cleared_up(tiny, tmp_path: Path):
    out = tmp_path / "out"
    quantize(str(tiny()), "int4", out)
    with writer.OutputFolder(out, overwrite=True):
        with pytest.raises(QuantkitError, match="exists already"):
            quantize(str(tiny()), "int4", out)
        assert (out / UNFINISHED / "lock").exists()
