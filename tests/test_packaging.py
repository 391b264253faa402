"""An editable install, a wheel and the repository's root import the same modules, and `kernels` is not ours."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="needs the repository"
)


def python(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_our_kernels_have_our_name_only(where: str, tmp_path: Path):
    cwd = ROOT if where == "root" else tmp_path
    assert (
        python("import quantkit.kernels.packing as p; print(p.__name__)", cwd)
        == "quantkit.kernels.packing"
    )
    # Hugging Face's package of that name is installed for the tests; it must be the one that is found.
    code = "import quantkit, importlib.util as u; print(u.find_spec('kernels').origin)"
    assert "site-packages" in python(code, cwd)
    assert (
        python("import quantkit, importlib.util as u; print(u.find_spec('recipes'))", cwd) == "None"
    )


def test_without_that_package_the_name_means_nothing(tmp_path: Path):
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import quantkit, importlib.util as u; print(u.find_spec('kernels'), u.find_spec('recipes'))"
    )
    assert python(code, tmp_path) == "None None"


def test_transformers_sees_that_package_as_it_would_without_us(tmp_path: Path):
    code = "from transformers.utils.import_utils import _is_package_available as a; print(a('kernels', True))"
    assert python(f"import quantkit; {code}", ROOT) == python(code, tmp_path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "quantkit"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for file in filter(None, files):
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    code = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_everything(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (
        ("quantkit", "quantkit"),
        ("kernels", "quantkit/kernels"),
        ("recipes", "quantkit/recipes"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if (
                path.suffix in (".py", ".yaml", ".json", ".safetensors", ".txt", ".jinja")
                and "__pycache__" not in path.parts
            ):
                assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"quantkit", next(t for t in tops if t.endswith(".dist-info"))}


def test_the_wheel_runs(wheel: Path, tmp_path: Path):
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
        "import quantkit, quantkit.kernels.packing as p; from quantkit.recipe import recipe_names\n"
        "print(p.__file__, recipe_names())"
    )
    out = python(code, tmp_path)
    assert out.startswith(str(unpacked))
    assert "fireq" in out


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; sys.argv = ['quantkit', '--help']\n"
        "from quantkit.cli.process import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
