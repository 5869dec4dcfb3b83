"""The documentation against the code, both ways: what is documented exists, what exists is documented."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest
import redis
import typer
import zmq

from pipeline import config, wire
from pipeline.cli import app
from pipeline.entries import Maker
from pipeline.health import Lifecycle, State
from pipeline.parts import Finding, Part, Reason, Verdict
from pipeline.plc.results import REASONS
from pipeline.publisher import Publisher
from pipeline.records import Keys, fields_of
from pipeline.vitals import Vitals
from pipeline.wire import ENCODED, RAW_CHANNELS, Header
from tests.support.line import server

ROOT = Path(__file__).parent.parent
CONTRACTS, OPERATIONS = ROOT / "docs/contracts.md", ROOT / "docs/operations.md"
PLC = ROOT / "docs/plc.md"
UNIT = ROOT / "deploy/dmdd-line.service"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("deploy/*.md")),
]
PACKAGES = ("engines", "pipeline", "train")
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def table(document: Path, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    _, found, rest = document.read_text().partition(f"\n{heading}\n")
    assert found, f"{document.name} has no {heading!r}"
    lines = re.split(r"\n#+ ", rest)[0].splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("|"))
    rows = [line for line in lines[first + 2 :] if line.startswith("|")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def code_words(cell: str) -> list[str]:
    """The words in a cell that are set as code."""
    return re.findall(r"`([^`]+)`", cell)


def names(document: Path, heading: str) -> list[str]:
    """The names in a table's first column."""
    return [name for row in table(document, heading) for name in code_words(row[0])]


def a_part(**header: Any) -> Part:
    """A part whose record nobody has asked for yet."""
    return Part("<camera>", Header(seq=0, session=0, **header), 0, 0, 0, 0, 0)


def sources(*names: str) -> str:
    """The text of these modules of the line."""
    return "\n".join((ROOT / "pipeline" / f"{name}.py").read_text() for name in names)


class TestFrames:
    """``dmdd.frame.v1``."""

    def test_header(self) -> None:
        """Every key of the header is documented, in its order; so is whether a sender has to give it."""
        fields = msgspec.structs.fields(Header)
        rows = table(CONTRACTS, "### Header")
        assert [code_words(row[0]) for row in rows] == [[field.name] for field in fields]
        assert [row[3] == "required" for row in rows] == [field.required for field in fields]

    def test_ranges(self) -> None:
        """Every bound that a value is checked against stands in its row."""
        for field, row in zip(msgspec.structs.fields(Header), table(CONTRACTS, "### Header"), strict=True):
            kind = msgspec.inspect.type_info(field.type)
            bounds = (getattr(kind, name, None) for name in ("ge", "le", "max_length"))
            stated = {float(number) for number in re.findall(r"\d+", row[2])}
            assert {float(bound) for bound in bounds if bound is not None} <= stated, row[0]

    def test_formats(self) -> None:
        """Every pixel format is documented with its bytes a pixel."""
        rows = {code_words(row[0])[0]: row[1] for row in table(CONTRACTS, "### Formats")}
        assert rows == {**{name: str(count) for name, count in RAW_CHANNELS.items()}, **dict.fromkeys(ENCODED, "")}

    def test_limits(self) -> None:
        """The limits that are named exist, and those that are fixed are right."""
        rows = [name for row in table(CONTRACTS, "### Limits") for name in code_words(row[1])]
        assert {f"limits.{name}" for name in config.Limits.model_fields} == set(rows)
        assert f"at most {wire.MAX_HEADER_BYTES} bytes" in CONTRACTS.read_text()
        assert f"{wire.MAX_SIDE} pixels" in CONTRACTS.read_text()


class TestBadInput:
    """What is answered to bad input, and which counter moves."""

    @staticmethod
    def counters() -> set[str]:
        """Every counter of refused, repeated, skipped and late input in the code."""
        refused = {
            f"refused_{name}" for name in re.findall(r'WireError\(\s*"(\w+)"', sources("wire", "intake", "connections"))
        }
        moved = set(re.findall(r'counts\["(\w+)"\] \+= 1', sources("ledger", "open_parts", "intake", "expected")))
        return refused | moved - {"parts", "triggers"}

    def test_every_counter_is_documented(self) -> None:
        """No input is refused silently."""
        assert self.counters() <= {name for row in table(CONTRACTS, "## Bad input") for name in code_words(row[2])}

    def test_every_documented_counter_exists(self) -> None:
        """Beside the counters of their own there are those of the reasons."""
        documented = {name for row in table(CONTRACTS, "## Bad input") for name in code_words(row[2])}
        assert documented <= self.counters() | set(Reason)

    def test_answers(self) -> None:
        """What is answered is a verdict with a reason of the closed set, whose counter moves."""
        for _, answer, counters in table(CONTRACTS, "## Bad input"):
            for reason in re.findall(r"`UNKNOWN \((\w+)\)`", answer):
                assert reason in set(Reason)
                assert reason in code_words(counters)


