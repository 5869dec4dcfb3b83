"""Modbus TCP, as a server that the PLC polls or as a client that writes to the PLC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pymodbus import ModbusException
from pymodbus.client import AsyncModbusTcpClient
from pymodbus.constants import ExcCodes
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from pipeline.plc.bridge import Driver, Input, Output
from pipeline.plc.registers import decode, encode
from pipeline.plc.settings import Modbus

TIMEOUT_S: Final = 0.25
"""For one request to a PLC; a PLC that is slower than this is away."""
MOST_REGISTERS: Final = 120
"""Of one request; the protocol allows 123 to write, 125 to read."""
REJECTS: Final = Output(
    heartbeat=False, ready=False, fault=True, gate=False, toggle=False, waiting=0, lost=0, shown=None
)


def driver(settings: Modbus, cameras: tuple[str, ...]) -> Driver:
    """The driver for the role that the settings name."""
    return (Server if settings.role == "server" else Client)(settings, cameras)


class Server:
    """Serves results in holding registers that can only be read, and takes the PLC's in others.

    Args:
        settings: ``[plc.modbus]``.
        cameras: In the order of their blocks.
    """

    def __init__(self, settings: Modbus, cameras: tuple[str, ...]) -> None:
        self._settings, self._cameras = settings, cameras
        self._results = [0] * (settings.registers.size * len(cameras))
        self._controls = [0] * (settings.controls_size * len(cameras))
        self._server: ModbusTcpServer | None = None
        self._show(dict.fromkeys(cameras, REJECTS))

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: if the address cannot be had.
        """
        host, _, port = self._settings.address.rpartition(":")
        blocks = [
            SimData(self._settings.results, values=self._results, datatype=DataType.REGISTERS, readonly=True),
            SimData(self._settings.controls, values=self._controls, datatype=DataType.REGISTERS),
        ]
        blocks.sort(key=lambda block: block.address)
        device = SimDevice(self._settings.device_id, simdata=blocks, action=self._serve)
        self._server = ModbusTcpServer(device, address=(host, int(port)))
        try:
            await self._server.serve_forever(background=True)
        except RuntimeError as error:
            msg = f"Modbus: cannot listen at {self._settings.address}: {error}; is it in use, or below 1024?"
            raise OSError(msg) from error

    async def exchange(self, outputs: dict[str, Output]) -> dict[str, Input]:
        """Renew what is served; return what the PLC has written."""
        self._show(outputs)
        return _inputs(self._controls, self._settings, self._cameras)

    async def stop(self) -> None:
        """Serve rejects to the last, then close."""
        self._show(dict.fromkeys(self._cameras, REJECTS))
        if self._server is not None:
            await self._server.shutdown()  # type: ignore[no-untyped-call]
            self._server = None

    def _show(self, outputs: dict[str, Output]) -> None:
        self._results[:] = _registers(outputs, self._settings, self._cameras)

    async def _serve(
        self, function: int, start: int, address: int, count: int, registers: list[int], values: Any
    ) -> ExcCodes | None:
        """Called for every request: let it see the newest results, and remember what it writes."""
        del function, count
        at = self._settings.results - start
        registers[at : at + len(self._results)] = self._results
        if values:
            first = address - self._settings.controls
            self._controls[first : first + len(values)] = [int(value) for value in values]
        return None


class Client:
    """Writes results into the PLC's holding registers, and reads what it has for us.

    Args:
        settings: ``[plc.modbus]``.
        cameras: In the order of their blocks.
    """

    def __init__(self, settings: Modbus, cameras: tuple[str, ...]) -> None:
        self._settings, self._cameras = settings, cameras
        host, _, port = settings.address.rpartition(":")
        self._make: Callable[[], AsyncModbusTcpClient] = lambda: AsyncModbusTcpClient(
            host, port=int(port), timeout=TIMEOUT_S, retries=0, reconnect_delay=0
        )
        self._client: AsyncModbusTcpClient | None = None

    async def start(self) -> None:
        """Nothing: a PLC that is away at the start is connected to as soon as it is there."""

    async def exchange(self, outputs: dict[str, Output]) -> dict[str, Input]:
        """Write all results, then read all controls.

        Raises:
            OSError: if the PLC does not answer, or refuses.
        """
        try:
            await self._write(_registers(outputs, self._settings, self._cameras))
            size = self._settings.controls_size * len(self._cameras)
            controls = await self._read(self._settings.controls, size)
        except (ModbusException, TimeoutError) as error:
            self._drop()
            msg = f"Modbus at {self._settings.address}: {error}"
            raise OSError(msg) from error
        except OSError:
            self._drop()
            raise
        return _inputs(controls, self._settings, self._cameras)

    async def stop(self) -> None:
        """Leave rejects behind if the PLC can be reached, then close."""
        try:
            if self._client is not None:
                await self._write(_registers(dict.fromkeys(self._cameras, REJECTS), self._settings, self._cameras))
        except (ModbusException, OSError):
            pass  # the PLC sees the heartbeat stop
        finally:
            self._drop()

    async def _connected(self) -> AsyncModbusTcpClient:
        if self._client is None:
            client = self._make()
            if not await client.connect():
                client.close()
                msg = f"no PLC at {self._settings.address}"
                raise OSError(msg)
            self._client = client
        return self._client

    async def _write(self, values: list[int]) -> None:
        client = await self._connected()
        for at in range(0, len(values), MOST_REGISTERS):
            chunk, first = values[at : at + MOST_REGISTERS], self._settings.results + at
            self._check(await client.write_registers(first, chunk, device_id=self._settings.device_id), first)

    async def _read(self, first: int, size: int) -> list[int]:
        client, found = await self._connected(), []
        for at in range(0, size, MOST_REGISTERS):
            count = min(MOST_REGISTERS, size - at)
            reply = await client.read_holding_registers(first + at, count=count, device_id=self._settings.device_id)
            self._check(reply, first + at)
            found += list(reply.registers)
        return found

    def _check(self, reply: Any, first: int) -> None:
        if reply.isError():
            msg = f"the PLC at {self._settings.address} refuses holding register {first}: {reply}; check [plc.modbus]"
            raise OSError(msg)

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def _registers(outputs: dict[str, Output], settings: Modbus, cameras: tuple[str, ...]) -> list[int]:
    return [word for camera in cameras for word in encode(outputs[camera], settings.registers)]


def _inputs(controls: list[int], settings: Modbus, cameras: tuple[str, ...]) -> dict[str, Input]:
    size = settings.controls_size
    blocks = (controls[index * size : (index + 1) * size] for index in range(len(cameras)))
    return {camera: decode(block, settings.registers) for camera, block in zip(cameras, blocks, strict=True)}
