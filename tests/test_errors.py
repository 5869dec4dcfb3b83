"""Errors for people: what the user can mend is one line, what is our fault keeps its traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import zmq

import pipeline
from engines.bundle import BundleError
from engines.calibration import CalibrationError
from engines.store import StoreError
from pipeline.config import ConfigError
from pipeline.errors import MENDABLE, MissingExtraError, explain
from pipeline.sources import SourceError

ROOT = Path(pipeline.__file__).parents[1]


@pytest.mark.parametrize(
    "kind", [ConfigError, BundleError, CalibrationError, StoreError, SourceError, OSError, FileNotFoundError]
)
def test_an_error_that_can_be_mended_is_its_message(kind: type[Exception]) -> None:
    """The message names the remedy; nothing else is shown."""
    assert explain(kind("do this")) == "do this"


def test_a_kind_of_mendable_error_is_mendable() -> None:
    """Subclasses count: what is derived from a known error is explained as that."""

    class Special(ConfigError):
        pass

    assert explain(Special("do that")) == "do that"


def test_a_zeromq_error_is_explained() -> None:
    """An address in use is the user's to mend."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket, pytest.raises(zmq.ZMQError) as caught:
        socket.bind("tcp://nowhere")
    assert explain(caught.value) == str(caught.value)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, AssertionError, KeyError, MemoryError])
def test_any_other_error_is_ours(kind: type[Exception]) -> None:
    """A fault of the program is not made to look like one of the user."""
    assert explain(kind("x")) is None


def test_a_missing_extra_says_what_to_install() -> None:
    """The command is ready to be typed."""
    message = explain(MissingExtraError("train", "torch"))
    assert message == "torch is not installed: pip install 'dmdd-line[train]'"


def test_every_name_of_the_list_is_an_error_of_the_product() -> None:
    """A renamed class would otherwise lose its explanation unnoticed."""
    source = "\n".join(path.read_text() for path in ROOT.glob("*/*.py") if path.parent.name != "tests")
    defined = set(re.findall(r"^class (\w+)\(", source, re.MULTILINE))
    assert MENDABLE - defined == {"ZMQError"}
