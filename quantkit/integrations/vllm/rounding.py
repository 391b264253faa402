"""Between the linears, what is emulated on a CPU rounds to 16 bits where transformers does.

vLLM normalises x + residual before it is rounded, and its C++ RoPE rounds once where transformers rounds
each step. Neither is wrong, but 4 and 8-bit activations turn such last bits into whole steps: on the bundled
Llama alone they moved log-probabilities by 0.09 with INT4 keys and values. Both are vLLM's own options, set
here only for a model that quantkit emulates: another implementation of one op, another op left off.
"""

from __future__ import annotations

import torch
from vllm import ir
from vllm.config import CompilationMode, VllmConfig

_PROVIDER = "quantkit"
_ROPE = "rotary_embedding"


@ir.ops.fused_add_rms_norm.register_impl(_PROVIDER)
def _add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of x + residual, x + residual), the sum rounded before it is normalised."""
    hidden = x + x_residual
    normed: torch.Tensor = ir.ops.rms_norm(hidden, weight, epsilon, variance_size)
    return normed, hidden


def round_as_transformers(config: VllmConfig) -> bool:
    """Set it for this process; to be called before the model's layers are made, perhaps more than once.

    Returns:
        whether that was done: a compiled graph rounds where it likes, and what a user asked for stays.
    """
    compilation = config.compilation_config
    if compilation.mode not in (None, CompilationMode.NONE):
        return False
    op = ir.ops.fused_add_rms_norm
    if op.get_priority() in ([], ["native"]):
        op.set_default([_PROVIDER, "native"])
    if not any(name.endswith(_ROPE) for name in compilation.custom_ops):
        compilation.custom_ops.append(f"-{_ROPE}")
    return True
