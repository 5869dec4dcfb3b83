"""The judge of a soak: a recorded history in, everything in it that breaks a promise out. Pure; it asks no one.

It takes nothing from the line but the records that a PLC reads. Each promise is a function that yields what breaks it;
``RULES`` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from pipeline.soak.frames import SCORE_TOLERANCE
from pipeline.soak.history import Entry, History, Sent
from pipeline.soak.view import Identity, View, id_of, identity

SECOND: Final = 1_000_000_000
LOSS_WINDOW_S: Final = 60
"""A missing record is covered by a declared loss only if its part was sent at most so long before."""

KINDS: Final = {
    "unanswered": "a part has no record, though a later one or the end of its session has",
    "not_ended": "a camera's last session is not confirmed, or with another number of parts than it had",
    "answered_twice": "a part has two records",
    "never_sent": "a record is of a part that no sender has named",
    "ok_too_late": "an OK was given at or after its deadline, or the deadline is later than the config allows",
    "judged_without_frame": "a part whose frame never came is OK or NG",
    "wrong_frame": "an OK or NG does not belong to the very frame that was sent: another digest or score",
    "wrong_verdict": "a frame got another verdict than its pixels deserve, or one that must not be judged got one",
    "answered_before_sent": "a reader saw a judged part before it was sent",
    "out_of_order": "a camera's stream is not in the order of its sessions and numbers",
    "reject_missing": "a record that is not OK has no reject",
    "reject_twice": "a part is rejected twice",
    "reject_differs": "a reject says other than its record",
    "reject_of_ok": "a part is rejected, and its record is OK",
    "reject_after_record": "a reader saw a record before its reject",
    "reject_without_record": "a reject has no record, and the line did not die in between",
    "late_replaces": "a late result is in a verdict stream, or stands beside an OK",
    "late_without_record": "a late result is of a part without a record",
    "entry_vanished": "a reader read an entry that is not in Redis at the end",
    "entry_changed": "an entry says other than what a reader read",
    "told_twice": "the channel told a reject twice",
    "told_differs": "the channel told a reject that is not in the stream",
    "latest_differs": "a camera's latest hash is not its last record",
}
"""Every kind of violation, and what it means."""


class Violation(NamedTuple):
    """Something that breaks a promise.

    Attributes:
        kind: Of :data:`KINDS`.
        part: Camera, session, seq.
        detail: What was found.
    """

    kind: str
    part: Identity
    detail: str


class Result(NamedTuple):
    """What the checker says.

    Attributes:
        violations: What breaks a promise.
        excused: Parts whose record or reject is missing, as the line has itself declared by ``records_lost``.
    """

    violations: list[Violation]
    excused: int


Rule = Callable[[View], Iterator[Violation]]


def check(history: History) -> Result:
    """Hold a history against every promise."""
    view = View(history)
    found = [violation for rule in RULES for violation in rule(view)]
    missing = [one for one in found if one.kind in {"unanswered", "reject_missing", "reject_without_record"}]
    excused = _declared(view, missing)
    return Result([one for one in found if one not in excused], len(excused))


def _declared(view: View, missing: list[Violation]) -> set[Violation]:
    """What is missing because the line could keep it nowhere, and said so: as many entries as it said, no more."""
    budget = sum(lost.count for lost in view.history.lost)
    covered = {one for one in missing if _in_loss(view, one.part)}
    return covered if len(covered) <= budget else set()


def _in_loss(view: View, part: Identity) -> bool:
    times = [sent.t for sent in view.attempts.get(part, ())]
    return any(
        not times or lost.t - LOSS_WINDOW_S * SECOND <= min(times) <= lost.t + SECOND for lost in view.history.lost
    )


def complete(view: View) -> Iterator[Violation]:
    """Every part is answered: no hole before a record, nor before a confirmed end."""
    for camera in view.history.deadlines:
        seen = dict(view.sessions(camera))
        for session in sorted({*seen, *(number for name, number in view.ended if name == camera)}):
            yield from _holes(view, camera, session, seen.get(session, []))


def _holes(view: View, camera: str, session: int, records: list[Entry]) -> Iterator[Violation]:
    expected = 0
    for entry in records:
        seq = int(entry.fields["seq"])
        if entry.fields["reason"] != "sequence_jump":  # that one answers all before it
            yield from _unanswered(camera, session, expected, seq)
        expected = max(expected, seq + 1)
    yield from _unanswered(camera, session, expected, view.ended.get((camera, session), expected))


def _unanswered(camera: str, session: int, start: int, end: int) -> Iterator[Violation]:
    for seq in range(start, end):
        yield Violation("unanswered", (camera, session, seq), "no record")


def ended(view: View) -> Iterator[Violation]:
    """The last session of each camera is confirmed, and no session with a wrong number of parts."""
    said = {(end.camera, end.session): end.parts for end in view.history.ends}
    for (camera, session), parts in view.ended.items():
        if said.get((camera, session)) != parts:
            yield Violation("not_ended", (camera, session, parts), f"confirmed with {parts} parts, not {said}")
    for camera in view.history.deadlines if view.history.complete else ():
        last = view.last_session(camera)
        if last is not None and (camera, last) not in view.ended:
            yield Violation("not_ended", (camera, last, view.parts[camera, last]), "the end is not confirmed")


def once(view: View) -> Iterator[Violation]:
    """No part has two records, and none is of a part that nobody sent."""
    for part, entries in view.by_part.items():
        if len(entries) > 1:
            yield Violation("answered_twice", part, ", ".join(f"{e.id} {e.fields['verdict']}" for e in entries))
        camera, session, seq = part
        if seq >= view.parts.get((camera, session), 0):
            yield Violation("never_sent", part, entries[0].fields["reason"])


def in_time(view: View) -> Iterator[Violation]:
    """No OK at or after its deadline, on the line's monotonic clock and by its own times; no longer deadline."""
    for entry in view.judged():
        fields = entry.fields
        allowed = int(fields["deadline_ns"]) - int(fields["t_arrival_ns"])
        limit = view.history.deadlines.get(fields["camera"], 0.0) * 1e6
        late = int(fields["t_verdict_ns"]) >= int(fields["deadline_ns"]) or int(fields["latency_us"]) * 1000 >= allowed
        if fields["verdict"] == "OK" and (late or allowed > limit):
            detail = (
                f"after {fields['latency_us']} us, {allowed / 1000:.0f} us were allowed, at most {limit / 1000:.0f}"
            )
            yield Violation("ok_too_late", identity(fields), detail)


