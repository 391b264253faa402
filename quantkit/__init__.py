"""quantkit: post-training quantization for Hugging Face causal language models.

`quantkit.quantize(model, recipe, output=...)` writes a packed checkpoint, `quantkit.load(path)` gives a
transformers model that runs it, `quantkit.Recipe` describes what is quantized and how. Importing it makes
transformers' own `from_pretrained` run such checkpoints too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit import _checkout
from quantkit.integrations.on_import import when_imported

_checkout.enable(__path__)

__version__ = "0.1.0"
__all__ = ["QuantkitError", "Recipe", "__version__", "load", "quantize"]

if TYPE_CHECKING:
    from quantkit.errors import QuantkitError
    from quantkit.pipeline import quantize
    from quantkit.recipe import Recipe
    from quantkit.runtime.load import load

_LAZY = {
    "QuantkitError": "quantkit.errors",
    "Recipe": "quantkit.recipe",
    "load": "quantkit.runtime.load",
    "quantize": "quantkit.pipeline",
}


def _register_with_transformers() -> None:
    from quantkit.integrations.transformers import register

    register()


# transformers has no entry point for quantizers. Importing it here would cost seconds at every `--help`.
when_imported("transformers.quantizers.auto", _register_with_transformers)


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `quantkit --help` must not wait for them.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
