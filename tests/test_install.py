"""``dmdd install``: what lies where afterwards, and that nothing of the user's is lost. Below a root of its own."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import stat
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline import config, install
from pipeline.cli import app
from pipeline.install_box import Box, InstallError

ROOT = Path(__file__).parent.parent
UNITS = ["dmdd-camera@.service", "dmdd-line.service", "dmdd-monitor.service", "dmdd-plc@.service"]
LINE_UNIT = "etc/systemd/system/dmdd-line.service"
CONFIG = "etc/dmdd/config.toml"


def dmdd(command: str, root: Path, *options: str) -> Result:
    """Run the command below a root."""
    result = CliRunner().invoke(app, [command, "--root", str(root), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def put(root: Path, *options: str) -> Result:
    """Install what this checkout has, for an environment in /opt."""
    return dmdd("install", root, "--program", "/opt/dmdd-line", *options)


def snapshot(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Mode, owners and bytes of everything below a root; of a link or folder where it leads, or nothing."""
    found = {}
    for path in sorted(root.rglob("*")):
        there = path.lstat()
        data = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (there.st_mode, there.st_uid, there.st_gid, data)
    return found


def next_version(folder: Path) -> Path:
    """A checkout of a later version: other units and config, one unit more and one less."""
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    shutil.copy(ROOT / "config.toml", folder)
    for name in ("deploy/dmdd-line.service", "config.toml"):
        with (folder / name).open("a") as file:
            file.write("# next\n")
    (folder / "deploy/dmdd-plc@.service").rename(folder / "deploy/dmdd-new.service")
    return folder


class TestInstall:
    """A box that had nothing."""

    def test_everything_is_in_its_place(self, tmp_path: Path) -> None:
        """Units, user, folders, limits of the log and a config lie where systemd and the units look for them."""
        put(tmp_path)
        assert sorted(path.name for path in (tmp_path / "etc/systemd/system").iterdir()) == UNITS
        for name in ("sysusers.d", "tmpfiles.d", "systemd/journald.conf.d"):
            assert (tmp_path / "etc" / name / "dmdd.conf").is_file()
        assert (tmp_path / "etc/dmdd/cameras/cam1.env").is_file()
        modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (CONFIG, LINE_UNIT)}
        assert modes == {CONFIG: 0o640, LINE_UNIT: 0o644}
        for name in ("etc/dmdd", "etc/dmdd/cameras", "var/lib/dmdd", "var/cache/dmdd"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o750, name
        assert stat.S_IMODE((tmp_path / "var/lib/dmdd-install").stat().st_mode) == 0o700

    def test_the_config_is_one_that_the_line_takes(self, tmp_path: Path) -> None:
        """It is the project's, but what is written lies where the service may write."""
        put(tmp_path)
        loaded = config.load(tmp_path / CONFIG)
        assert (str(loaded.engine.store), str(loaded.spool.path)) == ("/var/lib/dmdd/store", "/var/lib/dmdd/spool")
        ours = config.load(ROOT / "config.toml")
        same = {"store": ours.engine.store}, {"path": ours.spool.path}
        back = loaded.model_copy(
            update={
                "engine": loaded.engine.model_copy(update=same[0]),
                "spool": loaded.spool.model_copy(update=same[1]),
                "curve": ours.curve,
            }
        )
        assert back == ours

    @pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("systemd-sysusers") is None, reason="needs root and systemd-sysusers"
    )
    def test_owners(self, tmp_path: Path) -> None:
        """The line's user is made below the root, owns the data, and can read the config but not write it."""
        put(tmp_path)
        users = (tmp_path / "etc/passwd").read_text(), (tmp_path / "etc/group").read_text()
        user, group = (int(re.findall(r"(?m)^dmdd:[^:]*:(\d+):", text)[0]) for text in users)
        owners = {name: (tmp_path / name).stat() for name in ("var/lib/dmdd", CONFIG, LINE_UNIT)}
        assert {name: (there.st_uid, there.st_gid) for name, there in owners.items()} == {
            "var/lib/dmdd": (user, group),
            CONFIG: (0, group),
            LINE_UNIT: (0, 0),
        }
        assert "/usr/sbin/nologin" in users[0]

    def test_a_second_time_changes_nothing(self, tmp_path: Path) -> None:
        """Neither a byte nor a mode nor an owner, and it says so."""
        put(tmp_path)
        before = snapshot(tmp_path)
        result = put(tmp_path)
        assert result.output.splitlines()[-1] == "nothing to change"
        assert snapshot(tmp_path) == before

    def test_a_dry_run_says_all_and_does_nothing(self, tmp_path: Path) -> None:
        """Every file and folder is said before it is made."""
        said = put(tmp_path, "--dry-run").output
        assert snapshot(tmp_path) == {}
        put(tmp_path)
        made = {f"/{name}" for name in snapshot(tmp_path) if name.startswith(("etc/", "var/"))}
        files = {name for name in made if "dmdd" in name and "install" not in name and name != "/etc/dmdd/cameras"}
        assert all(f" {name}" in said for name in files), said
        assert len(files) > 10

    def test_units_start_the_program_that_installs(self, tmp_path: Path) -> None:
        """Whichever environment it is; what they point to is there, too."""
        dmdd("install", tmp_path, "--program", "/opt/dmdd-2")
        for path in (tmp_path / "etc/systemd/system").iterdir():
            assert "/opt/dmdd-line" not in path.read_text()
            assert re.search(r"(?m)^ExecStart=/opt/dmdd-2/bin/dmdd ", path.read_text())

    def test_modes_are_mended(self, tmp_path: Path) -> None:
        """A config that everybody can read, with a password in it perhaps, is closed again."""
        put(tmp_path)
        (tmp_path / CONFIG).chmod(0o644)
        (tmp_path / "var/lib/dmdd").chmod(0o777)
        assert "2 step(s) done" in put(tmp_path).output
        assert stat.S_IMODE((tmp_path / CONFIG).stat().st_mode) == 0o640
        assert stat.S_IMODE((tmp_path / "var/lib/dmdd").stat().st_mode) == 0o750