def matched(view: View) -> Iterator[Violation]:
    """Every OK and NG is of the very frame that was sent under this number, and is what that frame deserves."""
    for entry in view.judged():
        part = identity(entry.fields)
        attempts = view.attempts.get(part, [])
        if not attempts:
            yield Violation("judged_without_frame", part, f"{entry.fields['verdict']}, and no frame was sent")
            continue
        same = [sent for sent in attempts if _is_of(entry, sent)]
        if not same:
            wanted = ", ".join(f"{sent.part} {sent.score:.6f}" for sent in attempts)
            yield Violation("wrong_frame", part, f"{entry.fields['part']} {entry.fields['score']}, sent: {wanted}")
        elif all(sent.expect != entry.fields["verdict"] for sent in same):
            yield Violation("wrong_verdict", part, f"{entry.fields['verdict']}, expected {same[0].expect}")
        yield from _answered_after(view, entry, part, attempts)


def _is_of(entry: Entry, sent: Sent) -> bool:
    return entry.fields["part"] == sent.part and abs(float(entry.fields["score"]) - sent.score) <= SCORE_TOLERANCE


def _answered_after(view: View, entry: Entry, part: Identity, attempts: list[Sent]) -> Iterator[Violation]:
    _, seen = view.read.get((entry.stream, entry.id), (0, 0))
    first = min(sent.t for sent in attempts)
    if seen and seen < first:
        yield Violation("answered_before_sent", part, f"{(first - seen) / 1e6:.3f} ms before")


def ordered(view: View) -> Iterator[Violation]:
    """A camera's stream: growing ids, session after session, growing numbers, nothing of another camera."""
    for camera, entries in view.records.items():
        past: set[int] = set()
        session, seq, last = -1, -1, (-1, -1)
        for entry in entries:
            name, number, part = identity(entry.fields)
            if number != session:
                past.add(session)
                session, seq = number, -1
            if name != camera or number in past or part < seq or id_of(entry.id) <= last:
                yield Violation("out_of_order", (name, number, part), f"{entry.id} in {entry.stream}, after {seq}")
            seq, last = max(seq, part), id_of(entry.id)


def rejected(view: View) -> Iterator[Violation]:
    """Every record that is not OK has one reject, which says the same and was there no later."""
    for part, entries in view.by_part.items():
        record = entries[0]
        rejects = view.rejects.get(part, [])
        if record.fields["verdict"] == "OK":
            if rejects:
                yield Violation("reject_of_ok", part, rejects[0].fields["reason"])
        elif not rejects:
            yield Violation("reject_missing", part, record.fields["reason"])
        else:
            yield from _agree(view, part, record, rejects)


