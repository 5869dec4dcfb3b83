"""Whether the line on this box is alive, asked of the line itself.

Redis is not asked: a line that has lost it goes on, and a restart would only cost parts. So this is what a container's
supervisor may restart a line by; a PLC goes by the heartbeat.
"""

from __future__ import annotations

import re
import urllib.request
from typing import Final, NamedTuple

from pipeline.config import ConfigError
from pipeline.health import State

STATE: Final = re.compile(r'(?m)^dmdd_state\{state="(\w+)"\} 1(?:\.0)?$')
ANY: Final = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}  # noqa: S104  what they mean here


class Answer(NamedTuple):
    """What the line says of itself.

    Attributes:
        alive: It answers, and is not stuck.
        ready: It takes frames.
        text: Its state, or why there is no answer.
    """

    alive: bool
    ready: bool
    text: str


def probe(address: str, timeout_s: float = 3.0) -> Answer:
    """Ask a line for its state.

    Args:
        address: Its ``metrics.address``, as the config has it.
        timeout_s: Longest wait for the answer.

    Raises:
        ConfigError: if the line serves no metrics.
    """
    if not address:
        msg = 'metrics.address is empty: set it, such as "127.0.0.1:9464"; the line is asked there'
        raise ConfigError(msg)
    host, _, port = address.rpartition(":")
    url = f"http://{ANY.get(host, host)}:{port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            found = STATE.search(answer.read().decode())
    except (OSError, ValueError) as error:
        return Answer(alive=False, ready=False, text=f"no answer from {url}: {error}")
    state = State(found[1]) if found else None
    return Answer(
        alive=state not in {None, State.ERROR},
        ready=state in {State.READY, State.CONTINUOUS},
        text=state or f"no state in {url}",
    )
