"""The units in ``deploy/``: valid, hardened, and starting commands that exist."""

from __future__ import annotations

import configparser
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from pipeline.install import TMPFILES, folders
from tests.support.commands import check

DEPLOY = Path(__file__).parent.parent / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze on this machine")
each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
MOST_EXPOSED = 2.0


def test_each_process_has_a_unit() -> None:
    """The line, the page, cameras and the PLC bridges."""
    names = ["dmdd-camera@.service", "dmdd-line.service", "dmdd-monitor.service", "dmdd-plc@.service"]
    assert [unit.name for unit in UNITS] == names


@each_unit
def test_each_command_exists(unit: Path) -> None:
    """Command, subcommand and options, with the values that systemd fills in."""
    values = {"%i": "modbus", "${SOURCE}": "sim", "${ADDRESS}": "tcp://127.0.0.1:5555", "${RATE}": "8", "$OPTIONS": ""}
    lines = re.findall(r"(?m)^#?Exec\w+=/opt/dmdd-line/bin/dmdd (.+)$", unit.read_text())
    assert lines
    for line in lines:
        for name, value in values.items():
            line = line.replace(name, value)  # noqa: PLW2901
        assert "$" not in line
        check(line.split(), unit.name)


@each_unit
def test_no_service_gives_up(unit: Path) -> None:
    """Each is started anew after a failure, by a rule of its own."""
    settings = dict(line.split("=", 1) for line in unit.read_text().splitlines() if re.match(r"\w+=", line))
    assert settings["Restart"] in {"always", "on-failure"}
    assert float(settings["RestartSec"]) >= 1
    assert settings["User"] == "dmdd"


def test_a_camera_has_its_settings() -> None:
    """The example has every setting that the unit reads, no other, and no secret."""
    unit = (DEPLOY / "dmdd-camera@.service").read_text()
    read = set(
        re.findall(r"\$\{?([A-Z]+)\}?", next(line for line in unit.splitlines() if line.startswith("ExecStart=")))
    )
    given = dict(re.findall(r"(?m)^([A-Z]+)=(.*)$", (DEPLOY / "cameras/cam1.env").read_text()))
    assert set(given) == read
    options = re.findall(r"(?m)^#OPTIONS=(.+)$", (DEPLOY / "cameras/cam1.env").read_text())
    for more in (given["OPTIONS"], *options):
        words = ["camera", given["SOURCE"], "--id", "cam1", "--address", given["ADDRESS"], "--rate", given["RATE"]]
        check([*words, *more.split()], "cam1.env")


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="no systemd-tmpfiles on this machine")
def test_systemd_makes_the_folders_that_the_installer_makes(tmp_path: Path) -> None:
    """The same folders with the same modes, out of the same file."""
    shutil.copytree(DEPLOY / "tmpfiles.d", tmp_path / "etc/tmpfiles.d")
    owned = (
        (tmp_path / "etc/tmpfiles.d/dmdd.conf")
        .read_text()
        .replace(" root dmdd ", " - - ")
        .replace(" dmdd dmdd ", " - - ")
    )
    (tmp_path / "etc/tmpfiles.d/dmdd.conf").write_text(owned)
    command = ["systemd-tmpfiles", f"--root={tmp_path}", "--create", "dmdd.conf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr
    expected = folders({TMPFILES: (DEPLOY / "tmpfiles.d/dmdd.conf").read_bytes()})
    assert {path: stat.S_IMODE((tmp_path / path[1:]).stat().st_mode) for path, *_ in expected} == {
        path: mode for path, mode, *_ in expected
    }


def test_the_log_is_limited() -> None:
    """journald.conf(5): keys that it knows, limits for its size and for each service."""
    parser = configparser.ConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "journald.conf.d/dmdd.conf")
    known = {"Storage", "SystemMaxUse", "SystemKeepFree", "MaxRetentionSec", "RateLimitIntervalSec", "RateLimitBurst"}
    assert parser.sections() == ["Journal"]
    assert set(parser["Journal"]) == known


@needs_systemd
@each_unit
def test_exposure(unit: Path) -> None:
    """Each service is rated as little exposed by systemd."""
    command = [str(ANALYZE), "security", "--offline=true", str(unit)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert found, said
    assert float(found[1]) <= MOST_EXPOSED, said


@needs_systemd
@each_unit
def test_systemd_understands_it(unit: Path, tmp_path: Path) -> None:
    """No unknown key, no value that does not parse; the program alone may be missing here."""
    copy = tmp_path / unit.name.replace("@.", "@modbus.")
    copy.write_text(re.sub(r"/opt/dmdd-line/bin/dmdd", "/bin/true", unit.read_text()))
    command = [str(ANALYZE), "verify", "--man=no", str(copy)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert unit.stem.rstrip("@") not in said, said
