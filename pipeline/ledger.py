"""The ledger: which parts there are, by frames, gaps and triggers; each gets exactly one first verdict.

How they are answered is in :mod:`pipeline.open_parts`, how they are numbered in :mod:`pipeline.books`.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from pipeline.books import KEEP_SESSIONS, MAX_WAITING, CameraBook, Trigger
from pipeline.open_parts import OpenParts
from pipeline.parts import UNKNOWN, Part, Reason
from pipeline.wire import Header

MAX_UNKNOWN_CAMERAS: Final = 64

__all__ = ["KEEP_SESSIONS", "MAX_UNKNOWN_CAMERAS", "CameraBook", "Ledger"]


class Ledger(OpenParts):
    """Admits parts. All methods may be called from any thread.

    A part is open from admission, or from when a gap or a trigger names it, to its first verdict.
    """

    def register(self, book: CameraBook) -> None:
        """Make a camera known."""
        if book.sender is not None:
            book.own_session(self._wall())
        self._books[book.name] = book

    def admit(self, camera: str, header: Header) -> Part | None:
        """Open the part that a frame names, and answer the parts before it that never came.

        Returns:
            The open part; or None if it was answered at once, or had been answered before.
        """
        now, wall = self._clock(), self._wall()
        with self._lock:
            book = self._books.get(camera) or self._stranger(camera)
            if book is None:
                return None
            if book.waits:
                return self._admit_waited(book, header, now, wall)
            if header.session != book.session and not self._enter_session(book, header.session):
                return None
            if not self._close_gap(book, header, header.seq, now, wall):
                return None
            part = self._open_part(book, header, header.seq, now, wall)
            if book.deadline_ns and not self._closed:
                return part
            # After close() it was on its way in when the line stopped: no timer would answer it.
            self._answer(part, UNKNOWN[Reason.SHUTDOWN if book.deadline_ns else Reason.UNKNOWN_CAMERA])
            return None

    def end_of_stream(self, camera: str, header: Header) -> None:
        """Answer every part of a finished session that never came; ``header.seq`` follows the last one's."""
        now, wall = self._clock(), self._wall()
        with self._lock:
            book = self._books.get(camera)
            if book is None or not book.deadline_ns:
                return
            if book.waits:
                self._end_waited(book, header, now, wall)
            elif self._enter_session(book, header.session) and self._close_gap(book, header, header.seq, now, wall):
                self._end(book, header, now, wall)

    def expect(self, camera: str, trigger: Trigger) -> None:
        """Open the part that a trigger announces, unless its frame has opened it.

        Args:
            camera: A registered camera whose book says ``expected``.
            trigger: With ``seq`` or ``part``, as the book's matching needs it.
        """
        now, wall = self._clock(), self._wall()
        with self._lock:
            book = self._books[camera]
            if book.sender is not None:
                self._expect_part(book, trigger, now, wall)
            else:
                self._expect_number(book, trigger, now, wall)
            self._give_up(book)

    def _stranger(self, camera: str) -> CameraBook | None:
        """A book for a camera that is not in the config, of which a bounded number is kept."""
        if sum(book.deadline_ns == 0 for book in self._books.values()) >= MAX_UNKNOWN_CAMERAS:
            self.counts["refused_unknown_camera"] += 1
            return None
        self._books[camera] = CameraBook(camera, deadline_ns=0, max_gap=0, first_seq=-1)
        return self._books[camera]

    def _enter_session(self, book: CameraBook, session: int) -> bool:
        if session == book.session:
            return True
        if session in book.old:
            self.counts["refused_old_session"] += 1
            return False
        if book.provisional:
            # Triggers came before the first frame: it goes on with their numbers, under its own session.
            book.session, book.provisional = session, False
            for part in book.waiting.values():
                part.header = replace(part.header, session=session)
            return True
        while book.waiting:
            _, part = book.waiting.popitem(last=False)
            if part.finding is None:
                self._answer_lost(book, part, Reason.MISSING_FRAME)
        book.enter(session)
        return True

    def _close_gap(self, book: CameraBook, header: Header, seq: int, now: int, wall: int) -> bool:
        """Answer the parts before ``seq`` that never came, or let them wait; False if ``seq`` was there before."""
        expected = seq if book.next_seq is None else book.next_seq
        if seq < expected:
            self.counts["refused_repeated"] += 1
            return False
        missing = seq - expected
        if missing > book.max_gap and book.deadline_ns:
            # Too many to be believed and answered one by one: one record says so, and counting starts anew.
            self.counts["sequence_jumps"] += 1
            lost = self._open_lost(book, header, seq - 1, now, wall)
            self._answer(lost, UNKNOWN[Reason.SEQUENCE_JUMP])
        elif book.deadline_ns:
            for number in range(expected, seq):
                lost = self._open_lost(book, header, number, now, wall)
                if book.waits:
                    book.waiting[number] = lost
                else:
                    self._answer(lost, UNKNOWN[Reason.MISSING_FRAME])
        book.next_seq = seq
        return True

    def _open_lost(self, book: CameraBook, header: Header, seq: int, now: int, wall: int) -> Part:
        """Open a part that never came: it has nothing of the frame that named it but the recipe."""
        return self._open_part(book, Header(seq=seq, session=header.session, recipe=header.recipe), seq, now, wall)

    def _end(self, book: CameraBook, header: Header, now: int, wall: int) -> None:
        """Let the end of a stream follow the parts before it."""
        book.order.append(Part(book.name, header, book.stream_ms, header.seq, now, wall, now))
        self._flush(book)

    # Cameras whose parts may be open before their frames come: a reordering window, triggers, a counter that wraps.

    def _admit_waited(self, book: CameraBook, header: Header, now: int, wall: int) -> Part | None:
        if book.sender is not None:
            part = self._match_part(book, book.sender, header, now, wall)
        else:
            part = self._match_number(book, header, now, wall)
        if part is not None and self._closed:
            self._answer(part, UNKNOWN[Reason.SHUTDOWN])
            part = None
        self._give_up(book)
        return part

    def _match_number(self, book: CameraBook, header: Header, now: int, wall: int) -> Part | None:
        """The part of a frame, by its number; a frame that comes at or after its part's deadline is too late."""
        number = self._number_of(book, header.session, header.seq)
        if number is None:
            return None
        part = book.waiting.pop(number, None)
        contradicts = False
        if part is not None and part.finding is None:
            if now >= part.deadline:
                self._answer(part, UNKNOWN[Reason.MISSING_FRAME])
                self.counts["refused_repeated"] += 1
                return None
            contradicts = self._fill(part, header, book.deadline_ns, now)
        elif self._close_gap(book, header, number, now, wall):
            part = self._open_part(book, header, number, now, wall)
        else:
            return None
        book.seen = max(book.seen, number + 1)
        return self._if_expected(book, part, expected=number < book.triggered, contradicts=contradicts)

    def _match_part(self, book: CameraBook, sender: CameraBook, header: Header, now: int, wall: int) -> Part | None:
        """The part of a frame, by its part id; the line numbers it, the sender's numbers only show repeated frames."""
        number = self._number_of(sender, header.session, header.seq)
        if number is None or book.session is None or book.next_seq is None:
            return None
        is_new = sender.next_seq is None or number >= sender.next_seq
        if is_new:
            sender.next_seq = number + 1
        own = replace(header, session=book.session)
        part = book.waiting_for(header.part) if header.part else None
        if part is not None:
            del book.waiting[part.seq]
            if now < part.deadline:
                self._fill(part, own, book.deadline_ns, now)
                return part
            self._answer_lost(book, part, Reason.MISSING_FRAME)
        if not is_new or header.part in book.missed:
            if header.part in book.missed:
                book.missed.remove(header.part)
            self.counts["refused_repeated"] += 1
            return None
        if header.part:
            book.early.append(header.part)
        part = self._open_part(book, own, book.next_seq, now, wall)
        return self._if_expected(book, part, expected=False)

    def _fill(self, part: Part, header: Header, allowed: int, now: int) -> bool:
        """Give a waiting part its frame; say whether trigger and frame name different parts.

        The part stays due when it was. The frame may wish for less, and may leave the part id to the trigger.
        """
        announced = part.header.part
        part.header = header if header.part or not announced else replace(header, part=announced)
        if header.deadline_ms:
            due = now + int(min(allowed, header.deadline_ms * 1e6))
            if due < part.deadline:
                part.deadline = due
                self._schedule(part)
        return bool(announced) and part.header.part != announced

    def _if_expected(self, book: CameraBook, part: Part, *, expected: bool, contradicts: bool = False) -> Part | None:
        if not contradicts and (expected or not book.strict):
            return part
        self._answer(part, UNKNOWN[Reason.UNEXPECTED])
        return None

    def _expect_part(self, book: CameraBook, trigger: Trigger, now: int, wall: int) -> None:
        if book.session is None or book.next_seq is None:
            return
        if trigger.part in book.early:
            book.early.remove(trigger.part)
            self.counts["triggers_behind"] += 1
            return
        header = Header(seq=book.next_seq, session=book.session, part=trigger.part)
        part = self._open_part(book, header, header.seq, now, wall)
        book.waiting[part.seq] = part

    def _expect_number(self, book: CameraBook, trigger: Trigger, now: int, wall: int) -> None:
        session = book.session if trigger.session is None else trigger.session
        if session is None:
            session = wall
            book.enter(session)
            book.provisional = True
        number = self._number_of(book, session, trigger.seq or 0)
        if number is None:
            return
        book.triggered = max(book.triggered, number + 1)
        header = Header(seq=number, session=session, part=trigger.part)
        if book.next_seq is not None and number < book.next_seq:
            part = book.waiting.get(number)
            if part is None or part.header.part or part.finding is not None:
                self.counts["triggers_behind"] += 1
            else:  # a gap has named it first
                part.header = header
            return
        self._close_gap(book, header, number, now, wall)
        book.waiting[number] = self._open_part(book, header, number, now, wall)

    def _end_waited(self, book: CameraBook, header: Header, now: int, wall: int) -> None:
        """The end of a stream: parts that a trigger, or the window, keeps open wait for their frames all the same."""
        counted = book if book.sender is None else book.sender
        number = self._number_of(counted, header.session, header.seq)
        if number is None:
            return
        if number < (book.seen if counted is book else counted.next_seq or 0):
            self.counts["refused_repeated"] += 1
            return
        if counted is not book:
            counted.next_seq = number
            number = book.next_seq or 0
        else:
            if book.next_seq is None or number >= book.next_seq:
                self._close_gap(book, header, number, now, wall)
            book.seen = number + 1  # it overtakes what is missing as a frame would
            self._give_up(book)
            book.seen = number
        self._end(book, replace(header, seq=number, session=book.session), now, wall)

    def _number_of(self, book: CameraBook, session: int, seq: int) -> int | None:
        """Enter a session and number a part in it; None, and counted, where that cannot be."""
        if not self._enter_session(book, session):
            return None
        number = book.number(seq)
        if number is None:
            self.counts["refused_bad_number"] += 1
        return number

    def _give_up(self, book: CameraBook) -> None:
        """Answer the parts whose frames are not waited for any longer, the oldest first."""
        waiting = book.waiting
        while waiting:
            number, part = next(iter(waiting.items()))
            if part.finding is None:
                reason = self._reason_to_give_up(book, number)
                if reason is None:
                    return
                self._answer_lost(book, part, reason)
            del waiting[number]

    def _reason_to_give_up(self, book: CameraBook, number: int) -> Reason | None:
        if self._closed:
            return Reason.SHUTDOWN
        if book.seen > number + 1 + book.window:  # more numbers than may overtake it have come
            return Reason.MISSING_FRAME
        return Reason.OVERLOAD if len(book.waiting) > MAX_WAITING else None
