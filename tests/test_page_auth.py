"""Nobody changes anything without the password, a session, and our own page."""

from __future__ import annotations

import pytest

from pipeline.page.auth import ATTEMPTS, SESSION_S, WINDOW_S, Gatekeeper, hashed

HASH = hashed("open sesame")


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """It stands still."""
    return Clock()


def test_only_the_password_lets_in(clock: Clock) -> None:
    """The right password begins a session, a wrong one does not; the hash does not tell the password."""
    gate = Gatekeeper(HASH, clock)
    assert gate.login("wrong") is None
    token = gate.login("open sesame")
    assert token
    assert gate.csrf(token)
    assert "sesame" not in HASH


def test_without_a_password_the_page_is_closed(clock: Clock) -> None:
    """No password file: nobody can log in, with no password either."""
    gate = Gatekeeper("", clock)
    assert gate.closed
    assert gate.login("") is None


def test_a_forged_request_is_refused(clock: Clock) -> None:
    """A session alone does not do: another site's request has the cookie, and not the token."""
    gate = Gatekeeper(HASH, clock)
    token = gate.login("open sesame") or ""
    assert gate.allows(token, gate.csrf(token) or "")
    assert not gate.allows(token, "")
    assert not gate.allows("", "")
    assert not gate.allows("made up", gate.csrf(token) or "")


def test_sessions_end(clock: Clock) -> None:
    """By log-out, and with the shift."""
    gate = Gatekeeper(HASH, clock)
    token = gate.login("open sesame") or ""
    gate.logout(token)
    assert gate.csrf(token) is None
    token = gate.login("open sesame") or ""
    clock.now += SESSION_S
    assert gate.csrf(token) is None


def test_guessing_is_slowed_down(clock: Clock) -> None:
    """After some wrong passwords not even the right one is heard for a while."""
    gate = Gatekeeper(HASH, clock)
    for _ in range(ATTEMPTS):
        assert gate.login("wrong") is None
    assert gate.wait_s() > 0
    assert gate.login("open sesame") is None
    clock.now += WINDOW_S
    assert gate.login("open sesame")
