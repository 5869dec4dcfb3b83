"""``dmdd train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_engines import STORE, JsonOption, StoreOption
from pipeline.cli_options import parse_assignment, parse_size
from pipeline.errors import MissingExtraError

PatienceOption = Annotated[
    int, typer.Option(help="Stop after so many of ten validations without progress; 0: never.", min=0)
]
DefectsOption = Annotated[
    Path | None, typer.Option(help="Folder of real defects with masks, to be mixed with the synthetic ones.")
]
MethodOption = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="An option of the method, NAME=VALUE; docs/methods.md.")
]
FalseRejectsOption = Annotated[
    float | None,
    typer.Option(
        help="Share of good parts that may be rejected; default: 0.01, or the least that the held-out images support.",
        min=1e-4,
        max=0.5,
    ),
]


def train(
    data: Annotated[Path, typer.Argument(help="Folder of images of good parts: train/good/, good/ or flat.")],
    method: Annotated[str, typer.Option(help="The method: dmdd or adps.")] = "dmdd",
    name: Annotated[str, typer.Option(help="Name of the engine; default: the folder's name.")] = "",
    backbone: Annotated[str, typer.Option(help="efficientnet_lite0|1|2 or a timm model.")] = "efficientnet_lite0",
    weights: Annotated[Path | None, typer.Option(help="Local weights of the backbone.")] = None,
    size: Annotated[str, typer.Option(help="Input size: WIDTHxHEIGHT or one number, multiples of 32.")] = "256",
    tile: Annotated[int, typer.Option(help="Cut frames into overlapping tiles of this side; 0: whole.", min=0)] = 0,
    overlap: Annotated[float, typer.Option(help="Least overlap of tiles, a share.", min=0, max=0.5)] = 0.25,
    steps: Annotated[int, typer.Option(help="Training steps; 0 chooses by the number of images.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Batch size.", min=2)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    rate: Annotated[float, typer.Option(help="Peak learning rate; 0: the method's own.", min=0, max=1)] = 0.0,
    patience: PatienceOption = 0,
    foreground: Annotated[str, typer.Option(help="auto, grabcut, otsu, otsu-inverse or none.")] = "auto",
    textures: Annotated[Path | None, typer.Option(help="Folder of texture images (e.g. DTD) for synthesis.")] = None,
    defects: DefectsOption = None,
    option: MethodOption = None,
    false_rejects: FalseRejectsOption = None,
    store: StoreOption = STORE,
    activate: Annotated[bool, typer.Option(help="Activate the engine when it has passed the parity gate.")] = True,
    json: JsonOption = None,
) -> None:
    """Train an engine from images of good parts, validate it and put it into the store.

    Stopped or killed, the same command goes on from its last checkpoint.
    """
    try:
        from train.commands import Options, train_command
    except ModuleNotFoundError as error:
        raise MissingExtraError("train", error.name or "torch") from error

    options = Options(
        backbone=backbone,
        weights=weights,
        size=parse_size(size),
        tile=tile,
        overlap=overlap,
        steps=steps,
        batch=batch,
        seed=seed,
        rate=rate,
        patience=patience,
        foreground=foreground,
        textures=textures,
        defects=defects,
        choices=dict(parse_assignment(text) for text in option or ()),
        false_rejects=false_rejects,
    )
    engine = name or data.resolve().name
    train_command(data, method=method, name=engine, store=store, activate=activate, json_file=json, options=options)