class TestVerdicts:
    """``dmdd.verdict.v1``."""

    def test_record(self) -> None:
        """Every field of a record is documented, in its order."""
        finding = Finding(Verdict.OK, Reason.BELOW_THRESHOLD)
        assert names(CONTRACTS, "### Record") == list(fields_of(a_part(), finding))

    def test_verdicts(self) -> None:
        """The three verdicts are documented."""
        assert names(CONTRACTS, "### Verdicts") == list(Verdict)

    def test_reasons(self) -> None:
        """The set of reasons is closed: each is documented with its verdict and with what to do."""
        expected = dict.fromkeys(Reason, Verdict.UNKNOWN)
        expected |= {Reason.BELOW_THRESHOLD: Verdict.OK, Reason.ABOVE_THRESHOLD: Verdict.NG}
        rows = table(CONTRACTS, "### Reasons")
        assert [(code_words(row[0])[0], code_words(row[1])[0]) for row in rows] == list(expected.items())
        assert all(len(row) == 4 and row[2] and row[3] for row in rows)

    def test_keys(self) -> None:
        """Every key has its documented name."""
        keys, part = Keys("line"), a_part()
        part.header = MagicMock(session="<session>")
        part.seq = "<seq>"  # type: ignore[assignment]
        plain = {getattr(keys, name) for name in ("rejects", "late", "heartbeat", "labels")}
        of_camera = {getattr(keys, name)("<camera>") for name in ("verdicts", "latest", "eos")}
        labelled = keys.labelled("<camera>:<session>:<seq>")
        documented = names(CONTRACTS, "## Verdicts: `dmdd.verdict.v1`")
        assert set(documented) == plain | of_camera | {keys.heatmap(part), keys.frame(part), labelled}

    def test_heartbeat(self) -> None:
        """Every field of the heartbeat is documented, in its order."""
        organs = MagicMock(stations={}, observer=MagicMock(causes={}))
        organs.ledger.counts = organs.publisher.counts = Counter()
        organs.refused.return_value = {}
        life = Lifecycle()
        life.enter(State.READY)
        vitals = Vitals(config.Config(cameras={"cam1": config.Camera()}), life, organs, lambda _: None)
        publisher: Any = SimpleNamespace(
            _client=MagicMock(),
            _keys=Keys("line"),
            _settings=config.Redis(),
            counts=Counter(),
            _health=vitals.heartbeat,
        )
        Publisher._send_heartbeat(publisher)
        pipe = publisher._client.pipeline.return_value.__enter__.return_value
        assert names(CONTRACTS, "### Heartbeat") == list(pipe.hset.call_args.kwargs["mapping"])

    def test_end_of_stream(self) -> None:
        """Every field of a confirmed end of stream is documented."""
        maker = Maker(Keys("line"), config.Redis(), {})
        (entry,) = maker.record(a_part(eos=True))
        assert names(CONTRACTS, "### End of stream key") == list(entry.fields)


class TestExamples:
    """The programs in the contracts do what they say."""

    @pytest.fixture
    def programs(self) -> list[str]:
        """The Python programs, the sender first."""
        return [text for language, text in FENCE.findall(CONTRACTS.read_text()) if language == "python"]

    def test_sender(self, programs: list[str], tmp_path: Path) -> None:
        """The sender's frames are frames, numbered from 0, and followed by the end of its stream."""
        (tmp_path / "sender.py").write_text(programs[0].replace("tcp://127.0.0.1:5555", f"ipc://{tmp_path}/frames"))
        files = [tmp_path / "a.png", tmp_path / "b.png"]
        for file in files:
            file.write_bytes(b"pixels of " + file.name.encode())
        with zmq.Context() as context, context.socket(zmq.PULL) as socket:
            socket.rcvtimeo = 20_000
            socket.bind(f"ipc://{tmp_path}/frames")
            subprocess.run([sys.executable, tmp_path / "sender.py", *files], check=True, timeout=30)
            messages = [socket.recv_multipart() for _ in range(3)]
        headers = [wire.decode_header(header) for _, header, _ in messages]
        assert {wire.decode_camera(camera) for camera, _, _ in messages} == {"cam1"}
        assert [(header.seq, header.fmt, header.eos) for header in headers] == [
            (0, "png", False),
            (1, "png", False),
            (2, "mono8", True),
        ]
        assert messages[1][2] == b"pixels of b.png"
        assert len({header.session for header in headers}) == 1

    def test_subscriber(self, programs: list[str], tmp_path: Path) -> None:
        """The subscriber says that the line is dead, and prints a reject."""
        with server(tmp_path / "redis") as valkey:
            where = f'redis.Redis(host="{valkey.host}", port={valkey.port}, '
            (tmp_path / "subscriber.py").write_text(programs[1].replace("redis.Redis(", where))
            command = [sys.executable, "-u", str(tmp_path / "subscriber.py")]
            with (
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
                redis.Redis(valkey.host, valkey.port) as client,
            ):
                assert process.stdout is not None
                first = process.stdout.readline()
                fields = fields_of(a_part(part="P-1"), Finding(Verdict.NG, Reason.ABOVE_THRESHOLD))
                client.xadd(Keys("line1").rejects, dict(fields))
                said = next(line for line in process.stdout if line.startswith("REJECT"))
                process.terminate()
        assert first == "heartbeat stale: reject every part\n"
        assert said == "REJECT <camera> P-1 NG above_threshold\n"


