"""The tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder; QuantkitError if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        # False and not None: for None transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code
        )
        # transformers compares with it when text is tokenized, whatever it is.
        float(tokenizer.model_max_length)
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    # transformers raises many kinds for a missing or broken tokenizer; a panic of tokenizers' is no Exception
    except BaseException as error:
        if "trust_remote_code" in str(error):
            raise QuantkitError(
                f"{path}: its tokenizer needs Python code that comes with the checkpoint (auto_map); "
                "read it, and if you trust it use --trust-remote-code"
            ) from None
        reason = " ".join(str(error).split())[:160]
        raise QuantkitError(f"{path}: no usable tokenizer in it ({reason})") from None
