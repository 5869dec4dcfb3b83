"""The judge of a soak finds every kind of broken promise, and finds none where none is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.soak.checker import KINDS, check
from pipeline.soak.history import Ended, Entry, Event, History, Lost, Sent
from tests.support.story import DEADLINE_MS, MS, Story

CAMERAS = ("cam1", "cam2")
SECOND = 1_000_000_000


def kinds(history: History) -> set[str]:
    """The kinds of what the checker finds."""
    return {violation.kind for violation in check(history).violations}


def told(fates: list[tuple[str, str]]) -> History:
    """The history of these fates."""
    story = Story(*CAMERAS)
    for camera, fate in fates:
        if fate == "jump":
            story.jump(camera, 60)
        elif fate in {"turn", "die"}:
            getattr(story, fate)()
        else:
            getattr(story, fate)(camera)
    return story.close()


FATES = st.lists(
    st.tuples(st.sampled_from(CAMERAS), st.sampled_from((*Story.FATES, "jump", "turn", "begin", "die", "end"))),
    max_size=60,
)


@given(FATES)
def test_a_history_without_fault_passes(fates: list[tuple[str, str]]) -> None:
    """Whatever cameras, networks and line go through: where every promise is kept, nothing is found."""
    # After the end of a session a camera begins another.
    whole = [step for camera, fate in fates for step in ((camera, fate), *([(camera, "begin")] * (fate == "end")))]
    assert check(told(whole)).violations == []


BASE = [
    ("cam1", "good"), ("cam1", "bad"), ("cam2", "good"), ("cam1", "late"), ("cam1", "skipped"), ("cam1", "good"),
    ("cam2", "lost"), ("cam2", "bad"), ("cam1", "turn"), ("cam1", "unsent"), ("cam1", "doubled"), ("cam2", "broken"),
    ("cam1", "end"), ("cam1", "begin"), ("cam1", "good"), ("cam1", "jump"), ("cam1", "swapped"), ("cam2", "good"),
]  # fmt: skip


def where(history: History, stream: str, verdict: str = "", reason: str = "") -> Entry:
    """The first entry of a stream with this verdict and reason."""
    return next(
        entry
        for entry in history.final
        if entry.stream.startswith(stream)
        and (not verdict or entry.fields["verdict"] == verdict)
        and (not reason or entry.fields["reason"] == reason)
    )


def replace(history: History, entry: Entry, **changes: Any) -> None:
    """Give an entry other fields, in Redis and as it was read."""
    changed = msgspec.structs.replace(entry, fields={**entry.fields, **changes})
    for entries in (history.final, history.live):
        entries[entries.index(entry)] = changed
    for number, item in enumerate(history.latest):
        if item.fields == entry.fields:
            history.latest[number] = msgspec.structs.replace(item, fields=changed.fields)


def remove(history: History, entry: Entry) -> None:
    """Let an entry never have been."""
    history.final.remove(entry)
    history.live.remove(entry)


def add(history: History, entry: Entry, **changes: Any) -> None:
    """Let there be one more entry, read as it came."""
    more = msgspec.structs.replace(entry, **changes)
    history.final.append(more)
    history.live.append(more)


def sent_of(history: History, entry: Entry) -> Sent:
    """The frame that an entry is of."""
    fields = entry.fields
    wanted = fields["camera"], int(fields["session"]), int(fields["seq"])
    return next(sent for sent in history.sent if (sent.camera, sent.session, sent.seq) == wanted)


PLANTED: dict[str, Callable[[History], object]] = {}


def plants(kind: str) -> Callable[[Callable[[History], object]], Callable[[History], object]]:
    """Say which kind of violation a function plants."""

    def remember(plant: Callable[[History], object]) -> Callable[[History], object]:
        PLANTED[kind] = plant
        return plant

    return remember


@plants("unanswered")
def _(history: History) -> None:
    remove(history, where(history, "verdicts:cam2", "OK"))


@plants("not_ended")
def _(history: History) -> None:
    history.ended.pop()


@plants("answered_twice")
def _(history: History) -> None:
    entry = where(history, "verdicts:cam2", "OK")
    at = history.final.index(entry)
    twin = msgspec.structs.replace(entry, id=entry.id.replace("-0", "-00"))
    history.final.insert(at, twin)
    history.live.insert(at, twin)


@plants("never_sent")
def _(history: History) -> None:
    entry = where(history, "verdicts:cam2", "OK")
    add(history, entry, fields={**entry.fields, "session": "77", "verdict": "UNKNOWN", "reason": "shutdown"})


@plants("ok_too_late")
def _(history: History) -> None:
    entry = where(history, "verdicts:cam1", "OK")
    replace(history, entry, t_verdict_ns=entry.fields["deadline_ns"], latency_us=str(int(DEADLINE_MS * 1000)))


@plants("judged_without_frame")
def _(history: History) -> None:
    history.sent.remove(sent_of(history, where(history, "verdicts:cam1", "OK")))


@plants("wrong_frame")
def _(history: History) -> None:
    first, second = where(history, "verdicts:cam1", "OK"), where(history, "verdicts:cam2", "OK")
    replace(history, first, score=second.fields["score"])


@plants("wrong_verdict")
def _(history: History) -> None:
    sent = sent_of(history, where(history, "verdicts:cam1", "OK"))
    history.sent[history.sent.index(sent)] = msgspec.structs.replace(sent, expect="NG")


@plants("answered_before_sent")
def _(history: History) -> None:
    sent = sent_of(history, where(history, "verdicts:cam1", "OK"))
    history.sent[history.sent.index(sent)] = msgspec.structs.replace(sent, t=sent.t + 3600 * SECOND)


@plants("out_of_order")
def _(history: History) -> None:
    at = [n for n, entry in enumerate(history.final) if entry.stream == "verdicts:cam1"]
    history.final[at[0]], history.final[at[1]] = history.final[at[1]], history.final[at[0]]


@plants("reject_missing")
def _(history: History) -> None:
    remove(history, where(history, "rejects", "NG"))


@plants("reject_twice")
def _(history: History) -> None:
    add(history, where(history, "rejects", "NG"), id="99999-0")


@plants("reject_differs")
def _(history: History) -> None:
    replace(history, where(history, "rejects", "NG"), verdict="UNKNOWN", reason="deadline")


@plants("reject_of_ok")
def _(history: History) -> None:
    entry = where(history, "verdicts:cam1", "OK")
    add(history, entry, stream="rejects", id="99999-0", fields={**entry.fields, "verdict": "NG"})


@plants("reject_after_record")
def _(history: History) -> None:
    entry = where(history, "rejects", "NG")
    history.live[history.live.index(entry)] = msgspec.structs.replace(entry, read=entry.read + 1)


@plants("reject_without_record")
def _(history: History) -> None:
    entry = where(history, "rejects", "NG")
    add(history, entry, id="99999-0", fields={**entry.fields, "session": "1", "seq": "0"})


@plants("late_replaces")
def _(history: History) -> None:
    entry = where(history, "verdicts:cam1", "OK")
    add(history, entry, stream="late", id="99999-0", fields={**entry.fields, "late": "1"})


@plants("late_without_record")
def _(history: History) -> None:
    entry = where(history, "late")
    add(history, entry, id="99999-0", fields={**entry.fields, "seq": "999"})


@plants("entry_vanished")
def _(history: History) -> None:
    history.final.remove(where(history, "verdicts:cam1", "OK"))


@plants("entry_changed")
def _(history: History) -> None:
    entry = where(history, "verdicts:cam1", "OK")
    at = history.live.index(entry)
    history.live[at] = msgspec.structs.replace(entry, fields={**entry.fields, "verdict": "NG"})


@plants("told_twice")
def _(history: History) -> None:
    history.told.append(history.told[0])


@plants("told_differs")
def _(history: History) -> None:
    first = history.told[0]
    history.told[0] = msgspec.structs.replace(first, fields={**first.fields, "verdict": "OK"})


@plants("latest_differs")
def _(history: History) -> None:
    history.latest[0] = msgspec.structs.replace(history.latest[0], fields=where(history, "verdicts:cam1").fields)


def test_the_base_is_sound() -> None:
    """What violations are planted into has none."""
    assert check(told(BASE)).violations == []


def test_every_kind_is_planted() -> None:
    """No kind of violation goes without its test."""
    assert set(PLANTED) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_violation_is_found(kind: str) -> None:
    """A broken promise of each kind, planted into a sound history, is found and named."""
    history = told(BASE)
    PLANTED[kind](history)
    assert kind in kinds(history)


@given(FATES, st.data())
def test_a_lost_record_is_found_wherever_it_was(fates: list[tuple[str, str]], data: st.DataObject) -> None:
    """Whichever record of a sound history is taken away, it is missed."""
    history = told([step for step in fates if step[1] not in {"begin", "end", "die"}] + [("cam1", "good")])
    records = [entry for entry in history.final if entry.stream.startswith("verdicts:")]
    remove(history, data.draw(st.sampled_from(records)))
    assert kinds(history) & {"unanswered", "reject_without_record"}


class TestWhereTheLineDied:
    """What the contracts allow where the line died in between, and only there."""

    @staticmethod
    def reject_without_record(*, died: bool) -> History:
        """A reject of a session that another one has followed, without its record."""
        story = Story("cam1")
        story.good("cam1")
        story.bad("cam1")
        if died:
            story.die()
        story.begin("cam1")
        story.good("cam1")
        history = story.close()
        remove(history, where(history, "verdicts:cam1", "NG"))
        return history

    def test_a_reject_may_lack_its_record(self) -> None:
        """A part that was rejected before the line died, of a session that is over, has no record."""
        assert kinds(self.reject_without_record(died=True)) == set()
        assert kinds(self.reject_without_record(died=False)) == {"reject_without_record"}

    @staticmethod
    def two_rejects(*fates: str, status: str = "-9") -> History:
        """A part that is rejected twice, between which the line ended, before its record was written."""
        story = Story("cam1")
        for fate in (*fates, "bad"):
            getattr(story, fate)("cam1")
        history = story.close()
        reject = where(history, "rejects")
        history.events.append(Event("exited", reject.t + MS // 2, status))
        add(history, reject, id="99999-0", t=reject.t + MS)
        return history

    def test_a_part_may_be_rejected_twice(self) -> None:
        """By the line that died and by the next one, where the part was the first sign of its session."""
        assert kinds(self.two_rejects()) == set()
        assert kinds(self.two_rejects(status="0")) == {"reject_twice"}
        assert kinds(self.two_rejects("good")) == {"reject_twice"}

    def test_a_death_at_another_time_excuses_nothing(self) -> None:
        """Neither one before the part was sent nor one after both rejects."""
        for shift in (-1, 1):
            history = self.two_rejects()
            history.events[0] = msgspec.structs.replace(
                history.events[0], t=history.events[0].t + shift * 3600 * SECOND
            )
            assert kinds(history) == {"reject_twice"}

    def test_an_orderly_end_is_no_death(self) -> None:
        """After exit status 0 nothing is forgiven."""
        history = self.reject_without_record(died=False)
        history.events.append(Event("exited", where(history, "rejects", "NG").t + 1, "0"))
        assert kinds(history) == {"reject_without_record"}


class TestDeclaredLoss:
    """What the line says itself that it could keep nowhere."""

    @staticmethod
    def without_a_record(*losses: Lost) -> History:
        """A history that lacks one record."""
        history = told(BASE)
        remove(history, where(history, "verdicts:cam2", "OK"))
        history.lost.extend(losses)
        return history

    def test_is_excused_and_counted(self) -> None:
        """A record that was declared lost is no violation, but it is told."""
        result = check(self.without_a_record(Lost(1, SECOND)))
        assert (result.violations, result.excused) == ([], 1)

    def test_no_more_than_was_declared(self) -> None:
        """Two missing records are not covered by one that was declared lost."""
        history = self.without_a_record(Lost(1, SECOND))
        remove(history, where(history, "verdicts:cam1", "OK"))
        assert kinds(history) == {"unanswered"}

    def test_not_of_another_time(self) -> None:
        """A loss ten minutes later covers nothing."""
        assert kinds(self.without_a_record(Lost(1, 600 * SECOND))) == {"unanswered"}


def test_an_open_end_is_no_violation_while_the_soak_runs() -> None:
    """In the midst of a soak the last session need not have ended; holes are found all the same."""
    story = Story("cam1")
    for fate in ("good", "bad", "good"):
        getattr(story, fate)("cam1")
    history = story.history
    history.complete = False
    assert kinds(history) == set()
    remove(history, where(history, "verdicts:cam1", "OK"))
    assert kinds(history) == {"unanswered"}


def test_a_confirmed_end_counts_lost_parts_at_the_end() -> None:
    """The last parts of a confirmed session are missed too, though no record follows them."""
    history = told([("cam1", "good"), ("cam1", "lost")])
    remove(history, where(history, "verdicts:cam1", reason="missing_frame"))
    remove(history, where(history, "rejects", reason="missing_frame"))
    assert "unanswered" in kinds(history)


def test_a_wrong_number_of_parts_is_found() -> None:
    """A confirmation of more or fewer parts than the sender had is a violation."""
    history = told(BASE)
    last = history.ended[-1]
    history.ended[-1] = Ended(last.camera, last.session, last.parts - 1, last.t)
    assert "not_ended" in kinds(history)


def test_strangers_owe_nothing_but_unknown() -> None:
    """A camera that is not in the config may lack records, but what it has is never OK."""
    history = told(BASE)
    fields = where(history, "verdicts:cam1", "OK").fields | {"camera": "stranger", "session": "5", "seq": "3"}
    sent = Sent("stranger", 5, 3, MS, fields["part"], "", float(fields["score"]), "UNKNOWN")
    history.sent.append(sent)
    unknown = {**fields, "verdict": "UNKNOWN", "reason": "unknown_camera", "score": ""}
    add(history, where(history, "rejects"), id="99998-0", fields=unknown)
    add(history, where(history, "verdicts:cam1"), stream="verdicts:stranger", id="5-3", fields=unknown)
    assert kinds(history) == set()
    entry = where(history, "verdicts:stranger")
    replace(history, entry, verdict="OK", reason="below_threshold", score=fields["score"])
    assert {"wrong_verdict", "ok_too_late", "reject_of_ok"} <= kinds(history)