class TestRefused:
    """What cannot be installed is refused before anything is done."""

    @pytest.mark.parametrize(
        "program",
        ["/home/ann/venv", "/root/venv", "/var/tmp/v", "opt/dmdd", "/opt/a b", "/opt/%i"],  # noqa: S108
    )
    def test_a_program_that_services_cannot_see(self, program: str, tmp_path: Path) -> None:
        """ProtectHome and PrivateTmp hide it, or systemd would read it otherwise; the message says where to put it."""
        with pytest.raises(InstallError, match=r"/opt/dmdd-line"):
            dmdd("install", tmp_path, "--program", program)
        assert snapshot(tmp_path) == {}

    def test_an_incomplete_checkout(self, tmp_path: Path) -> None:
        """The file that is missing is named."""
        origin = next_version(tmp_path / "next")
        (origin / "deploy/sysusers.d/dmdd.conf").unlink()
        with pytest.raises(InstallError, match=r"sysusers\.d/dmdd\.conf.*--from"):
            put(tmp_path / "box", "--from", str(origin))

    def test_a_config_without_its_folders(self) -> None:
        """A config whose writable folders cannot be set is not installed: the service could not write."""
        with pytest.raises(InstallError, match="store"):
            install.adapted('[engine]\nstore = "elsewhere"\n')

    def test_a_box_without_being_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The remedy is in the message; a dry run is allowed."""
        monkeypatch.setattr("os.geteuid", lambda: 1000)
        with pytest.raises(InstallError, match="sudo"):
            Box(Path("/"), dry_run=False, say=print)
        Box(Path("/"), dry_run=True, say=print)


class TestUpgrade:
    """Another version over the one that is there."""

    def test_files_that_nobody_changed_are_replaced(self, tmp_path: Path) -> None:
        """Config and units; a unit that is no longer part of it goes, a new one comes."""
        put(tmp_path)
        put(tmp_path, "--from", str(next_version(tmp_path / "next")))
        for name in (LINE_UNIT, CONFIG):
            assert (tmp_path / name).read_text().endswith("# next\n")
        assert not (tmp_path / "etc/systemd/system/dmdd-plc@.service").exists()
        assert (tmp_path / "etc/systemd/system/dmdd-new.service").exists()
        assert not list((tmp_path / "etc").rglob("*.new"))

    @pytest.mark.parametrize("name", [CONFIG, LINE_UNIT])
    def test_a_changed_file_is_kept(self, name: str, tmp_path: Path) -> None:
        """The new one lies beside it, with the same mode; the next run has nothing to do."""
        put(tmp_path)
        (tmp_path / name).write_text("mine\n")
        result = put(tmp_path, "--from", str(next_version(tmp_path / "next")))
        assert f"kept /{name}: changed by you; compare it with /{name}.new" in result.output
        assert (tmp_path / name).read_text() == "mine\n"
        beside = tmp_path / f"{name}.new"
        assert beside.read_text().endswith("# next\n")
        assert stat.S_IMODE(beside.stat().st_mode) == stat.S_IMODE((tmp_path / name).stat().st_mode)
        before = snapshot(tmp_path)
        assert "nothing to change" in put(tmp_path, "--from", str(tmp_path / "next")).output
        assert snapshot(tmp_path) == before

    def test_a_changed_file_has_no_twin_without_news(self, tmp_path: Path) -> None:
        """The same version again brings nothing to compare with."""
        put(tmp_path)
        (tmp_path / CONFIG).write_text("mine\n")
        assert "nothing to change" in put(tmp_path).output
        assert not (tmp_path / f"{CONFIG}.new").exists()

    def test_files_of_an_installation_by_hand_are_kept(self, tmp_path: Path) -> None:
        """What was there before the first run is the user's."""
        (tmp_path / CONFIG).parent.mkdir(parents=True)
        (tmp_path / CONFIG).write_text("by hand\n")
        put(tmp_path)
        assert (tmp_path / CONFIG).read_text() == "by hand\n"
        assert (tmp_path / f"{CONFIG}.new").is_file()

    def test_taking_the_new_one_over_ends_the_question(self, tmp_path: Path) -> None:
        """Once the file is the new one, its twin is removed."""
        put(tmp_path)
        (tmp_path / CONFIG).write_text("mine\n")
        origin = next_version(tmp_path / "next")
        put(tmp_path, "--from", str(origin))
        shutil.copy(tmp_path / f"{CONFIG}.new", tmp_path / CONFIG)
        put(tmp_path, "--from", str(origin))
        assert not (tmp_path / f"{CONFIG}.new").exists()


