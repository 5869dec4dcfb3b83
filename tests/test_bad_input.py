"""Bad input, row by row of the table in the contracts: what is answered, and which counters move, over real sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from pipeline.config import Camera
from pipeline.curve import ServerKeys
from pipeline.ledger import Ledger
from pipeline.part_queue import Drop
from pipeline.parts import Part, Reason, Verdict
from pipeline.recipes import RecipeQueue
from tests import bad_input_table
from tests.support.bad_input import CAMERAS, CASES, LIMITS, SOCKETS, Case, Peer
from tests.support.receiving import Inspector, Receiving, receiving

PLAIN = {"parts", "below_threshold", *Verdict}
"""Counters that a table of bad input does not speak of: those of good parts, and sums."""


class Engine(Inspector):
    """An engine's queue, which takes every part."""

    def offer(self, part: Part) -> list[Drop]:
        """Answer a part; give none up."""
        self.put(part)
        return []


def recipes(ledger: Ledger, _: str, camera: Camera) -> RecipeQueue:
    """A camera's queue as the line has it, with one recipe."""
    return RecipeQueue(Engine(ledger, camera), {"cap": Engine(ledger, camera)}, ledger)


@pytest.fixture
def line(server_keys: ServerKeys) -> Iterator[Receiving]:
    """An intake with a plain socket, one behind CURVE, and one for imagezmq."""
    with receiving(*SOCKETS, cameras=CAMERAS, limits=LIMITS, keys=server_keys, queue_of=recipes) as started:
        yield started


def moved(line: Receiving) -> dict[str, int]:
    """The counters that speak of bad input."""
    return {str(name): count for name, count in line.counts().items() if name not in PLAIN}


def as_said(line: Receiving, case: Case) -> bool:
    """Whether records and counters are those of the row."""
    counters = moved(line)
    same = all(counters.get(name, 0) == count if count else counters.get(name) for name, count in case.counters)
    return bool(same) and len(line.outbox.records) >= len(case.reasons)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_a_row_of_the_table(line: Receiving, case: Case) -> None:
    """The records have these reasons in this order, these counters move and no other, and the line goes on."""
    with Peer(line, case.socket, case.key) as peer:
        case.send(peer)
        line.until(lambda: as_said(line, case))
        with Peer(line) as good:
            good.frame(0, session=99)  # whoever follows is served: it is answered after everything before it
            line.until(lambda: len(line.outbox.records) == len(case.reasons) + 1)
        time.sleep(0.02)
    assert [reason for _, reason in line.outbox.said()[:-1]] == list(case.reasons)
    assert line.outbox.said()[-1] == (0, "below_threshold")
    assert set(moved(line)) == {name for name, _ in case.counters}
    assert as_said(line, case)
    assert line.ledger.open == 0
    assert "refused_internal" not in line.counts() or case.counters == (("refused_internal", 1),)


def test_every_answer_is_a_known_reason() -> None:
    """The table promises nothing that a reader of the reasons would not find."""
    assert {reason for case in CASES for reason in case.reasons} <= set(Reason)
    assert len({case.what for case in CASES}) == len(CASES)


def test_the_document_is_up_to_date() -> None:
    """docs/contracts.md shows the very rows that are tested: python -m tests.bad_input_table --write."""
    assert bad_input_table.main([]) == 0