class TestOperations:
    """What an operator reads."""

    def test_log_events(self) -> None:
        """Every event that the code logs is documented, and no other."""
        logged = {event for package in PACKAGES for path in (ROOT / package).rglob("*.py") for event in events(path)}
        assert set(names(OPERATIONS, "## Log events")) == logged

    def test_numbers_of_the_reasons(self) -> None:
        """A PLC's programmer finds the number of every reason, and of no other."""
        listed = {code_words(name)[0]: int(number) for number, name in table(PLC, "## Numbers of the reasons")[:-1]}
        assert listed == REASONS

    def test_unit_keeps_what_the_line_needs(self) -> None:
        """The unit waits for READY=1, has a watchdog, restarts for ever, and lets OpenVINO generate code."""
        settings = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if re.match(r"\w+=", line))
        expected = {"Type": "notify", "Restart": "always", "StartLimitIntervalSec": "0", "MemoryDenyWriteExecute": "no"}
        assert {name: settings[name] for name in expected} == expected
        assert int(settings["WatchdogSec"]) > 1


def events(path: Path) -> Iterator[str]:
    """The first argument of every call on a module's ``log``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
            continue
        function = node.func.body if isinstance(node.func, ast.IfExp) else node.func
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "log" and function.attr in LEVELS:
            yield str(node.args[0].value)


COMMAND: Any = typer.main.get_command(app)


def documented_commands() -> Iterator[tuple[str, list[str]]]:
    """Every ``dmdd`` command line in a shell block or in the unit, with where it stands."""
    for document in DOCUMENTS:
        for language, text in FENCE.findall(document.read_text()):
            for line in text.splitlines() if language == "sh" else ():
                yield document.name, shlex.split(line, comments=True)
    for line in UNIT.read_text().splitlines():
        if line.startswith("Exec"):
            yield UNIT.name, shlex.split(line.partition("=")[2])


class TestCommands:
    """What a user types."""

    def test_every_command_is_in_the_readme(self) -> None:
        """The overview has all commands and no other."""
        assert {name.removeprefix("dmdd ") for name in names(ROOT / "README.md", "## Commands")} == set(
            COMMAND.commands
        )

    def test_commands_that_are_documented_work(self) -> None:
        """Every command, subcommand and option exists."""
        found = 0
        for where, words in documented_commands():
            at = next((at for at, word in enumerate(words) if word.endswith("/bin/dmdd")), 0)
            if not words or Path(words[at]).name != "dmdd":
                continue
            found += 1
            command, rest = COMMAND, words[at + 1 :]
            while hasattr(command, "commands"):
                assert rest[0] in command.commands, f"{where}: {' '.join(words)}"
                command, rest = command.commands[rest[0]], rest[1:]
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            assert {word for word in rest if word.startswith("-")} <= known, f"{where}: {' '.join(words)}"
        assert found > 15


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    text = FENCE.sub("", document.read_text())
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestReferences:
    """What documents point to."""

    @pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
    def test_links(self, document: Path) -> None:
        """Every link to a file or heading of the project leads somewhere."""
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text())):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            path = (document.parent / file).resolve() if file else document
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target

    @pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
    def test_modules_that_are_named_exist(self, document: Path) -> None:
        """No document speaks of a module that is not there."""
        for name in re.findall(rf"`((?:{'|'.join(PACKAGES)})/\w+(?:\.py)?)`", document.read_text()):
            assert (ROOT / name).exists(), name

    def test_every_module_has_its_room(self) -> None:
        """The table of rooms leaves no module out."""
        files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
        modules = {str(file.relative_to(ROOT)) for file in files if file.stem != "__init__"}
        assert modules == set(names(ROOT / "docs/architecture.md", "## The rooms"))
