"""OPC UA over a real socket, with asyncua's own client as the PLC."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from asyncua.client.client import Client

from pipeline.plc.bridge import Input
from pipeline.plc.opcua import Server, read_password
from pipeline.plc.settings import OpcUa
from tests.support.ports import free_port
from tests.test_plc_modbus import BAD, GOOD

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(body: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, with a limit."""
    asyncio.run(asyncio.wait_for(body, 60))


def endpoint() -> str:
    """An address that is free."""
    return f"opc.tcp://127.0.0.1:{free_port()}/dmdd"


async def read(client: Client, camera: str, name: str) -> Any:
    """A node's value."""
    space = await client.get_namespace_index("urn:dmdd:line")
    return await client.get_node(f"ns={space};s={camera}.{name}").read_value()


class TestServer:
    def test_a_plc_reads_results_and_writes_its_answer(self) -> None:
        """The nodes of a camera say what is shown; the PLC's acknowledge and encoder come back."""

        async def body() -> None:
            address = endpoint()
            server = Server(OpcUa(endpoint=address), ("cam1", "cam2"))
            await server.start()
            await server.exchange({"cam1": GOOD, "cam2": BAD})
            async with Client(address) as client:
                found = {
                    name: await read(client, "cam1", name) for name in ("ResultState", "PartId", "GateOpen", "Score")
                }
                assert found == {"ResultState": 1, "PartId": "P-1", "GateOpen": True, "Score": 0.25}
                assert await read(client, "cam2", "CurrentState") == "Error"
                assert await read(client, "cam2", "ResultState") == 0
                space = await client.get_namespace_index("urn:dmdd:line")
                await client.get_node(f"ns={space};s=cam1.ResultAck").write_value(True)
                assert (await server.exchange({"cam1": GOOD, "cam2": BAD}))["cam1"] == Input(ack=True, encoder=0)
                with pytest.raises(Exception, match=r"BadNotWritable|BadUserAccessDenied|AccessDenied|not writable"):
                    await client.get_node(f"ns={space};s=cam1.ResultState").write_value(1)
            await server.stop()

        run(body())

    def test_only_the_named_user_may_connect(self) -> None:
        """With a user in the settings, nobody else gets in."""

        async def body() -> None:
            address = endpoint()
            server = Server(OpcUa(endpoint=address, user="plc"), ("cam1",), "secret")
            await server.start()
            for user, password in ((None, None), ("plc", "wrong"), ("other", "secret")):
                client = Client(address)
                if user:
                    client.set_user(user)
                    client.set_password(password or "")
                with pytest.raises(Exception, match=r"BadUserAccessDenied|BadIdentityToken|[Aa]ccess|[Rr]ejected"):
                    await client.connect()
            right = Client(address)
            right.set_user("plc")
            right.set_password("secret")
            async with right:
                assert await read(right, "cam1", "ResultState") == 0
            await server.stop()

        run(body())


def test_a_password_comes_from_a_file_or_a_credential(tmp_path: Path) -> None:
    """A bare name is looked up where systemd puts credentials, a path is a path."""
    (tmp_path / "plc-password").write_text("secret\n")
    assert read_password("plc-password", str(tmp_path)) == "secret"
    assert read_password(str(tmp_path / "plc-password"), "") == "secret"
    with pytest.raises(OSError, match="plc-password"):
        read_password("plc-password", str(tmp_path / "nowhere"))
