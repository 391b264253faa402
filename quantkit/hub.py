"""Upload of a verified output to the Hugging Face hub, in one commit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import read_json
from quantkit.formats.config import parse_quantization_config
from quantkit.formats.writer import UNFINISHED
from quantkit.models.names import find_model

_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_REPORT = "quantkit/report.json"
# Facts of the report that are folders of this machine, which are nobody else's concern.
_PATHS = ("source", "exported_from")
_LOGIN = "`hf auth login`, or set HF_TOKEN to a token that may write"


def check_target(repo: str, *, overwrite: bool = False) -> None:
    """Refuse before anything is quantized what would fail at the end.

    Args:
        repo: ORG/NAME.
        overwrite: whether a repository that is there already may get another commit.

    Raises:
        QuantkitError: not such a name, no token or one that is not accepted, or the repository exists.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if not _REPO.fullmatch(repo):
        raise QuantkitError(f"{repo}: not the name of a repository; ORG/NAME is expected")
    if is_offline_mode():
        raise QuantkitError(f"{repo}: HF_HUB_OFFLINE is set; unset it to upload")
    if get_token() is None:
        raise QuantkitError(f"{repo}: no token of the hub was found; {_LOGIN}")
    api = _api()
    _ask(repo, api.whoami)
    if not overwrite and _ask(repo, lambda: api.repo_exists(repo)):
        raise QuantkitError(f"{repo}: exists already; --overwrite adds a commit to it")


def push(
    model: str | Path, repo: str, *, private: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Upload an output of quantkit; one that does not verify is not.

    Args:
        model: its folder.
        repo: ORG/NAME on the hub.
        private: of a repository that is made for it.
        overwrite: whether a repository that is there already may get another commit.

    Returns:
        `url`, `files`, `bytes`.

    Raises:
        QuantkitError: `check_target`'s reasons, no finished output, or a refusal of the hub.
    """
    from huggingface_hub import CommitOperationAdd

    from quantkit.verify import verify

    folder = find_model(str(model))
    if (folder / UNFINISHED).exists():
        raise QuantkitError(f"{folder}: holds an unfinished run; finish it, nothing was uploaded")
    parse_quantization_config(read_json(folder / "config.json"), str(folder))
    check_target(repo, overwrite=overwrite)
    problems = verify(folder).problems
    if problems:
        raise QuantkitError(f"{folder}: does not verify ({problems[0]}); nothing was uploaded")
    _complete_documents(folder)
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not _hidden(f, folder)]
    operations = [
        CommitOperationAdd(f.relative_to(folder).as_posix(), _content(f, folder)) for f in files
    ]
    api = _api()
    _ask(repo, lambda: api.create_repo(repo, private=private or None, exist_ok=overwrite))
    message = f"Upload {folder.resolve().name}, quantized by quantkit"
    done = _ask(repo, lambda: api.create_commit(repo, operations, commit_message=message))
    return {
        "url": str(done.repo_url),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _complete_documents(folder: Path) -> None:
    """Draw the report's page and the model card where one is missing: a checkpoint without a card says nothing.

    A card of the user's own stays as it is, and so does an output whose report is gone.
    """
    from quantkit.report.documents import CARD_FILE, PAGE_FILE, write_documents

    missing = [name for name in (PAGE_FILE, CARD_FILE) if not (folder / name).is_file()]
    if missing and (folder / _REPORT).is_file():
        write_documents(folder)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _content(file: Path, folder: Path) -> Path | bytes:
    """What is uploaded of a file; of the report, without this machine's folders."""
    if file.relative_to(folder).as_posix() != _REPORT:
        return file
    report = read_json(file)
    shown = {
        key: Path(value).name if key in _PATHS and Path(str(value)).is_absolute() else value
        for key, value in report.items()
    }
    return json.dumps(shown, indent=2).encode() + b"\n"


def _ask(repo: str, call: Any) -> Any:
    """A call of the hub; each refusal in one line."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return call()
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise QuantkitError(f"{repo}: the hub does not accept the token; {_LOGIN}") from None
        if status == 403:
            organization = repo.partition("/")[0]
            raise QuantkitError(
                f"{repo}: the token may not write to {organization}; choose another ORG, or {_LOGIN}"
            ) from None
        if status == 409:
            raise QuantkitError(
                f"{repo}: exists already; --overwrite adds a commit to it"
            ) from None
        said = " ".join(str(error).split())[:160]
        raise QuantkitError(f"{repo}: the hub refused ({said})") from None
    except Exception as error:  # of the HTTP library, which changes between the hub's releases
        raise QuantkitError(
            f"{repo}: the hub cannot be reached ({type(error).__name__}); check the network, or HF_ENDPOINT"
        ) from None
