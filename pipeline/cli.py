"""The command ``dmdd``. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli_options import parse_size
from pipeline.errors import explain

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
    key: Annotated[
        Path | None, typer.Option(help="This camera's secret key, as `dmdd keys camera` made it, for a curve socket.")
    ] = None,
    server_key: Annotated[str, typer.Option(help="The line's public key: a file or its 40 characters.")] = "",
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
    from pipeline.curve import load_pair, load_public
    from pipeline.sources import FolderSource, open_source
    from pipeline.wire import CAMERA_ID

    if (key is None) != (not server_key):
        raise typer.BadParameter("--key and --server-key go together", param_hint="--server-key")
    logs.configure(Logging(format="console"))
    if not CAMERA_ID.fullmatch(name):
        raise typer.BadParameter(f"{name!r}: 1 to 64 letters, digits, '_', '.', '-'", param_hint="--id")
    if pattern not in {"push", "pub"}:
        raise typer.BadParameter(f"{pattern!r}: push or pub", param_hint="--pattern")
    opened = open_source(source, name=name, size=parse_size(size), seed=seed, defects=defects, loop=loop)
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
            key=None if key is None else load_pair(key),
            server_key=load_public(server_key) if server_key else b"",
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
    from pipeline.redis_client import connect_url
    from pipeline.rejects import RejectFollower

    client = connect_url(url, 2000)
    try:
        for event in RejectFollower(client, line, from_start=not follow).events(follow=follow):
            typer.echo(event.text)
    except KeyboardInterrupt:
        pass
    finally:
        client.close()


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


def _add_engine_commands() -> None:
    from pipeline.cli_bench import bench
    from pipeline.cli_calibrate import calibrate
    from pipeline.cli_compare import compare
    from pipeline.cli_doctor import doctor
    from pipeline.cli_engines import build, engines
    from pipeline.cli_install import install, uninstall
    from pipeline.cli_keys import keys
    from pipeline.cli_monitor import monitor
    from pipeline.cli_plc import plc
    from pipeline.cli_probe import probe
    from pipeline.cli_soak import soak
    from pipeline.cli_tools import export_rejects, record, replay, status
    from pipeline.cli_train import train

    app.add_typer(engines, name="engines")
    app.add_typer(bench, name="bench")
    app.add_typer(keys, name="keys")
    app.add_typer(plc, name="plc")
    app.command()(train)
    app.command()(build)
    app.command()(calibrate)
    app.command()(compare)
    app.command()(doctor)
    app.command()(soak)
    app.command()(monitor)
    app.command()(record)
    app.command()(replay)
    app.command()(status)
    app.command()(export_rejects)
    app.command()(probe)
    app.command()(install)
    app.command()(uninstall)


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
