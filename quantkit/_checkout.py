"""Makes a source checkout import exactly like an installed package.

In the repository `kernels/` and `recipes/` lie beside `quantkit/`; installed, they are sub-packages of
it. Two things are missing in a checkout: `quantkit.kernels` must resolve, and the bare `kernels` must
*not* resolve to our folder when the repository's root is on `sys.path` (`python -m quantkit` run there),
because transformers looks for Hugging Face's package of that name.
"""

from __future__ import annotations

import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

MAPPED = ("kernels", "recipes")
_PACKAGE = Path(__file__).resolve().parent


class _RootFinder(FileFinder):
    """The repository root's finder, blind to the folders that are ours under another name."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname in MAPPED:
            return None
        return super().find_spec(fullname, target)


def enable(package_path: list[str]) -> None:
    """Extend `package_path` (quantkit's `__path__`) if this is a checkout; otherwise do nothing."""
    root = _PACKAGE.parent
    if (_PACKAGE / "recipes").is_dir() or not (root / "recipes").is_dir():
        return

    def hook(path: str) -> _RootFinder:
        if Path(path).resolve() != root:
            raise ImportError
        return _RootFinder(path, (SourceFileLoader, SOURCE_SUFFIXES))

    package_path.append(str(root))
    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.pop(str(root), None)
