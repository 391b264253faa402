"""Compile the C++ beside this file once per machine and call it.

torch has no fast product of INT4 weights with more than a few rows on a CPU. Where a C++ compiler and
a processor with AVX-512-BF16 and VBMI are there, ours is compiled at its first use (some seconds) and kept in
`$QUANTKIT_CACHE` (default `~/.cache/quantkit`) under a hash of the source, the flags and the compiler.
Elsewhere, and with `QUANTKIT_NATIVE=0`, callers get None and take torch's own ops.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

ENV = "QUANTKIT_NATIVE"
_SOURCES = (
    "hadamard.cpp",
    "hessian.cpp",
    "int4_linear.cpp",
    "int4_pack.cpp",
    "int4_tiles.cpp",
    "int4_vnni.cpp",
    "int8_linear.cpp",
    "int8_vnni.cpp",
    "kv4_attention.cpp",
    "kv4_pack.cpp",
    "prompt_attention.cpp",
    "prompt_attention_backward.cpp",
    "rounding.cpp",
    "rows.cpp",
)
_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-w",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512bf16",
    "-mavx512vnni",
    "-mavx512vbmi",
    "-mfma",
]
_LINK = ["-shared", "-fopenmp"]
_LOG = logging.getLogger("quantkit")

POINTER, INT, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


def cache_folder() -> Path:
    """Where machine-dependent results are kept: `$QUANTKIT_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("QUANTKIT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"


_QUANTIZER = [INT, FLOAT, FLOAT, FLOAT]  # form, low, high, factor
_ARGUMENTS = {
    "int4_linear": [
        *(POINTER, SIZE, INT, POINTER, POINTER, INT, POINTER, POINTER, POINTER, INT),
        *(SIZE, SIZE, SIZE, SIZE, INT, INT),
    ],
    "int4_pack": [POINTER, SIZE, SIZE, POINTER, INT],
    "int8_linear": [
        *(POINTER, SIZE, POINTER, POINTER, POINTER, POINTER, POINTER, INT),
        *(SIZE, SIZE, SIZE, INT, INT),
    ],
    "gptq_block": [
        *(POINTER, POINTER, SIZE, SIZE, POINTER, SIZE, POINTER, POINTER, POINTER, POINTER),
        *(FLOAT, FLOAT, FLOAT, POINTER, POINTER, POINTER, INT),
    ],
    "scale_search": [
        *(POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, INT, FLOAT, FLOAT, FLOAT, POINTER, INT),
    ],
    "round": [POINTER, SIZE, SIZE, SIZE, POINTER, FLOAT, FLOAT, FLOAT, POINTER, POINTER, INT],
    "round_with_offset": [
        *(POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, FLOAT, FLOAT, FLOAT, POINTER, INT),
    ],
    "round_with_offset_backward": [
        *(POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, POINTER, FLOAT, FLOAT, FLOAT),
        *(POINTER, POINTER, INT),
    ],
    "quantize_rows": [POINTER, INT, SIZE, SIZE, SIZE, *_QUANTIZER, POINTER, POINTER, INT],
    "norm_quantize": [
        *(POINTER, INT, SIZE, SIZE, SIZE, POINTER, SIZE, POINTER, FLOAT, *_QUANTIZER),
        *(POINTER, POINTER, POINTER, POINTER, INT),
    ],
    "gate_quantize": [POINTER, INT, SIZE, SIZE, SIZE, *_QUANTIZER, POINTER, POINTER, INT],
    "hadamard": [
        *(POINTER, INT, SIZE, SIZE, SIZE, SIZE, POINTER, *_QUANTIZER, POINTER, POINTER, INT),
    ],
    "hessian": [POINTER, SIZE, SIZE, SIZE, SIZE, POINTER, POINTER, INT],
    "prompt_attention": [
        *(POINTER, POINTER, POINTER, POINTER, FLOAT, SIZE, POINTER, POINTER, POINTER, INT),
    ],
    "prompt_attention_backward": [
        *(POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, FLOAT, SIZE),
        *(POINTER, POINTER, POINTER, POINTER, INT),
    ],
    "kv4_quantize": [POINTER, INT, POINTER, POINTER, POINTER, INT, POINTER, INT],
    "kv4_dequantize": [POINTER, POINTER, POINTER, INT, POINTER, INT, INT],
    "kv4_append": [
        *(POINTER, POINTER, POINTER, POINTER, POINTER, INT, POINTER, POINTER, POINTER),
        *(POINTER, POINTER, INT, POINTER, POINTER, INT),
    ],
    "kv4_query": [POINTER, INT, POINTER, POINTER, INT, POINTER, POINTER, INT],
    "kv4_attention": [
        *(POINTER, INT, POINTER, POINTER, POINTER, POINTER, POINTER, INT, POINTER, INT),
        *(POINTER, INT, POINTER, FLOAT, INT, POINTER, POINTER, INT),
    ],
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had (the reason is logged once)."""
    if os.environ.get(ENV) == "0":
        return None
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        _LOG.warning(
            "no C++ compiler (c++, or $CXX) was found: INT4 layers run torch's own product, "
            "which is slow from 8 rows on"
        )
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _LOG.warning(
            "%s could not compile the CPU kernels, torch's own run instead: %s",
            compiler,
            str(reason).strip().splitlines()[-1:],
        )
        return None
    if not loaded.quantkit_level():
        return None
    for name, arguments in _ARGUMENTS.items():
        getattr(loaded, f"quantkit_{name}").argtypes = arguments
    return loaded


@lru_cache(maxsize=1)
def level() -> int:
    """0: no native library; 1: AVX-512-BF16; 2: AMX as well."""
    loaded = library()
    return 0 if loaded is None else int(loaded.quantkit_level())


def _compiled(compiler: str) -> Path:
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(" ".join([*_FLAGS, *_LINK, version.stdout]).encode())
    for source in sorted(Path(__file__).parent.glob("*.[ch]pp")):
        digest.update(source.read_bytes())
    target = cache_folder() / "native" / f"cpu-{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    # Code is loaded from here: nobody else may write to it.
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        objects = [Path(folder) / source.with_suffix(".o").name for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(partial(_compile, compiler), sources, objects))
        _run([compiler, *_LINK, *map(str, objects), "-o", str(built)])
        os.replace(built, target)
    return target


def _compile(compiler: str, source: Path, target: Path) -> None:
    _run([compiler, *_FLAGS, "-c", str(source), "-o", str(target)])


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
