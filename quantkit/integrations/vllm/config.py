"""vLLM's QuantizationConfig for quantkit's checkpoints: it claims them, and gives each layer its method."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from quantkit.errors import QuantkitError
from quantkit.formats.config import QuantizationInfo
from quantkit.formats.scheme import Scheme
from quantkit.integrations.vllm import NAME
from quantkit.integrations.vllm.attention import PackedKVMethod, refuse_or_take
from quantkit.integrations.vllm.checkpoint import examine, parse
from quantkit.integrations.vllm.experts import QuantkitExpertsMethod
from quantkit.integrations.vllm.kernels import (
    NATIVE,
    Choice,
    Platform,
    choices_for,
    choose,
    choose_for_experts,
    find_expert_schemes,
    find_scheme,
)
from quantkit.integrations.vllm.linear import QuantkitLinearMethod
from quantkit.integrations.vllm.prompts import attend_as_transformers
from quantkit.integrations.vllm.rounding import round_as_transformers

# A child of vLLM's logger: only those are shown.
logger = init_logger("vllm.quantkit")


class QuantkitConfig(QuantizationConfig):
    """A quantkit checkpoint in vLLM.

    Args:
        config: `quantization_config` of config.json.

    Raises:
        QuantkitError: it is malformed, or needs a newer quantkit.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.info: QuantizationInfo = parse(config, "config.json")
        self.kv_scales: dict[int, torch.Tensor] = {}
        self.native = CompressedTensorsConfig.from_config(_without_extras(config))
        self._prepared = self._as_transformers = False
        # vLLM's attention layers ask for it: an FP8 cache is its own.
        self.kv_cache_scheme = self.native.kv_cache_scheme

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantkitConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Every checkpoint with our key is ours, whatever `--quantization` says: others would ignore half of it."""
        return NAME if isinstance(hf_quant_cfg, dict) and NAME in hf_quant_cfg else None

    def get_name(self) -> Any:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # vLLM's own kernels; `choose` asks for more where quantkit's run

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Called once, in the first process, before anything is loaded: the time to refuse a broken checkpoint."""
        examined = examine(model_name, revision)
        self.kv_scales = examined.kv_scales
        if not examined.whole:
            logger.warning(
                "quantkit: transformers cannot build %s; only its quantized tensors were looked for",
                model_name,
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names that a vLLM model gives the checkpoint's modules."""
        renamed = {}
        for name, scheme in self.info.schemes.items():
            target = hf_to_vllm_mapper._map_name(name)
            if target is not None:
                renamed[target] = scheme
        self.info = QuantizationInfo(renamed, self.info.kv_cache, self.info.meta)
        self.native.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self.native.packed_modules_mapping = self.packed_modules_mapping
        self._prepare()
        if isinstance(layer, LinearBase):
            return self._linear_method(layer, prefix)
        if isinstance(layer, Attention):
            return self._cache_method(layer, prefix)
        scheme = find_scheme(prefix, self.info.schemes, self.packed_modules_mapping)
        if isinstance(layer, VocabParallelEmbedding) and scheme is None:
            return None
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        # Whatever else vLLM quantizes: its own way, if it has one for our format.
        if scheme and _choose(choose, scheme).kernel != NATIVE:
            raise QuantkitError(
                f"{prefix}: {scheme} in a {type(layer).__name__} is not served by vLLM here; "
                "use quantkit.load, or a W4A16 or W8A8 recipe"
            )
        return self.native.get_quant_method(layer, prefix)

    def _prepare(self) -> None:
        """Once in each process that holds a part of the model, with its first layer."""
        if self._prepared:
            return
        self._prepared, where = True, platform()
        emulated = where.device == "cpu" and (
            self.info.kv_cache is not None
            or any(choice.emulated for choice in choices_for(self.info.schemes, where))
        )
        config = get_current_vllm_config_or_none()
        if emulated and config is not None and round_as_transformers(config):
            self._as_transformers = True
            logger.info_once(
                "quantkit: norms, RoPE and attention round where transformers' do, for EMULATED layers"
            )

    def _linear_method(self, layer: LinearBase, prefix: str) -> QuantizeMethodBase:
        scheme = find_scheme(prefix, self.info.schemes, self.packed_modules_mapping)
        if scheme is None:
            return UnquantizedLinearMethod()
        if _choose(choose, scheme).kernel == NATIVE:
            method = self.native.get_quant_method(layer, prefix)
            if method is None or isinstance(method, UnquantizedLinearMethod):
                raise QuantkitError(
                    f"{prefix}: vLLM would load this {scheme} linear as 16 bits; its targets in "
                    "config.json do not fit. Quantize again with this version of quantkit"
                )
            return method
        return QuantkitLinearMethod(scheme)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        gate, up = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name
        parts = {"w13": [gate, up] if up else [gate], "w2": [layer.ckpt_down_proj_name]}
        schemes = find_expert_schemes(prefix, self.info.schemes, parts)
        try:
            choices = [_choose(choose_for_experts, scheme) for scheme in schemes.values()]
        except QuantkitError as error:
            raise QuantkitError(f"{prefix}: {error}") from error
        if all(choice.kernel == NATIVE for choice in choices):  # as where none is quantized
            return self.native.get_quant_method(layer, prefix)
        return QuantkitExpertsMethod(layer.moe_config, schemes, prefix)

    def _cache_method(self, layer: Attention, prefix: str) -> QuantizeMethodBase | None:
        if self._as_transformers:
            attend_as_transformers(layer)
        if self.info.kv_cache is None:
            return self.native.get_quant_method(layer, prefix)
        if not refuse_or_take(layer, self.info.kv_cache, platform()):
            return None
        return PackedKVMethod(self, self.info.kv_cache, self.kv_scales)


def platform() -> Platform:
    """Where this process of vLLM runs."""
    if current_platform.is_cpu():
        return Platform("cpu")
    if current_platform.is_cuda():
        capability = current_platform.get_device_capability()
        return Platform("cuda", capability.to_int() if capability else None)
    return Platform(current_platform.device_name)


def _choose(chooser: Callable[[Scheme, Platform], Choice], scheme: Scheme) -> Choice:
    choice = chooser(scheme, platform())
    # Not info_once over the prefix: a model has hundreds of them.
    logger.info_once("quantkit: %s: %s", str(scheme), choice.note)
    if scheme.activations is None and current_platform.is_cpu():
        # vLLM would round the activations of a W4A16 layer to INT8 where the CPU has AMX.
        os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
    return choice


def _without_extras(config: dict[str, Any]) -> dict[str, Any]:
    """The part that vLLM's compressed-tensors support reads; rotations are quantkit's own to run."""
    native = copy.deepcopy({k: v for k, v in config.items() if k != NAME})
    native["transform_config"] = {}
    return native
