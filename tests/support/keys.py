"""CURVE keys of a line and of two cameras, made anew in each run."""

from __future__ import annotations

from typing import Final

import zmq

from pipeline.curve import KeyPair, ServerKeys


def pair() -> KeyPair:
    """A new key pair."""
    return KeyPair(*zmq.curve_keypair())


LINE: Final = pair()
CAMERAS: Final = {"cam1": pair(), "cam2": pair()}


def server() -> ServerKeys:
    """What the line knows: its own pair, and the public halves of the cameras'."""
    return ServerKeys(LINE, {name: keys.public.decode() for name, keys in CAMERAS.items()})
