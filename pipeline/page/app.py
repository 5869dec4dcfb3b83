"""The page's server: one document, a stream of events, images off Redis, and labels from whoever is logged in."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, Final

import msgspec
import redis
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from pipeline.page.auth import Gatekeeper
from pipeline.page.follower import Follower
from pipeline.records import Fields

COOKIE: Final = "dmdd_session"
TICK_S: Final = 0.2
STATE_EVERY: Final = 5
"""Ticks between two states."""
MOST_LISTED: Final = 200
MOST_BODY: Final = 4096
KINDS: Final = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png"}
SAFE: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_encode = msgspec.json.Encoder().encode

Handler = Callable[[Request], Awaitable[Response]]


class Page:
    """Handlers of all requests.

    Args:
        line: Name of the line.
        follower: Knows the line.
        gatekeeper: Knows people.
        secure: Whether cookies are for https alone.
    """

    def __init__(self, line: str, follower: Follower, gatekeeper: Gatekeeper, *, secure: bool) -> None:
        self._line, self._follower, self._gate, self._secure = line, follower, gatekeeper, secure
        self._document = files("pipeline.page").joinpath("page.html").read_text()
        self.stopping = asyncio.Event()

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", self.document),
            Route("/events", self.events),
            Route("/api/state", self.state),
            Route("/api/parts", self.parts),
            Route("/api/scores/{camera}", self.scores),
            Route("/api/part/{camera}/{session:int}/{seq:int}", self.part),
            Route("/image/{kind}/{camera}/{session:int}/{seq:int}", self.image),
            Route("/api/me", self.me),
            Route("/api/login", self.login, methods=["POST"]),
            Route("/api/logout", self.logout, methods=["POST"]),
            Route("/api/label", self.label, methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._follower.start()
        try:
            yield
        finally:
            await run_in_threadpool(self._follower.stop)

    # Reading, for anybody.

    async def document(self, _: Request) -> Response:
        """The page itself; only scripts and styles with this answer's nonce run in it."""
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:;"
            " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        text = self._document.replace("{{nonce}}", nonce).replace("{{line}}", self._line)
        return HTMLResponse(text, headers={**SAFE, "Content-Security-Policy": policy})

    async def events(self, _: Request) -> Response:
        """States once a second and parts as they come, as server-sent events."""
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=SAFE)

    async def state(self, _: Request) -> Response:
        """What the page shows at a glance."""
        return _json(self._follower.state())

    async def parts(self, request: Request) -> Response:
        """The newest parts by camera, verdicts (separated by commas) and reason."""
        query = request.query_params
        verdicts = frozenset(filter(None, query.get("verdict", "").split(",")))
        found = self._follower.select(query.get("camera", ""), verdicts, query.get("reason", ""), MOST_LISTED)
        return _json(found)

    async def scores(self, request: Request) -> Response:
        """Scores of a camera's last parts."""
        found = self._follower.scores(request.path_params["camera"])
        return _json(found) if found is not None else _error(404, "no such camera")

    async def part(self, request: Request) -> Response:
        """A part's whole record."""
        record = self._record(request.path_params)
        return _json(record) if record is not None else _error(404, "this part is no longer kept")

    async def image(self, request: Request) -> Response:
        """A part's ``frame`` or ``heatmap``."""
        record, kind = self._record(request.path_params), request.path_params["kind"]
        key = record.get(kind, "") if record is not None and kind in {"frame", "heatmap"} else ""
        if not key:
            return _error(404, "no such image")
        try:
            blob = await run_in_threadpool(self._follower.blob, key)
        except redis.RedisError:
            return _error(503, "Redis does not answer")
        kind_of = KINDS.get(blob[:2]) if blob else None
        if not blob or kind_of is None:
            return _error(404, "the image has lapsed")
        return Response(blob, media_type=kind_of, headers={**SAFE, "Cache-Control": "private, max-age=600"})

    # Changing, for whoever is logged in.

    async def me(self, request: Request) -> Response:
        """Whether this browser is logged in, and its token against forged requests."""
        csrf = self._gate.csrf(request.cookies.get(COOKIE, ""))
        return _json({"in": csrf is not None, "csrf": csrf or "", "closed": self._gate.closed})

    async def login(self, request: Request) -> Response:
        """Begin a session."""
        if self._gate.closed:
            return _error(403, "this page is read-only: give dmdd monitor a password file")
        if wait := self._gate.wait_s():
            return _error(429, f"too many attempts; wait {wait:.0f} s")
        body = await _body(request)
        token = await run_in_threadpool(self._gate.login, str(body.get("password", "")))
        if token is None:
            return _error(401, "wrong password")
        answer = _json({"in": True, "csrf": self._gate.csrf(token), "closed": False})
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=self._secure, path="/")
        return answer

    async def logout(self, request: Request) -> Response:
        """End the session."""
        if not self._allows(request):
            return _error(403, "log in first")
        self._gate.logout(request.cookies.get(COOKIE, ""))
        answer = _json({"in": False})
        answer.delete_cookie(COOKIE, path="/")
        return answer

    async def label(self, request: Request) -> Response:
        """Remember what a person says of a part."""
        if not self._allows(request):
            return _error(403, "log in first")
        body = await _body(request)
        record = self._record({key: body.get(key, "") for key in ("camera", "session", "seq")})
        if record is None:
            return _error(404, "this part is no longer kept")
        try:
            kept = await run_in_threadpool(self._follower.label, record, str(body.get("label", "")))
        except ValueError as error:
            return _error(400, str(error))
        except redis.RedisError as error:
            return _error(503, f"Redis: {error}")
        return _json({"image": kept})

    def _allows(self, request: Request) -> bool:
        return self._gate.allows(request.cookies.get(COOKIE, ""), request.headers.get("x-csrf", ""))

    def _record(self, path: Any) -> Fields | None:
        return self._follower.find((str(path["camera"]), str(path["session"]), str(path["seq"])))

    async def _stream(self) -> AsyncIterator[bytes]:
        serial, tick = self._follower.since(0, 0)[0], 0
        while not self.stopping.is_set():
            if tick % STATE_EVERY == 0:
                yield b"event: state\ndata: " + _encode(self._follower.state()) + b"\n\n"
            serial, parts = self._follower.since(serial)
            if parts:
                yield b"event: parts\ndata: " + _encode(parts) + b"\n\n"
            tick += 1
            await asyncio.sleep(TICK_S)


def _json(value: Any) -> Response:
    return Response(_encode(value), media_type="application/json", headers=SAFE)


def _error(status: int, why: str) -> Response:
    return Response(_encode({"error": why}), status, media_type="application/json", headers=SAFE)


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request; empty for anything else, or too much of it."""
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MOST_BODY:
            return {}
    try:
        found = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}