class TestRollback:
    """Back to the version before."""

    def test_the_version_before_is_back(self, tmp_path: Path) -> None:
        """Byte for byte, with what it had and without what it had not; twice is forward again."""
        put(tmp_path)
        first = snapshot(tmp_path / "etc")
        origin = next_version(tmp_path / "next")
        dmdd("install", tmp_path, "--program", "/opt/dmdd-2", "--from", str(origin))
        second = snapshot(tmp_path / "etc")
        assert first != second
        dmdd("install", tmp_path, "--rollback")
        assert snapshot(tmp_path / "etc") == first
        dmdd("install", tmp_path, "--rollback")
        assert snapshot(tmp_path / "etc") == second

    def test_a_changed_file_stays(self, tmp_path: Path) -> None:
        """A way back for the program is none for the user's own settings."""
        put(tmp_path)
        put(tmp_path, "--from", str(next_version(tmp_path / "next")))
        (tmp_path / CONFIG).write_text("mine\n")
        dmdd("install", tmp_path, "--rollback")
        assert (tmp_path / CONFIG).read_text() == "mine\n"

    def test_without_a_version_before(self, tmp_path: Path) -> None:
        """It says so and changes nothing."""
        put(tmp_path)
        before = snapshot(tmp_path)
        with pytest.raises(InstallError, match="no version before"):
            dmdd("install", tmp_path, "--rollback")
        assert snapshot(tmp_path) == before


