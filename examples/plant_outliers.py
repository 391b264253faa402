"""Plant outliers in a Llama-like checkpoint without changing what it computes.

    python examples/plant_outliers.py llama llama-outliers

Quantization methods are judged on both versions: see the README.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_file

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import SINGLE, Checkpoint
from quantkit.models.names import find_model
from quantkit.models.outliers import plant_outliers


def main(
    source: Annotated[
        str, typer.Argument(help="A folder, a hub id, or `llama`, the bundled model.")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    factor_min: Annotated[float, typer.Option(help="Least factor of an outlier channel.")] = 20.0,
    factor_max: Annotated[float, typer.Option(help="Largest factor of an outlier channel.")] = 60.0,
    channels: Annotated[
        int, typer.Option(help="Outlier channels per norm and per gated product.")
    ] = 4,
    pairs: Annotated[int, typer.Option(help="Outlier RoPE pairs per KV head.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the choice of channels and factors.")] = 0,
) -> None:
    """Copy a checkpoint, with outliers planted."""
    try:
        if target.exists():
            raise QuantkitError(f"{target}: exists already; name another folder")
        checkpoint = Checkpoint(find_model(source))
        tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
        planted = plant_outliers(
            tensors,
            checkpoint.config,
            factor=(factor_min, factor_max),
            channels=channels,
            pairs=pairs,
            seed=seed,
        )
    except (QuantkitError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    target.mkdir(parents=True)
    for file in checkpoint.path.iterdir():
        if file.is_file() and "safetensors" not in file.name:
            shutil.copyfile(file, target / file.name)
    save_file(planted, str(target / SINGLE), metadata={"format": "pt"})
    typer.echo(f"{target}: {channels} channels per norm and product, {pairs} RoPE pairs per KV head, "
               f"{factor_min:g} to {factor_max:g} times, in {checkpoint.config['num_hidden_layers']} layers")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
