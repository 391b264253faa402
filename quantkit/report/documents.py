"""Facts -> the two documents, written beside the model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from quantkit.errors import QuantkitError
from quantkit.report.facts import Facts, collect
from quantkit.report.figures import in_bytes, in_seconds, percent, sections

PAGE_FILE = "quantkit/report.html"
CARD_FILE = "README.md"
# A card that holds this line was written by us and is ours to replace; without it, it is the user's.
MARK = "<!-- made by quantkit: remove this line to keep your own changes -->"


def write_documents(folder: Path, name: str | None = None) -> list[Path]:
    """Write the page and, unless a user's own card is there, the model card.

    Args:
        folder: an output of quantkit.
        name: what to call it; the folder's own name if left out.

    Returns:
        The files written.

    Raises:
        QuantkitError: no output of quantkit, no report in it, or it cannot be written.
    """
    facts = collect(folder, name)
    documents = {PAGE_FILE: render_page(facts)}
    if not _users_own(folder / CARD_FILE):
        documents[CARD_FILE] = render_card(facts)
    written = []
    for relative, text in documents.items():
        path = folder / relative
        draft = path.with_name(path.name + ".tmp")
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        except OSError as error:
            raise QuantkitError(f"{path}: cannot be written ({error.strerror})") from None
        written.append(path)
    return written


def _users_own(card: Path) -> bool:
    try:
        return MARK not in card.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True


def render_page(facts: Facts) -> str:
    """The report: one HTML page that needs nothing from elsewhere."""
    return _template("report.html.jinja").render(facts=facts, sections=sections(facts))


def render_card(facts: Facts) -> str:
    """The model card, with the hub's front matter."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    return _template("card.md.jinja").render(facts=facts, front_matter=front, mark=MARK)


def front_matter(facts: Facts) -> dict[str, Any]:
    """What the hub indexes. The license and the languages are the original's, where its card names them."""
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    for key in ("license", "license_name", "license_link", "language"):
        if key in facts.source_card:
            data[key] = facts.source_card[key]
    if facts.base_is_hub_id:
        data |= {"base_model": facts.base, "base_model_relation": "quantized"}
    data["tags"] = ["quantkit", facts.recipe_name, "compressed-tensors"]
    return data


def _template(name: str) -> jinja2.Template:
    page = name.endswith(".html.jinja")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantkit.report"),
        autoescape=page,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": percent,
        "in_bytes": in_bytes,
        "in_seconds": in_seconds,
        "basename": lambda path: Path(str(path)).name,
        "plus_minus": _plus_minus,
        "code": _code,
        "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    }
    return environment.get_template(name)


def _code(text: str) -> Markup:
    """What stands between backticks, as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _plus_minus(value: float | None, error: float | None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")
