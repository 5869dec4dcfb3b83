"""``python -m pipeline.soak.line``: ``dmdd run``, with faults inside the process that a control file can call up.

Nothing of the line imports this. It runs only where ``DMDD_SOAK_CONTROL`` names the control file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

CONTROL: Final = "DMDD_SOAK_CONTROL"


def main() -> None:
    """Put the injector in place, then be ``dmdd run`` with the arguments that were given."""
    control = os.environ.get(CONTROL, "")
    if not control:
        sys.exit(f"pipeline.soak.line is for soaks, which set {CONTROL}; a line is run by: dmdd run")
    from engines import build  # noqa: PLC0415 - before the modules that take compile_engine and the clock from it
    from pipeline.soak.injector import Injector  # noqa: PLC0415

    injector = Injector(Path(control))
    injector.turn_clock()
    build.compile_engine = injector.wrap(build.compile_engine)
    from pipeline import cli  # noqa: PLC0415

    cli.main()


if __name__ == "__main__":
    main()
