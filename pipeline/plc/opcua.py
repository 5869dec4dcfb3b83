"""An OPC UA server. Names follow OPC 40100-1 (machine vision); it is not the companion specification's full model."""

from __future__ import annotations

import asyncio
import hmac
import math
from pathlib import Path
from typing import Any, Final

from asyncua import ua
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.server.server import Server as AsyncuaServer
from asyncua.server.user_managers import UserManager

from pipeline.plc.bridge import Input, Output
from pipeline.plc.results import OTHER_REASON, REASONS, VERDICTS, Result
from pipeline.plc.settings import OpcUa

NOTHING: Final = Result("", 0, 0, "", "")
TYPES: Final = {
    "CurrentState": ua.VariantType.String, "Heartbeat": ua.VariantType.Boolean, "Fault": ua.VariantType.Boolean,
    "GateOpen": ua.VariantType.Boolean, "ResultToggle": ua.VariantType.Boolean, "ResultState": ua.VariantType.Byte,
    "ReasonCode": ua.VariantType.Byte, "ResultId": ua.VariantType.String, "PartId": ua.VariantType.String,
    "RecipeId": ua.VariantType.String, "ConfigurationId": ua.VariantType.String, "Sequence": ua.VariantType.UInt64,
    "Session": ua.VariantType.UInt64, "Score": ua.VariantType.Double, "Threshold": ua.VariantType.Double,
    "LatencyUs": ua.VariantType.UInt32, "IsSimulated": ua.VariantType.Boolean, "Waiting": ua.VariantType.UInt32,
    "Lost": ua.VariantType.UInt32,
}  # fmt: skip
"""Nodes that are served of each camera."""
CONTROLS: Final = {"ResultAck": ua.VariantType.Boolean, "EncoderCount": ua.VariantType.UInt32}
"""Nodes that a PLC writes, of each camera."""


class Server:
    """Serves results as nodes, and takes the PLC's.

    Args:
        settings: ``[plc.opcua]``.
        cameras: Whose results are served.
        password: Of the one user; empty where anybody may connect.
    """

    def __init__(self, settings: OpcUa, cameras: tuple[str, ...], password: str = "") -> None:
        self._settings, self._cameras, self._password = settings, cameras, password
        self._server: AsyncuaServer | None = None
        self._nodes: dict[tuple[str, str], Any] = {}
        self._written: dict[tuple[str, str], Any] = {}

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: if the address cannot be had.
        """
        manager = _OneUser(self._settings.user, self._password) if self._settings.user else None
        self._server = server = AsyncuaServer(user_manager=manager)
        await server.init()
        server.set_endpoint(self._settings.endpoint)
        server.set_server_name("DMDD Line")
        space = await server.register_namespace(self._settings.namespace)
        system = await server.nodes.objects.add_object(space, "VisionSystem")
        for camera in self._cameras:
            await self._add(await system.add_object(_node_id(camera, space), camera), camera, space)
        try:
            await server.start()
        except OSError as error:
            msg = f"OPC UA: cannot listen at {self._settings.endpoint}: {error}; is it in use?"
            raise OSError(msg) from error

    async def exchange(self, outputs: dict[str, Output]) -> dict[str, Input]:
        """Write what has changed, the toggle last; return what the PLC has written."""
        for camera in self._cameras:
            for name, value in values_of(outputs[camera]).items():
                await self._write(camera, name, value)
        return {camera: await self._input(camera) for camera in self._cameras}

    async def stop(self) -> None:
        """Close."""
        if self._server is not None:
            await self._server.stop()
            self._server = None

    async def _add(self, parent: Any, camera: str, space: int) -> None:
        for name, kind in {**TYPES, **CONTROLS}.items():
            node = await parent.add_variable(_node_id(f"{camera}.{name}", space), name, _zero(kind), kind)
            self._nodes[camera, name] = node
            if name in CONTROLS:
                await node.set_writable()

    async def _write(self, camera: str, name: str, value: Any) -> None:
        key = camera, name
        if self._written.get(key, self) != value:
            await self._nodes[key].write_value(value, TYPES[name])
            self._written[key] = value

    async def _input(self, camera: str) -> Input:
        ack, encoder = await asyncio.gather(*(self._nodes[camera, name].read_value() for name in CONTROLS))
        return Input(bool(ack), int(encoder))


def values_of(output: Output) -> dict[str, Any]:
    """The nodes' values; ``ResultToggle`` is last, so that whoever sees it flip finds the result complete."""
    shown = output.shown or NOTHING
    return {
        "CurrentState": "Error" if output.fault else "ContinuousExecution" if output.ready else "Halted",
        "Heartbeat": output.heartbeat,
        "Fault": output.fault,
        "GateOpen": output.gate,
        "ResultState": VERDICTS[shown.verdict],
        "ReasonCode": REASONS.get(shown.reason, OTHER_REASON) if shown.reason else 0,
        "ResultId": f"{shown.camera}:{shown.session}:{shown.seq}" if output.shown else "",
        "PartId": shown.part,
        "RecipeId": shown.recipe,
        "ConfigurationId": shown.engine,
        "Sequence": shown.seq,
        "Session": shown.session,
        "Score": 0.0 if math.isnan(shown.score) else shown.score,
        "Threshold": 0.0 if math.isnan(shown.threshold) else shown.threshold,
        "LatencyUs": min(shown.latency_us, (1 << 32) - 1),
        "IsSimulated": shown.simulated,
        "Waiting": output.waiting,
        "Lost": output.lost & 0xFFFFFFFF,
        "ResultToggle": output.toggle,
    }


def read_password(name: str, credentials: str) -> str:
    """The password in a file, or in a systemd credential of that name.

    Raises:
        OSError: if there is none.
    """
    path = Path(credentials) / name if credentials and "/" not in name else Path(name)
    return path.read_text().strip()


def _zero(kind: ua.VariantType) -> Any:
    if kind == ua.VariantType.String:
        return ""
    return {ua.VariantType.Double: 0.0, ua.VariantType.Boolean: False}.get(kind, 0)


def _node_id(name: str, space: int) -> ua.NodeId:
    return ua.NodeId(ua.String(name), ua.Int16(space))


class _OneUser(UserManager):
    """asyncua's user manager for a single user with a password."""

    def __init__(self, name: str, password: str) -> None:
        self._name, self._password = name, password

    def get_user(
        self, iserver: Any, username: str | None = None, password: str | None = None, certificate: Any = None
    ) -> User | None:
        """The user, or None to refuse."""
        del iserver, certificate
        known = hmac.compare_digest((username or "").encode(), self._name.encode())
        right = hmac.compare_digest((password or "").encode(), self._password.encode())
        return User(role=UserRole.User, name=self._name) if known and right else None
