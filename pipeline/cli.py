"""The command ``dmdd``. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import MissingExtraError, explain

app = typer.Typer(
    name="dmdd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Inspect every part on a production line: train an engine from good parts, run it, read the rejects.",
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The config file.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")]
StoreOption = Annotated[Path, typer.Option("--store", envvar="DMDD_STORE", help="Folder of the engine store.")]
UrlOption = Annotated[str, typer.Option("--redis", envvar="REDIS_URL", help="Address of Redis.")]
STORE = Path("store")
REDIS = "redis://127.0.0.1:6379/0"


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(help="How long to run.", min=1)] = 20.0,
    rate: Annotated[float, typer.Option(help="Parts a second of each camera.", min=0.1)] = 8.0,
    json: JsonOption = None,
) -> None:
    """Run everything on this box: simulated cameras, the line, an embedded Redis; live verdicts, then a summary.

    Exit code 0 only if every part was answered exactly once. Uses the Redis at $REDIS_URL if that is set.
    """
    from pipeline.demo import run_demo

    raise typer.Exit(run_demo(seconds=seconds, rate=rate, json_file=json))


@app.command()
def run(
    config: ConfigOption = Path("config.toml"),
    check: Annotated[bool, typer.Option("--check", help="Only check the config file.")] = False,
) -> None:
    """Run the line: the service. Stops cleanly on SIGTERM."""
    from pipeline import config as settings

    loaded = settings.load(config)
    if check:
        typer.echo(f"{config}: valid; line {loaded.line.name}, cameras {', '.join(loaded.cameras)}")
        return
    from pipeline import logs
    from pipeline.service import Line

    sys.setswitchinterval(0.001)  # threads here do little and often: hand over sooner than after 5 ms
    logs.configure(loaded.logging)
    line = Line(loaded)
    line.handle_signals()
    try:
        line.start()
    except BaseException:
        line.stop()
        raise
    line.run()


@app.command()
def camera(
    source: Annotated[str, typer.Argument(help="sim[:washer|cap|plate], a folder, a video file, a device or a url.")],
    name: Annotated[str, typer.Option("--id", help="Camera id, as in [cameras.ID].")] = "cam1",
    address: Annotated[str, typer.Option(help="ZeroMQ address of the line.")] = "tcp://127.0.0.1:5555",
    rate: Annotated[float, typer.Option(help="Frames a second; 0 for as fast as they come.", min=0)] = 0.0,
    count: Annotated[int, typer.Option(help="Frames to send; 0 for all.", min=0)] = 0,
    loop: Annotated[bool, typer.Option("--loop", help="Start again at the end of a folder or file.")] = False,
    wait: Annotated[
        bool | None,
        typer.Option("--wait/--drop", help="When the line is slow: wait, or drop the oldest. Default: wait for files."),
    ] = None,
    pattern: Annotated[str, typer.Option(help="push (to a pull socket) or pub (to a sub socket).")] = "push",
    bind: Annotated[bool, typer.Option("--bind", help="Bind the address instead of connecting to it.")] = False,
    buffer: Annotated[int, typer.Option(help="Frames held while the line is slow.", min=1)] = 32,
    size: Annotated[str, typer.Option(help="Simulator: WIDTHxHEIGHT.")] = "320x320",
    seed: Annotated[int, typer.Option(help="Simulator: seed.", min=0)] = 0,
    defects: Annotated[float, typer.Option(help="Simulator: share of defective parts.", min=0, max=1)] = 0.1,
) -> None:
    """Send frames to a line.

    A folder in MVTec layout sends the class of each image along as its truth. Examples:

      dmdd camera sim:cap --id cam2 --rate 30
      dmdd camera data/test --rate 20
      dmdd camera rtsp://10.0.0.5/stream --id dock
      dmdd camera 0 --id bench
    """
    from pipeline import logs
    from pipeline.camera import CameraSender, Sending
    from pipeline.config import Logging
    from pipeline.sources import FolderSource, open_source
    from pipeline.wire import CAMERA_ID

    logs.configure(Logging(format="console"))
    if not CAMERA_ID.fullmatch(name):
        raise typer.BadParameter(f"{name!r}: 1 to 64 letters, digits, '_', '.', '-'", param_hint="--id")
    if pattern not in {"push", "pub"}:
        raise typer.BadParameter(f"{pattern!r}: push or pub", param_hint="--pattern")
    opened = open_source(source, name=name, size=_size(size), seed=seed, defects=defects, loop=loop)
    files = isinstance(opened, FolderSource)
    sender = CameraSender(
        opened,
        Sending(
            address=address,
            camera=name,
            pattern=pattern,
            mode="bind" if bind else "connect",
            rate=rate,
            count=count,
            buffer=buffer,
            wait=files if wait is None else wait,
        ),
    )
    signal.signal(signal.SIGTERM, sender.stop)
    signal.signal(signal.SIGINT, sender.stop)
    sender.run()
    typer.echo(f"{name}: {sender.captured} captured, {sender.sent} sent, {sender.dropped} dropped", err=True)


@app.command()
def rejects(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more; from now on.")] = False,
    line: Annotated[str, typer.Option(help="Name of the line.")] = "line1",
    url: UrlOption = REDIS,
) -> None:
    """Print rejects as a PLC gateway reads them, with sequence and heartbeat checks."""
    from pipeline.rejects import RejectFollower
    from pipeline.service import connect

    client = connect(url, 2000)
    try:
        for event in RejectFollower(client, line, from_start=not follow).events(follow=follow):
            typer.echo(event.text)
    except KeyboardInterrupt:
        pass
    finally:
        client.close()


@app.command()
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
    patience: Annotated[
        int, typer.Option(help="Stop after so many of ten validations without progress; 0: never.", min=0)
    ] = 0,
    foreground: Annotated[str, typer.Option(help="auto, grabcut, otsu, otsu-inverse or none.")] = "auto",
    textures: Annotated[Path | None, typer.Option(help="Folder of texture images (e.g. DTD) for synthesis.")] = None,
    defects: Annotated[
        Path | None, typer.Option(help="Folder of real defects with masks, to be mixed with the synthetic ones.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An option of the method, NAME=VALUE; docs/methods.md.")
    ] = None,
    false_rejects: Annotated[
        float | None,
        typer.Option(
            help="Share of good parts that may be rejected; default: 0.01, or the smallest that the held-out images"
            " support.",
            min=1e-4,
            max=0.5,
        ),
    ] = None,
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
        size=_size(size),
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
        choices=dict(_assignment(text) for text in option or ()),
        false_rejects=false_rejects,
    )
    engine = name or data.resolve().name
    train_command(data, method=method, name=engine, store=store, activate=activate, json_file=json, options=options)


@app.command()
def evaluate(
    engine: Annotated[str, typer.Argument(help="name, name@version, or a bundle's folder.")],
    data: Annotated[Path, typer.Argument(help="Folder with test/<class>/ and ground_truth/<class>/.")],
    store: StoreOption = STORE,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    report: Annotated[
        Path | None,
        typer.Option(help="The HTML file to write; default: evaluation-NAME-VERSION.html in the current folder."),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no HTML file.")] = False,
    json: JsonOption = None,
) -> None:
    """Measure an engine on labelled images and write a report.

    Figures: AUROC, AP and F1 of images and pixels, per-region overlap, verdicts at the threshold, latency. The report
    is one HTML file that needs nothing else: charts, the worst errors with heatmaps, every kind of defect.
    """
    from train.evaluate import evaluate_command

    evaluate_command(
        engine,
        data,
        store=store,
        precision=precision,
        json_file=json,
        report=report,
        write_report=not no_report,
    )


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}: NAME=VALUE, e.g. statistics=places", param_hint="--option")
    return name, value


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: WIDTHxHEIGHT, e.g. 320x240", param_hint="--size") from None


def _add_engine_commands() -> None:
    from pipeline.cli_calibrate import calibrate
    from pipeline.cli_compare import compare
    from pipeline.cli_engines import build, engines

    app.add_typer(engines, name="engines")
    app.command()(build)
    app.command()(calibrate)
    app.command()(compare)


_add_engine_commands()


def main() -> Any:
    """Entry point: errors that a user can mend are one line, not a traceback."""
    try:
        app()
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        typer.echo(f"dmdd: {message}", err=True)
        raise SystemExit(2) from None
