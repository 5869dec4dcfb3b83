"""``dmdd bench``: measurements that come with the repository, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure how well the line keeps a device busy.")
ROOT = Path(__file__).parent.parent


@bench.callback()
def _group() -> None:
    """Keep this a group, even while it has one command."""


@bench.command("gpu-sim")
def gpu_sim(
    out: Annotated[Path, typer.Option(help="Folder of the picture, the Chrome traces and the figures.")] = Path(
        "gpu-sim"
    ),
    lanes: Annotated[str, typer.Option(help="Numbers of lanes, separated by commas.")] = "1,2,3",
    batches: Annotated[int, typer.Option(help="Batches of each measurement, all lanes together.", min=10)] = 300,
    copy_ms: Annotated[float, typer.Option(help="Copy of a batch to the device.", min=0.1)] = 2.0,
    run_ms: Annotated[float, typer.Option(help="Inference on a batch.", min=0.1)] = 5.0,
    back_ms: Annotated[float, typer.Option(help="Copy of a batch's results back.", min=0.1)] = 1.0,
) -> None:
    """Measure how lanes overlap copies and inference, on a simulated GPU with set times; draw the timeline.

    The lanes, pycuda and the order of all calls are real; the device is not, so nothing is said of any GPU's speed.
    Needs a checkout of the repository and a C compiler, no GPU. Exit code 1 if two or more lanes do not reach 95% of
    what the slowest stage allows, 2 if it cannot run here.
    """
    _require_checkout()
    options = [f"--lanes={lanes}", f"--batches={batches}", f"--out={out.resolve()}"]
    options += [f"--copy-ms={copy_ms}", f"--run-ms={run_ms}", f"--back-ms={back_ms}"]
    # A process of its own: the simulated driver stays loaded for good under the name of NVIDIA's.
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_sim", *options], cwd=ROOT, check=False)
    raise typer.Exit(done.returncode)


def _require_checkout() -> None:
    if not all((ROOT / part).is_file() for part in ("tests/sim/driver.py", "benchmarks/gpu_sim.py")):
        typer.echo(
            f"dmdd: the simulated GPU comes with the repository, not with the package, and {ROOT} is no checkout: clone"
            " it, `make setup`, and run this there",
            err=True,
        )
        raise typer.Exit(2)
