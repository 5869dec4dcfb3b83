"""``openvino``, without the part of it that reports usage over the network.

Importing OpenVINO also imports its model converter, which sends an event to a statistics service at once.
A factory's line does nothing of the kind; nor is the converter needed here. Hiding it from the import makes
OpenVINO go on without it.
"""

from __future__ import annotations

import sys

sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402 - only after the converter is hidden

__all__ = ["ov"]
