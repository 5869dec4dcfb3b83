"""Modbus TCP in both roles, over real sockets."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pymodbus.client import AsyncModbusTcpClient
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from pipeline.plc.bridge import Input, Output
from pipeline.plc.modbus import Client, Server
from pipeline.plc.registers import STATUS_BITS, decode, encode
from pipeline.plc.results import Result
from pipeline.plc.settings import Modbus, Registers
from tests.support.ports import free_port

CAMERAS = ("cam1", "cam2")
OK = Result("cam1", 1_700_000_000_000_000_000, 70_000, "OK", "below_threshold", "P-1", score=0.25, threshold=0.5)
GOOD = Output(heartbeat=True, ready=True, fault=False, gate=True, toggle=True, waiting=2, lost=3, shown=OK)
BAD = Output(heartbeat=False, ready=False, fault=True, gate=False, toggle=False, waiting=0, lost=0, shown=None)
LAYOUT = Registers()


def bits(status: int) -> set[str]:
    """Names of the status bits that are set."""
    return {name for position, name in enumerate(STATUS_BITS) if status >> position & 1}


def real(high: int, low: int) -> float:
    """A float of two registers."""
    return float(struct.unpack(">f", struct.pack(">HH", high, low))[0])


class TestRegisters:
    def test_an_ok(self) -> None:
        """Every value lies where the layout says."""
        block = encode(GOOD, LAYOUT)
        assert bits(block[0]) == {"heartbeat", "ready", "toggle", "pass", "gate_open"}
        assert (block[1], block[2], block[3] << 16 | block[4], block[5] << 16 | block[6]) == (
            1,
            1,
            70_000,
            1_700_000_000,
        )
        assert (real(*block[7:9]), real(*block[9:11]), block[12], block[13]) == (0.25, 0.5, 2, 3)
        assert struct.pack(">16H", *block[14:30]).rstrip(b"\0") == b"P-1"

    def test_nothing_is_a_reject(self) -> None:
        """Without a result the reject bit is set and the verdict is none of OK, NG and UNKNOWN."""
        block = encode(BAD, LAYOUT)
        assert bits(block[0]) == {"reject", "fault", "gate_shut"}
        assert block[1] == 0
        assert math.isnan(real(*block[7:9]))

    def test_a_layout_of_ones_own(self) -> None:
        """Values can be moved and left out, words turned round."""
        layout = Registers(status=5, verdict=-1, seq=0, word_order="little", part=-1, session=-1, score=6, threshold=-1)
        block = encode(GOOD, layout)
        assert block[0] | block[1] << 16 == 70_000
        assert real(block[7], block[6]) == 0.25
        assert decode([1, 0x0001, 0x0002, 0], layout) == Input(ack=True, encoder=0x20001)

    def test_overlaps_are_refused(self) -> None:
        """Two values in one register are a mistake of the config, and it says which two."""
        with pytest.raises(ValueError, match="seq and session both take register 4"):
            Registers(session=4)


def run(body: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, with a limit."""
    asyncio.run(asyncio.wait_for(body, 20))


@asynccontextmanager
async def plc_of(port: int) -> AsyncIterator[AsyncModbusTcpClient]:
    """A PLC that polls."""
    plc = AsyncModbusTcpClient("127.0.0.1", port=port, timeout=2, retries=0)
    assert await plc.connect()
    try:
        yield plc
    finally:
        plc.close()


class TestServer:
    def test_a_plc_reads_results_and_writes_its_answer(self) -> None:
        """The PLC polls the second camera's block, and its acknowledge and encoder come back."""

        async def body() -> None:
            port = free_port()
            server = Server(Modbus(address=f"127.0.0.1:{port}"), CAMERAS)
            await server.start()
            async with plc_of(port) as plc:
                await server.exchange({"cam1": BAD, "cam2": GOOD})
                reply = await plc.read_holding_registers(LAYOUT.size, count=LAYOUT.size, device_id=1)
                assert reply.registers == encode(GOOD, LAYOUT)
                await plc.write_registers(1004, [1, 2, 3], device_id=1)
                assert await server.exchange({"cam1": BAD, "cam2": GOOD}) == {
                    "cam1": Input(ack=False, encoder=0),
                    "cam2": Input(ack=True, encoder=2 << 16 | 3),
                }
            await server.stop()

        run(body())

    def test_results_cannot_be_written(self) -> None:
        """No peer can write an OK into the results, nor outside of its own registers."""

        async def body() -> None:
            port = free_port()
            server = Server(Modbus(address=f"127.0.0.1:{port}"), CAMERAS)
            await server.start()
            async with plc_of(port) as plc:
                for address in (0, LAYOUT.size, 2 * LAYOUT.size, 999, 1008):
                    assert (await plc.write_register(address, 1, device_id=1)).isError()
                first = await plc.read_holding_registers(0, count=2, device_id=1)
                assert bits(first.registers[0]) == {"reject", "fault", "gate_shut"}
            await server.stop()

        run(body())

    def test_a_port_in_use_is_said(self) -> None:
        """The error names the address and what to look at; after a stop the port is free."""

        async def body() -> None:
            address = f"127.0.0.1:{free_port()}"
            first, second = (Server(Modbus(address=address), CAMERAS) for _ in range(2))
            await first.start()
            with pytest.raises(OSError, match=f"{address}.*in use"):
                await second.start()
            await first.stop()
            await second.stop()
            await second.start()
            await second.stop()

        run(body())


@asynccontextmanager
async def plc_with_registers(port: int) -> AsyncIterator[list[int]]:
    """A PLC that is written to; yields its registers 0 to 1999."""
    device = SimDevice(1, simdata=[SimData(0, values=[0] * 2000, datatype=DataType.REGISTERS)])
    server = ModbusTcpServer(device, address=("127.0.0.1", port))
    await server.serve_forever(background=True)
    registers = server.context.devices[1].block["x"][2]  # type: ignore[union-attr]
    try:
        yield registers
    finally:
        await server.shutdown()  # type: ignore[no-untyped-call]


class TestClient:
    def test_it_writes_results_and_reads_the_answer(self) -> None:
        """The PLC's memory holds what is shown; what it has written is read back."""

        async def body() -> None:
            port = free_port()
            client = Client(Modbus(role="client", address=f"127.0.0.1:{port}"), CAMERAS)
            await client.start()
            async with plc_with_registers(port) as registers:
                registers[1000] = 1
                inputs = await client.exchange({"cam1": GOOD, "cam2": BAD})
                assert registers[: LAYOUT.size] == encode(GOOD, LAYOUT)
                assert inputs["cam1"] == Input(ack=True, encoder=0)
                await client.stop()
                assert bits(registers[0]) == {"reject", "fault", "gate_shut"}  # what is left behind

        run(body())

    def test_a_plc_that_is_away_comes_back(self) -> None:
        """While the PLC is away every exchange says so; once it is there, the next one works."""

        async def body() -> None:
            port = free_port()
            client = Client(Modbus(role="client", address=f"127.0.0.1:{port}"), CAMERAS)
            await client.start()
            for _ in range(2):
                with pytest.raises(OSError, match=str(port)):
                    await client.exchange({"cam1": GOOD, "cam2": BAD})
            async with plc_with_registers(port):
                assert set(await client.exchange({"cam1": GOOD, "cam2": BAD})) == set(CAMERAS)
            with pytest.raises(OSError, match=str(port)):
                await client.exchange({"cam1": GOOD, "cam2": BAD})
            await client.stop()

        run(body())
