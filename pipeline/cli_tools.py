"""``dmdd record``, ``replay``, ``status`` and ``export-rejects``: tools beside a running line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.export_rejects import Exported
    from pipeline.recording import Manifest
    from pipeline.verdict_diff import Diff

SHOWN = 20
REDIS = "redis://127.0.0.1:6379/0"
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The config file of the line.")]
MaybeConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The config file of the line, instead of --redis and --line.")
]
UrlOption = Annotated[str, typer.Option("--redis", envvar="REDIS_URL", help="Address of Redis.")]
LineOption = Annotated[str, typer.Option(help="Name of the line.")]


def record(
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not hold a recording.")],
    config: ConfigOption = Path("config.toml"),
    listen: Annotated[
        list[str] | None,
        typer.Option(help="Address to bind for cameras, one for each socket that the line binds, in their order."),
    ] = None,
    socket: Annotated[
        list[str] | None, typer.Option(help="Record this socket of the config only, by its address; may be repeated.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Longest time; 0 for no limit.", min=0)] = 0.0,
    parts: Annotated[int, typer.Option(help="Most frames; 0 for no limit.", min=0)] = 0,
    max_bytes: Annotated[int, typer.Option(help="Largest recording; it ends there.", min=1 << 16)] = 8 << 30,
    leave: Annotated[
        bool, typer.Option("--exit", help="End with the recording, though cameras still send here.")
    ] = False,
) -> None:
    """Record the frames and verdicts of a running line, bit for bit.

    Where the line binds its socket, the cameras send to --listen meanwhile, and every message is handed on to the line
    as it is. That goes on after the recording has ended, until Ctrl-C: first point the cameras back. Where the line
    subscribes to cameras, nothing of this is needed. Examples:

      dmdd record monday --config config.toml --listen tcp://0.0.0.0:5556 --seconds 600

      dmdd record monday --config config.toml --parts 1000
    """
    import signal

    from pipeline import config as settings
    from pipeline import logs, taps
    from pipeline.config import Logging
    from pipeline.recorder import Limits, Recorder
    from pipeline.redis_client import connect

    logs.configure(Logging(format="console"))
    loaded = settings.load(config)
    planned = taps.plan(loaded.sockets, listen or (), socket or ())
    limits = Limits(seconds, parts, max_bytes, stay=not leave)
    recorder = Recorder(loaded, planned, out, limits, lambda: connect(loaded.redis, loaded.line.name, timeout_ms=2000))
    signal.signal(signal.SIGTERM, recorder.stop)
    signal.signal(signal.SIGINT, recorder.stop)
    stays = not leave and any(tap.hands_on for tap in planned)
    recorder.run(lambda: _say_recorded(out, recorder.manifest, stays=stays))
    raise typer.Exit(1 if recorder.failed else 0)


def _say_recorded(out: Path, manifest: Manifest, *, stays: bool) -> None:
    skipped = f", {manifest.skipped} not recorded" if manifest.skipped else ""
    typer.echo(f"{out}: {manifest.messages} messages, {manifest.verdicts} verdicts{skipped}; {manifest.ending}")
    if stays and manifest.ending != "stopped":
        typer.echo("frames are still handed on to the line: point the cameras back to it, then Ctrl-C", err=True)


def replay(
    folder: Annotated[Path, typer.Argument(help="A recording.")],
    address: Annotated[str, typer.Option(help="ZeroMQ address of the line.")] = "tcp://127.0.0.1:5555",
    config: MaybeConfigOption = None,
    url: UrlOption = REDIS,
    line: LineOption = "line1",
    speed: Annotated[
        float, typer.Option(help="1 for the original pace, 2 for twice as fast; 0 for as fast as it answers.", min=0)
    ] = 1.0,
    window: Annotated[int, typer.Option(help="With --speed 0: frames that wait for verdicts.", min=1)] = 16,
    pattern: Annotated[str, typer.Option(help="push (to a pull socket) or pub (to a sub socket).")] = "push",
    bind: Annotated[bool, typer.Option("--bind", help="Bind the address instead of connecting to it.")] = False,
    compare: Annotated[bool, typer.Option(help="Compare the new verdicts with the recorded ones.")] = True,
    same_line: Annotated[
        bool, typer.Option("--same-line", help="Send to the line that was recorded, though a gate may listen to it.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")] = None,
) -> None:
    """Send a recording to a line again and compare its verdicts, for instance before an engine is swapped.

    NEVER to the line that a gate listens to: its PLC would act on yesterday's parts. Start a second line, with another
    line.name, socket and spool, and the engine on trial. Exit code 1 if a recorded verdict was not given again.

      dmdd replay monday --address tcp://127.0.0.1:5655 --line trial

      dmdd replay monday --address tcp://127.0.0.1:5655 --line trial --speed 0 --json diff.json
    """
    from pipeline import verdict_diff
    from pipeline.line_view import view_of
    from pipeline.recording import Recording, RecordingError
    from pipeline.replay import Replayer, Replaying

    if pattern not in {"push", "pub"}:
        raise typer.BadParameter(f"{pattern!r}: push or pub", param_hint="--pattern")
    view = view_of(config, url, line)
    settings = Replaying(address, pattern, bind=bind, speed=speed, window=window)
    with Recording(folder) as recording, view.connect() as client:
        if recording.manifest.line == view.keys.line and not same_line:
            msg = f"line {view.keys.line} is the one that was recorded: its PLC would take old parts for new ones."
            raise RecordingError(f"{msg} Give another by --line or --config, or --same-line")
        replayer = Replayer(recording, settings, client, view.keys)
        replayer.run(
            lambda sent: typer.echo(f"\r{sent} of {recording.manifest.messages or '?'} sent", nl=False, err=True)
        )
        typer.echo(err=True)
        _say_lost(recording.lost_bytes)
        if not compare:
            typer.echo(f"{replayer.sent} messages sent, {len(replayer.verdicts)} verdicts")
            return
        diff = verdict_diff.compare(verdict_diff.recorded(recording), replayer.verdicts, replayer.spans)
        _say_lost(recording.lost_bytes)
        _say_diff(diff, recording.manifest)
    if json is not None:
        import msgspec

        json.write_bytes(msgspec.json.format(msgspec.json.encode(diff.figures())) + b"\n")
    raise typer.Exit(0 if diff.passed else 1)


def _say_lost(count: int) -> None:
    if count:
        typer.echo(f"{count} bytes of the recording are torn or damaged; what is whole is used", err=True)


def _say_diff(diff: Diff, manifest: Manifest) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Against the record of line {manifest.line}", title_justify="left", show_header=False)
    for name, value in diff.figures().items():
        shown = ", ".join(value) if isinstance(value, list) else "" if value is None else value
        table.add_row(name.replace("_", " "), f"{shown:.6g}" if isinstance(shown, float) else str(shown))
    Console().print(table)
    for change in diff.changes[:SHOWN]:
        typer.echo(f"changed: {change.text}")
    if len(diff.changes) > SHOWN:
        typer.echo(f"changed: {len(diff.changes) - SHOWN} more")
    if manifest.renumbered:
        typer.echo(f"not compared, numbered by the line itself: {', '.join(manifest.renumbered)}", err=True)
    typer.echo(
        "every recorded verdict was given again" if diff.passed else "NOT every recorded verdict was given again"
    )


def status(
    config: MaybeConfigOption = None,
    url: UrlOption = REDIS,
    line: LineOption = "line1",
    once: Annotated[
        bool, typer.Option("--once", help="Show it once; exit code 0 if the line is alive, else 1.")
    ] = False,
) -> None:
    """Show the line in the terminal: health, engines, spool, and each camera's rate, yield, latency and drift.

    It reads Redis alone. Without --config it shows the cameras that have verdicts. Examples:

      dmdd status --config config.toml

      dmdd status --once --line line1 || echo "the line is down"
    """
    from rich.console import Console

    from pipeline import logs
    from pipeline import status as screen
    from pipeline.config import Logging
    from pipeline.line_view import view_of
    from pipeline.page.follower import Follower
    from pipeline.recovery import RedisUnreachableError

    logs.configure(Logging(level="error", format="console"))  # the table itself says what is wrong
    view = view_of(config, url, line)
    try:
        cameras = view.cameras()
    except RedisUnreachableError:  # the table says it, and goes on when it is back
        cameras = ()
    follower = Follower(view.connect, view.keys, cameras)
    if once:
        raise typer.Exit(0 if screen.once(follower, view.keys.line, Console()) else 1)
    screen.watch(follower, view.keys.line, Console())


def export_rejects(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    since: Annotated[str, typer.Option(help="From when on: 90m, 2h, 7d ago, or 2026-01-31T06:00, local.")],
    until: Annotated[str, typer.Option(help="Until when; default: now.")] = "",
    camera: Annotated[list[str] | None, typer.Option(help="Of this camera only; may be repeated.")] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Also parts that people have labelled in the span: good/ and defective/.")
    ] = False,
    take_labels: Annotated[
        bool, typer.Option("--take-labels", help="With --labels: then remove these labels and images from Redis.")
    ] = False,
    config: MaybeConfigOption = None,
    url: UrlOption = REDIS,
    line: LineOption = "line1",
) -> None:
    """Write the rejects of a time span to a folder: records as CSV, images and heatmaps as files.

    Images and heatmaps are those that Redis still has (redis.blob_ttl_s). Files are named CAMERA-SESSION-SEQ. Examples:

      dmdd export-rejects shift --config config.toml --since 8h

      dmdd export-rejects labelled --config config.toml --since 30d --labels

      dmdd calibrate washer --good labelled/good --defects labelled/defective
    """
    import time

    from pipeline.export_rejects import Exporter, Span, parse_time
    from pipeline.line_view import view_of

    if take_labels and not labels:
        raise typer.BadParameter("goes with --labels", param_hint="--take-labels")
    now = time.time()
    span = Span(parse_time(since, "--since", now), parse_time(until or "0s", "--until", now))
    view = view_of(config, url, line)
    with view.connect() as client:
        exporter = Exporter(client, view.keys, out)
        exporter.rejects(span, frozenset(camera or ()))
        if labels:
            exporter.labels(span)
        taken = exporter.take_out() if take_labels else 0
    _say_exported(out, exporter.done, taken)


def _say_exported(out: Path, done: Exported, taken: int) -> None:
    counts = done.counts
    typer.echo(f"{out}: {counts['records']} rejects, {counts['images']} images, {counts['heatmaps']} heatmaps")
    if gone := counts["images_gone"] + counts["heatmaps_gone"]:
        typer.echo(f"{gone} images or heatmaps are no longer in Redis: they live for redis.blob_ttl_s", err=True)
    if counts["unreadable"]:
        typer.echo(f"{counts['unreadable']} records were not written by a line, and are left out", err=True)
    if counts["labels"]:
        typer.echo(f"{counts['labels']} labelled parts: {counts['good']} good, {counts['defective']} defective")
    if counts["labels_without_image"]:
        typer.echo(f"{counts['labels_without_image']} of them have no image: it had lapsed when they were labelled")
    if taken:
        typer.echo(f"{taken} labels were removed from Redis")
