"""Acting after somebody else's import."""

import importlib
import sys
from pathlib import Path

from quantkit.integrations.on_import import when_imported


def test_it_acts_once_the_module_is_there(tmp_path: Path, monkeypatch):
    (tmp_path / "imported_later.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    seen: list[int] = []
    when_imported("imported_later", lambda: seen.append(sys.modules["imported_later"].value))
    assert seen == []
    module = importlib.import_module("imported_later")
    assert seen == [1]
    importlib.reload(module)
    assert seen == [1]
    when_imported("imported_later", lambda: seen.append(2))
    assert seen == [1, 2]


def test_a_module_that_is_not_there_stays_so(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    when_imported("no_such_module_at_all", lambda: None)
    try:
        importlib.import_module("no_such_module_at_all")
    except ModuleNotFoundError:
        return
    raise AssertionError("something was imported")
