"""`quantkit report`: the page and the model card of an output, with what was measured since."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.models import model_or_last
from quantkit.cli.output import JsonOption, out, print_json


def command(
    model: Annotated[
        str | None, typer.Argument(help="A folder that `quantize` made; the last one if left out.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report (quantkit/report.html) and the model card (README.md) of a quantized model anew."""
    from quantkit.models.names import find_model
    from quantkit.report.documents import write_documents

    written = write_documents(find_model(model_or_last(model)))
    if as_json:
        print_json({"files": [str(path) for path in written]})
        return
    for path in written:
        out.print(str(path), markup=False)
    if not any(path.suffix == ".md" for path in written):
        out.print("README.md is your own: left as it is")