def _agree(view: View, part: Identity, record: Entry, rejects: list[Entry]) -> Iterator[Violation]:
    told = [(reject.fields["verdict"], reject.fields["reason"]) for reject in rejects]
    wanted = record.fields["verdict"], record.fields["reason"]
    if wanted not in told:
        yield Violation("reject_differs", part, f"rejected as {told}, recorded as {wanted}")
    seen = view.read.get((record.stream, record.id))
    first = min((view.read[r.stream, r.id] for r in rejects if (r.stream, r.id) in view.read), default=None)
    if seen is not None and (first is None or first[0] > seen[0]):
        yield Violation("reject_after_record", part, f"record in reply {seen[0]}, reject in {first and first[0]}")


def rejected_once(view: View) -> Iterator[Violation]:
    """No part is rejected twice, and no reject is left without its record.

    Both may be where the line died between the two: see "After a restart of the line" in the contracts.
    """
    for part, rejects in view.rejects.items():
        if any(reject.fields["verdict"] == "OK" for reject in rejects):
            yield Violation("reject_of_ok", part, "an OK in the stream of rejects")
        if len(rejects) > 1 and not _may_be_twice(view, part, rejects):
            yield Violation("reject_twice", part, ", ".join(f"{r.id} {r.fields['reason']}" for r in rejects))
        if part not in view.by_part and not _may_lack_record(view, part):
            yield Violation("reject_without_record", part, rejects[0].fields["reason"])


def _may_be_twice(view: View, part: Identity, rejects: list[Entry]) -> bool:
    """Whether the line died between two rejects of a part, and before any record of its session was written."""
    seen = [view.read[reject.stream, reject.id][1] for reject in rejects if (reject.stream, reject.id) in view.read]
    records = view.first_read(part[0], lambda session: session == part[1])
    return len(rejects) == 2 and bool(seen) and view.died_between(view.named(part), min(max(seen), records))


def _may_lack_record(view: View, part: Identity) -> bool:
    """Whether the line died before it wrote the record, and had a new session of the camera when it came back."""
    camera, session, _ = part
    if not view.history.complete and session == view.last_session(camera):
        return True  # its record may yet come
    end = view.first_read(camera, lambda other: other > session)
    return (camera, session) not in view.ended and view.died_between(view.named(part), end)


def late_stays_late(view: View) -> Iterator[Violation]:
    """A late result is beside a record that is not OK, and marked; no record is marked late."""
    for part, entries in view.by_part.items():
        if any(entry.fields["late"] != "0" for entry in entries):
            yield Violation("late_replaces", part, "a late result in a verdict stream")
    for part, results in view.late.items():
        records = view.by_part.get(part, [])
        if any(result.fields["late"] != "1" for result in results) or any(
            record.fields["verdict"] == "OK" for record in records
        ):
            yield Violation("late_replaces", part, f"late {results[0].fields['reason']} beside an OK, or not marked")
        if not records and part[:2] in view.ended:
            yield Violation("late_without_record", part, results[0].fields["reason"])


def kept(view: View) -> Iterator[Violation]:
    """What a reader has read is in Redis at the end, unchanged."""
    final = {(entry.stream, entry.id): entry.fields for entry in view.history.final}
    for entry in view.history.live:
        fields = final.get((entry.stream, entry.id))
        if fields is None:
            yield Violation("entry_vanished", identity(entry.fields), f"{entry.stream} {entry.id}")
        elif fields != entry.fields:
            yield Violation("entry_changed", identity(entry.fields), f"{entry.stream} {entry.id}")


def told(view: View) -> Iterator[Violation]:
    """The channel tells what is in the stream of rejects, each entry once."""
    unheard = {part: [reject.fields for reject in rejects] for part, rejects in view.rejects.items()}
    known = {part: list(rejects) for part, rejects in unheard.items()}
    for message in view.history.told:
        part = identity(message.fields)
        if message.fields in unheard.get(part, []):
            unheard[part].remove(message.fields)
        elif message.fields in known.get(part, []):
            yield Violation("told_twice", part, message.fields["reason"])
        else:
            yield Violation("told_differs", part, message.fields["reason"])


def latest(view: View) -> Iterator[Violation]:
    """When all is at rest, a camera's ``latest`` hash is its last record."""
    if not view.history.complete:
        return
    for item in view.history.latest:
        records = view.records.get(item.camera, [])
        if not records or records[-1].fields != item.fields:
            yield Violation("latest_differs", identity(item.fields), f"last record {records[-1].id if records else ''}")


RULES: Final[tuple[Rule, ...]] = (
    complete, ended, once, in_time, matched, ordered, rejected, rejected_once, late_stays_late, kept, told, latest,
)  # fmt: skip
