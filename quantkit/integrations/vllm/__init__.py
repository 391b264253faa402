"""vLLM runs what quantkit writes: a plugin that vLLM finds by itself once quantkit is installed beside it.

A checkpoint is claimed by the `quantkit` key of its `quantization_config`. Formats that vLLM has a kernel
for run on vLLM's kernel, the others on quantkit's; `kernels.py` says which.
"""

from __future__ import annotations

from typing import Any

NAME = "quantkit"
# Read and tried with this version; the plugin uses parts of vLLM that change between releases.
OLDEST = (0, 32)


def register() -> None:
    """vLLM's entry point `vllm.general_plugins`: called in every process of a server, perhaps twice.

    Nothing of vLLM or torch is imported before it is called.

    Raises:
        ImportError: vLLM is older than what the plugin was written for.
    """
    _check_version()
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # Importing it registers an implementation of a norm: before vLLM puts them in order.
    from quantkit.integrations.vllm.config import QuantkitConfig

    register_quantization_config(NAME)(QuantkitConfig)
    register_backend(
        AttentionBackendEnum.CUSTOM, "quantkit.integrations.vllm.attention.PackedBackend"
    )


def _check_version() -> None:
    import vllm

    numbers = tuple(int(n) for n in vllm.__version__.split("+")[0].split(".")[:2] if n.isdigit())
    # A build from source may say anything.
    if "dev" not in vllm.__version__ and numbers < OLDEST:
        raise ImportError(
            f"quantkit's plugin needs vLLM {OLDEST[0]}.{OLDEST[1]}, this is {vllm.__version__}: "
            "pip install --upgrade vllm"
        )


def __getattr__(name: str) -> Any:
    if name == "QuantkitConfig":
        from quantkit.integrations.vllm.config import QuantkitConfig

        return QuantkitConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
