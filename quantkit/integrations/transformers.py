"""transformers' `from_pretrained` for our checkpoints.

They say `quant_method: compressed-tensors`, so that everybody can load what everybody can run; the extra key
`quantkit` is what we claim them by. Checkpoints without it stay with transformers' own quantizer.
`import quantkit` is enough: see `quantkit/__init__.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.formats.checkpoint import Checkpoint

NAME = "quantkit"
_CLAIMED = "compressed-tensors"


class QuantkitConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json as it stands there; `to_dict` gives it back unchanged."""

    quant_method = NAME

    def __init__(self, **content: Any) -> None:
        self.content = content

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        config = cls(**copy.deepcopy(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.content)

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


class ClaimingConfig(CompressedTensorsConfig):
    """Stands where transformers looks up the configuration of `compressed-tensors`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ours = isinstance(config_dict, dict) and "quantkit" in config_dict
        owner = QuantkitConfig if ours else CompressedTensorsConfig
        return owner.from_dict(config_dict, *args, **kwargs)


class QuantkitQuantizer(HfQuantizer):
    """Puts packed linears into the empty model, and after loading what `quantkit.load` adds."""

    requires_calibration = True
    quantization_config: QuantkitConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Read the configuration.

        Raises:
            QuantkitError: it is of a newer schema, malformed, or requires what this version does not know.
        """
        from quantkit.formats.config import parse_quantization_config

        self._info = parse_quantization_config(
            {"quantization_config": self.quantization_config.content}, "config.json"
        )

    def update_attn_implementation(self, config: Any) -> Any:
        """INT4 keys and values are read by our attention alone."""
        from quantkit.runtime import attention

        if self._info.kv_cache is None:
            return config
        asked = config._attn_implementation
        if asked not in (None, "sdpa", attention.NAME):
            raise QuantkitError(
                f"attn_implementation={asked!r}: this checkpoint's keys and values are INT4, which quantkit's "
                "attention alone reads; leave it out, or quantize with --set kv_cache=null"
            )
        attention.register()
        config._attn_implementation = attention.NAME
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from quantkit.formats.checkpoint import Checkpoint
        from quantkit.models.experts import unstack_experts
        from quantkit.models.files import ModelCheckpoint, check_complete, in_model_names
        from quantkit.runtime.load import replace_linears

        if not checkpoint_files:
            raise QuantkitError(
                "a quantkit checkpoint is loaded from its files; state_dict= is not taken"
            )
        if model.get_output_embeddings() is None:
            raise QuantkitError(
                f"{model.config.name_or_path}: is loaded as {type(model).__name__}; use AutoModelForCausalLM"
            )
        unstack_experts(model)
        self._source = Checkpoint(Path(checkpoint_files[0]).parent)
        self._checkpoint = ModelCheckpoint(self._source, model)
        self._info = in_model_names(self._info, self._checkpoint)
        _fetch_key_scales(model, self._checkpoint, self._info)
        replace_linears(model, self._checkpoint, self._info)
        check_complete(model, self._checkpoint)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from quantkit.runtime.cache import generate_with_packed_cache
        from quantkit.runtime.load import attach_quantizers
        from quantkit.runtime.patch import patch
        from quantkit.runtime.save import save_as_checkpoint

        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if self._info.kv_cache:
            attach_quantizers(model, self._checkpoint, self._info)
            generate_with_packed_cache(model)
        # Where accelerate spread the model over several devices, its hooks hold on to the modules as they are.
        if not any(hasattr(module, "_hf_hook") for module in model.modules()):
            patch(model)
        save_as_checkpoint(model, self._source)
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Experts stay single linears here: nothing is to be stacked on the way in."""
        from transformers.core_model_loading import WeightConverter

        return [c for c in weight_conversions if not isinstance(c, WeightConverter)]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        from quantkit.runtime.save import checkpoint_tensors

        return checkpoint_tensors(model, self._source), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _fetch_key_scales(model: Any, checkpoint: Checkpoint, info: Any) -> None:
    """transformers downloads config.json and the weights; the factors on keys lie beside them."""
    from transformers.utils import cached_file

    from quantkit.formats.config import KV_FILE

    name = str(model.config.name_or_path)
    if not info.meta.get("post_rope_scale") or Path(name).is_dir():
        return
    revision = getattr(model.config, "_commit_hash", None)
    try:
        cached_file(name, KV_FILE.as_posix(), revision=revision)
    except OSError as error:
        raise QuantkitError(
            f"{name}: {KV_FILE.as_posix()} cannot be had ({' '.join(str(error).split())[:120]}); "
            "the keys of this checkpoint cannot be read without it"
        ) from None


def register() -> None:
    """Make transformers know our checkpoints. May be called again."""
    AUTO_QUANTIZER_MAPPING[NAME] = QuantkitQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = QuantkitConfig
    AUTO_QUANTIZATION_CONFIG_MAPPING[_CLAIMED] = ClaimingConfig
