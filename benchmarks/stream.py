"""Stream a labelled test set through a real line and count what stands in Redis.

Two senders at once: ``dmdd camera`` with the files as they are, and the real ``imagezmq`` client with decoded
arrays. Every part has to be answered once; the image AUROC of the streamed scores has to be the one of
``dmdd evaluate``; every heatmap that a record names has to be readable.

    python -m benchmarks.stream ENGINE DATA --store STORE --json FILE
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import imagezmq
import numpy as np
import redis

from pipeline.embedded import redis_server
from pipeline.records import Keys
from pipeline.tally import Tally
from train.data import labelled_samples, read_image
from train.metrics import image_metrics

CONFIG = """\
[line]
name = "stream"
[[sockets]]
address = "ipc://{folder}/push"
[[sockets]]
address = "ipc://{folder}/rep"
kind = "rep"
protocol = "imagezmq"
[engine]
store = "{store}"
name = "{engine}"
[redis]
url = "{url}"
heatmaps = "all"
[cameras.cam1]
deadline_ms = 2000
[cameras.pi]
deadline_ms = 2000
"""
KEYS = Keys("stream")


def run_line(folder: Path, engine: str, store: Path, url: str, client: redis.Redis) -> subprocess.Popen[bytes]:
    """Start the line and wait for its heartbeat."""
    config = folder / "config.toml"
    config.write_text(CONFIG.format(folder=folder, store=store.resolve(), engine=engine, url=url))
    line = subprocess.Popen([sys.executable, "-m", "pipeline", "run", "-c", str(config)])
    while not client.exists(KEYS.heartbeat):
        if line.poll() is not None:
            raise SystemExit("the line did not start")
        time.sleep(0.05)
    return line


def send_imagezmq(folder: Path, paths: list[Path], rate: float) -> None:
    """Send decoded images with the real client, one at a time."""
    with imagezmq.ImageSender(f"ipc://{folder}/rep") as sender:
        for path in paths:
            sender.send_image(f"pi|{path.name}", read_image(path, 3))
            time.sleep(1 / rate)


def records(client: redis.Redis, camera: str) -> list[dict[str, str]]:
    """Every record of a camera."""
    found: Any = client.xrange(KEYS.verdicts(camera))
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in found]


def main() -> int:
    """Stream, count, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("data", type=Path)
    parser.add_argument("--store", type=Path, default=Path("store"))
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    samples = labelled_samples(arguments.data)
    with tempfile.TemporaryDirectory() as name, redis_server(Path(name) / "redis") as url:
        folder, client = Path(name), redis.Redis.from_url(url, socket_timeout=5)
        line = run_line(folder, arguments.engine, arguments.store, url, client)
        paths = [sample.path for sample in samples]
        second = threading.Thread(target=send_imagezmq, args=(folder, paths, arguments.rate / 2))
        second.start()
        command = [sys.executable, "-m", "pipeline", "camera", str(arguments.data / "test"), "--id", "cam1"]
        subprocess.run([*command, "--address", f"ipc://{folder}/push", "--rate", str(arguments.rate)], check=True)
        second.join()
        while not client.exists(KEYS.eos("cam1")) or client.xlen(KEYS.verdicts("pi")) < len(samples):
            time.sleep(0.05)
        line.terminate()
        stopped = line.wait()
        figures = {"line_exit_code": stopped, **count(client, len(samples))}
        client.close()
    text = json.dumps(figures, indent=2)
    sys.stdout.write(text + "\n")
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return int(bool(figures["cam1_unanswered"] or figures["cam1_answered_more_than_once"] or stopped))


def count(client: redis.Redis, parts: int) -> dict[str, float]:
    """What the streams hold."""
    figures: dict[str, float] = {}
    for camera in ("cam1", "pi"):
        found, tally = records(client, camera), Tally()
        for fields in found:
            tally.add(fields)
        tally.expect(camera, found[0]["session"], parts)
        figures |= {f"{camera}_{name}": value for name, value in tally.figures().items()}
        readable = [cv2.imdecode(np.frombuffer(client.get(r["heatmap"]) or b"", np.uint8), 0) for r in found]
        figures[f"{camera}_heatmaps_readable"] = sum(image is not None for image in readable)
    found = records(client, "cam1")
    scores = np.array([float(r["score"]) for r in found])
    figures["cam1_image_auroc"] = image_metrics(scores, np.array([r["truth"] != "good" for r in found]))["image_auroc"]
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