class TestUninstall:
    """Off again."""

    @staticmethod
    def used(root: Path) -> None:
        """A box that has worked: enabled units, an engine, a spool, a key."""
        put(root)
        wants = root / "etc/systemd/system/multi-user.target.wants"
        wants.mkdir()
        for link, unit in (
            ("dmdd-line.service", "dmdd-line.service"),
            ("dmdd-camera@cam1.service", "dmdd-camera@.service"),
            ("ssh.service", "ssh.service"),
            ("dmdd-other.service", "dmdd-other.service"),
        ):
            (wants / link).symlink_to(f"/etc/systemd/system/{unit}")
        for name in ("var/lib/dmdd/store/washer/1/manifest.json", "var/lib/dmdd/spool/000.spool", "etc/dmdd/keys/k"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("kept")

    def test_config_and_data_stay(self, tmp_path: Path) -> None:
        """Units, links and the rest go; all of /etc/dmdd and /var/lib/dmdd is as it was. Others' links stay."""
        self.used(tmp_path)
        before = snapshot(tmp_path)
        dmdd("uninstall", tmp_path)
        after = snapshot(tmp_path)
        kept = ("etc/dmdd/", "var/lib/dmdd/", "var/cache/dmdd")
        assert {name: row for name, row in after.items() if name.startswith(kept)} == {
            name: row for name, row in before.items() if name.startswith(kept)
        }
        left = [name for name in after if "dmdd" in name and not f"{name}/".startswith((*kept, "var/cache/dmdd/"))]
        assert left == ["etc/systemd/system/multi-user.target.wants/dmdd-other.service"]
        assert (tmp_path / "etc/systemd/system/multi-user.target.wants/ssh.service").is_symlink()

    def test_a_changed_unit_stays(self, tmp_path: Path) -> None:
        """It may hold work; it is named."""
        put(tmp_path)
        (tmp_path / LINE_UNIT).write_text("mine\n")
        assert f"kept /{LINE_UNIT}: changed by you" in dmdd("uninstall", tmp_path).output
        assert (tmp_path / LINE_UNIT).read_text() == "mine\n"

    def test_purge_leaves_nothing(self, tmp_path: Path) -> None:
        """Also files that were changed, and data; also after an uninstall without it."""
        for first in ((), ("uninstall",)):
            self.used(tmp_path)
            (tmp_path / CONFIG).write_text("mine\n")
            for command in first:
                dmdd(command, tmp_path)
            dmdd("uninstall", tmp_path, "--purge")
            assert [name for name in snapshot(tmp_path) if "dmdd" in name] == [
                "etc/systemd/system/multi-user.target.wants/dmdd-other.service"
            ]
            shutil.rmtree(tmp_path / "etc/systemd")

    def test_purge_does_not_follow_a_link(self, tmp_path: Path) -> None:
        """Data on another disk is not deleted through a link; the message says what to do."""
        put(tmp_path)
        disk = tmp_path / "disk"
        shutil.move(tmp_path / "var/lib/dmdd", disk)
        (disk / "spool").write_text("kept")
        (tmp_path / "var/lib/dmdd").symlink_to(disk)
        with pytest.raises(InstallError, match="by hand"):
            dmdd("uninstall", tmp_path, "--purge")
        assert (disk / "spool").read_text() == "kept"

    def test_dry_run(self, tmp_path: Path) -> None:
        """It says what would go, and nothing goes."""
        self.used(tmp_path)
        before = snapshot(tmp_path)
        said = dmdd("uninstall", tmp_path, "--purge", "--dry-run").output
        assert snapshot(tmp_path) == before
        for path in (f"/{LINE_UNIT}", "/var/lib/dmdd/", "multi-user.target.wants/dmdd-camera@cam1.service"):
            assert f"{path}\n" in said

    def test_twice(self, tmp_path: Path) -> None:
        """The second time there is nothing to do, and it says so."""
        put(tmp_path)
        dmdd("uninstall", tmp_path)
        assert dmdd("uninstall", tmp_path).output == "nothing is installed\nnothing to change\n"


class TestLive:
    """A box with a running systemd, whose tools are recorded in place of being run."""

    @pytest.fixture
    def commands(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The commands that would have been run."""
        run: list[str] = []
        monkeypatch.setattr(Box, "_run", staticmethod(lambda *command: run.append(" ".join(command))))
        return run

    @staticmethod
    def box(root: Path) -> Box:
        """A root that counts as the machine itself."""
        box = Box(root, dry_run=False, say=print)
        box._live = True
        return box

    def test_systemd_reads_what_is_new(self, commands: list[str], tmp_path: Path) -> None:
        """Once a run that changed something, at its end; never when there was nothing to change."""
        files = install.wanted(ROOT, "/opt/dmdd-line")
        install.install(self.box(tmp_path), files)
        reload = ["systemctl daemon-reload", "systemctl restart systemd-journald"]
        assert commands[-2:] == reload
        if os.geteuid() == 0:  # the recorder made no user: the next run would ask again
            (tmp_path / "etc/passwd").write_text("dmdd:x:999:999::/:/bin/false\n")
        commands.clear()
        install.install(self.box(tmp_path), files)
        assert commands == []

    def test_services_stop_before_their_units_go(self, commands: list[str], tmp_path: Path) -> None:
        """All instances of templates, too; nothing that runs loses its unit."""
        install.install(self.box(tmp_path), install.wanted(ROOT, "/opt/dmdd-line"))
        commands.clear()
        install.uninstall(self.box(tmp_path), purge=False)
        names = "dmdd-camera@*.service dmdd-line.service dmdd-monitor.service dmdd-plc@*.service"
        assert commands[0] == f"systemctl stop {names}"

    def test_a_tool_that_fails_is_an_error(self, tmp_path: Path) -> None:
        """Its words are in the message."""
        with pytest.raises(InstallError, match="no such command"):
            Box._run("sh", "-c", "echo no such command >&2; exit 3")


class TestSources:
    """Where the files come from."""

    def test_a_checkout_is_found(self) -> None:
        """In a checkout its own files are taken."""
        assert install.source() == ROOT

    def test_the_wheel_carries_them(self, tmp_path: Path) -> None:
        """What it installs into share/dmdd is what is needed, and the documents that units point to."""
        with (ROOT / "pyproject.toml").open("rb") as file:
            carried = tomllib.load(file)["tool"]["setuptools"]["data-files"]
        for place, patterns in carried.items():
            for pattern in patterns:
                for path in ROOT.glob(pattern):
                    target = tmp_path / place / path.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target)
        share = tmp_path / "share/dmdd"
        assert install.wanted(share, "/opt/dmdd-line") == install.wanted(ROOT, "/opt/dmdd-line")
        for unit in (share / "deploy").glob("*.service"):
            documents = re.findall(r"(?m)^Documentation=file:/opt/dmdd-line/(\S+)$", unit.read_text())
            assert documents, unit.name
            assert all((tmp_path / document).is_file() for document in documents), unit.name

    def test_an_environment_without_them(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Where they are missing, the message says what to give."""
        monkeypatch.setattr(install, "__file__", str(tmp_path / "lib/pipeline/install.py"))
        monkeypatch.setattr("sys.prefix", str(tmp_path))
        with pytest.raises(InstallError, match="--from"):
            install.source()


def test_users_that_are_here_are_left_alone() -> None:
    """Owners below a root are looked up there: a test or an image is not given to a user of this machine."""
    names = {entry.pw_name for entry in pwd.getpwall()} | {entry.gr_name for entry in grp.getgrall()}
    box = Box(Path("/nonexistent"), dry_run=True, say=print)
    assert all(box._id("passwd", name) is None for name in names - {"root"})
