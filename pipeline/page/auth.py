"""Who may change something: one password, sessions in memory, a token against forged requests, a brake on guessing."""

from __future__ import annotations

import hmac
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

SESSION_S: Final = 8 * 3600
"""A session ends with the shift."""
MOST_SESSIONS: Final = 100
ATTEMPTS: Final = 5
WINDOW_S: Final = 60.0


def hashed(password: str) -> str:
    """What is kept of a password: argon2id with the library's parameters (RFC 9106)."""
    return PasswordHasher().hash(password)


class Gatekeeper:
    """Lets people in.

    Args:
        password_hash: As :func:`hashed` made it; empty: nobody can log in, the page is read-only.
        clock: Monotonic seconds.
    """

    def __init__(self, password_hash: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._hash, self._clock = password_hash, clock
        self._sessions: dict[str, tuple[str, float]] = {}
        self._attempts: deque[float] = deque(maxlen=ATTEMPTS)

    @property
    def closed(self) -> bool:
        """Whether nobody can log in."""
        return not self._hash

    def wait_s(self) -> float:
        """Seconds until another attempt is heard, for everybody: a shop floor has few people and one page."""
        if len(self._attempts) < ATTEMPTS:
            return 0.0
        return max(0.0, self._attempts[0] + WINDOW_S - self._clock())

    def login(self, password: str) -> str | None:
        """A new session's token, or None for a wrong password. Takes some 50 ms of CPU: call it in a thread."""
        if self.closed or self.wait_s():
            return None
        self._attempts.append(self._clock())
        try:
            PasswordHasher().verify(self._hash, password)
        except (VerificationError, InvalidHashError):
            return None
        self._attempts.clear()
        self._forget_old()
        token = secrets.token_urlsafe(32)
        self._sessions[token] = secrets.token_urlsafe(32), self._clock() + SESSION_S
        return token

    def logout(self, token: str) -> None:
        """End a session."""
        self._sessions.pop(token, None)

    def csrf(self, token: str) -> str | None:
        """The token that a session's requests have to carry in a header; None without a session."""
        csrf, until = self._sessions.get(token, ("", 0.0))
        return csrf if self._clock() < until else None

    def allows(self, token: str, csrf: str) -> bool:
        """Whether a request that changes something comes from a session, and from our own page."""
        expected = self.csrf(token)
        return expected is not None and hmac.compare_digest(expected.encode(), csrf.encode())

    def _forget_old(self) -> None:
        now = self._clock()
        alive = {token: kept for token, kept in self._sessions.items() if kept[1] > now}
        self._sessions = dict(list(alive.items())[-MOST_SESSIONS + 1 :])
