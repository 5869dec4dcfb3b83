"""``[plc]`` of the config: what the bridge reads, when its gate opens, and where each value lies for the PLC."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Offset = Annotated[int, Field(ge=-1, le=1000)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Registers(_Table):
    """Where each value lies in a camera's block of 16-bit registers; -1 leaves it out.

    Values of two registers follow ``word_order``. ``part`` takes ``part_chars / 2`` registers, two ASCII characters
    each, the first one in the high byte.
    """

    status: Offset = Field(0, description="Status bits; see docs/plc.md.")
    verdict: Offset = Field(1, description="0 none, 1 OK, 2 NG, 3 UNKNOWN.")
    reason: Offset = Field(2, description="Number of the reason; see docs/plc.md.")
    seq: Offset = Field(3, description="Sequence number, lower 32 bits, two registers.")
    session: Offset = Field(5, description="Session in seconds, two registers.")
    score: Offset = Field(7, description="Score, 32-bit float, two registers; NaN where there is none.")
    threshold: Offset = Field(9, description="Threshold, 32-bit float, two registers.")
    latency: Offset = Field(11, description="Milliseconds from arrival to verdict, at most 65535.")
    waiting: Offset = Field(12, description="Results that wait for the PLC's acknowledge.")
    lost: Offset = Field(13, description="Results that the PLC never saw, modulo 65536.")
    part: Offset = Field(14, description="Part id, ASCII.")
    part_chars: int = Field(32, ge=2, le=128, multiple_of=2, description="Longest part id; longer ones are cut.")
    ack: Offset = Field(0, description="Written by the PLC: bit 0 repeats the result toggle, once it is read.")
    encoder: Offset = Field(1, description="Written by the PLC: encoder count, 32 bits, two registers.")
    word_order: Literal["big", "little"] = Field("big", description="Which half of two registers comes first.")

    @property
    def sizes(self) -> dict[str, int]:
        """Registers of each value of the results' block that is not left out."""
        two = dict.fromkeys(("seq", "session", "score", "threshold"), 2)
        one = dict.fromkeys(("status", "verdict", "reason", "latency", "waiting", "lost"), 1)
        return {name: size for name, size in {**one, **two, "part": self.part_chars // 2}.items() if self.at(name) >= 0}

    @property
    def size(self) -> int:
        """Registers of one camera's block."""
        return max((self.at(name) + size for name, size in self.sizes.items()), default=0)

    def at(self, name: str) -> int:
        """Where a value lies in its block, -1 if it is left out."""
        return int(getattr(self, name))

    @model_validator(mode="after")
    def _nothing_overlaps(self) -> Self:
        taken: dict[int, str] = {}
        for name, size in self.sizes.items():
            for register in range(self.at(name), self.at(name) + size):
                if register in taken:
                    msg = f"{taken[register]} and {name} both take register {register} of a camera's block"
                    raise ValueError(msg)
                taken[register] = name
        return self


class Gate(_Table):
    """When a camera's part passes the reject gate. It stays shut, and rejects, unless an OK opens it.

    By time: ``delay_ms`` after the frame's arrival. By encoder: ``counts`` after the count at that moment.
    """

    delay_ms: float = Field(0.0, ge=0, le=600_000, description="From a frame's arrival to the part at the gate.")
    width_ms: float = Field(0.0, ge=0, le=60_000, description="How long an OK opens the gate; less than the pitch.")
    counts: int = Field(0, ge=0, le=1 << 30, description="Encoder counts in the place of delay_ms.")
    width_counts: int = Field(0, ge=0, le=1 << 30, description="Encoder counts in the place of width_ms.")

    @model_validator(mode="after")
    def _by_time_or_by_encoder(self) -> Self:
        if bool(self.width_ms) == bool(self.width_counts):
            msg = "a gate needs either width_ms (with delay_ms) or width_counts (with counts)"
            raise ValueError(msg)
        return self


class Modbus(_Table):
    """Modbus TCP."""

    role: Literal["server", "client"] = Field("server", description="server: the PLC polls; client: we write to it.")
    address: str = Field("127.0.0.1:5020", pattern=r".+:\d+$", description="Ours as a server; the PLC's as a client.")
    device_id: int = Field(1, ge=0, le=247, description="Unit identifier.")
    results: int = Field(0, ge=0, le=60_000, description="First holding register of the first camera's results.")
    controls: int = Field(1000, ge=0, le=60_000, description="First holding register that the PLC writes.")
    controls_size: int = Field(4, ge=3, le=64, description="Registers that the PLC writes for each camera.")
    registers: Registers = Registers()


class OpcUa(_Table):
    """OPC UA server; its names follow OPC 40100 (machine vision)."""

    endpoint: str = Field("opc.tcp://127.0.0.1:4840/dmdd", pattern=r"^opc\.tcp://", description="Our address.")
    namespace: str = Field("urn:dmdd:line", min_length=1, description="Namespace of the nodes.")
    user: str = Field("", description="Who may connect; empty for anybody, which suits loopback alone.")
    password_file: str = Field("", description="File, or systemd credential, of that user's password.")


class Plc(_Table):
    """The PLC bridge."""

    cameras: tuple[str, ...] = Field((), description="Cameras in the order of their blocks; empty: all of the config.")
    tick_ms: float = Field(5.0, ge=1, le=100, description="How often outputs are renewed.")
    stale_ms: float = Field(2000.0, ge=100, le=60_000, description="Age of a heartbeat beyond which the line is dead.")
    window_ms: float = Field(2000.0, ge=1, le=600_000, description="Age beyond which an OK counts as UNKNOWN.")
    handshake: Literal["ack", "toggle"] = Field("ack", description="Whether a result waits for the PLC's answer.")
    hold_ms: float = Field(50.0, ge=0, le=10_000, description="Least time that a result stands; a few PLC cycles.")
    ack_timeout_ms: float = Field(1000.0, ge=1, le=60_000, description="Then the next one comes without an answer.")
    queue: int = Field(256, ge=1, le=10_000, description="Most results that wait; the oldest gives way, as lost.")
    accept_simulated: bool = Field(False, description="Whether an OK of a simulated frame may open the gate.")
    gates: dict[str, Gate] = Field({}, description="Timing of each camera's gate; without one it stays shut.")
    modbus: Modbus = Modbus()
    opcua: OpcUa = OpcUa()

    def of(self, known: tuple[str, ...]) -> Plc:
        """These settings with the cameras of a config filled in."""
        return self.model_copy(update={"cameras": self.cameras or known})
