"""``dmdd keys``: what is written, for whom, and that nothing is replaced by mistake."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline import curve
from pipeline.cli import app

TEMPLATE = Path(__file__).parent.parent / "deploy/redis/users.acl"
USERS = ["line1-line", "line1-plc", "line1-monitor", "line1-admin"]


def keys(*arguments: str) -> Result:
    """Run ``dmdd keys`` in this process."""
    return CliRunner().invoke(app, ["keys", *arguments])


def test_keys_of_a_line_and_its_cameras(tmp_path: Path) -> None:
    """Server and camera keys go where the line looks for them, and the list shows whose they are."""
    assert keys("server", "--folder", str(tmp_path)).exit_code == 0
    assert keys("camera", "cam1", "--folder", str(tmp_path)).exit_code == 0
    assert keys("camera", "dock.2", "--folder", str(tmp_path)).exit_code == 0
    found = curve.load_server(tmp_path)
    assert list(found.cameras) == ["cam1", "dock.2"]
    (tmp_path / "cameras/cam1.key_secret").unlink()
    listed = keys("list", "--folder", str(tmp_path)).stdout.splitlines()
    assert listed == [
        f"{found.pair.public.decode()}  server",
        f"{found.cameras['cam1']}  cam1",
        f"{found.cameras['dock.2']}  dock.2  its secret key is still here: move it",
    ]


def test_no_secret_is_printed(tmp_path: Path) -> None:
    """What is shown on the screen may be read over a shoulder: public keys and file names only."""
    shown = "".join(
        keys(*words, "--folder", str(tmp_path)).output
        for words in (["server"], ["camera", "cam1"], ["list"], ["redis", str(TEMPLATE)])
    )
    secrets = [curve.load_pair(file).secret.decode() for file in tmp_path.rglob("*.key_secret")]
    secrets += [file.read_text().strip() for file in tmp_path.rglob("*.password")]
    assert len(secrets) == 6
    assert not [secret for secret in secrets if secret in shown]


@pytest.mark.parametrize("words", [["server"], ["camera", "cam1"], ["redis", str(TEMPLATE)]])
def test_nothing_is_replaced_without_force(tmp_path: Path, words: list[str]) -> None:
    """The second time it is an error that names --force, and the files are as they were; with it they are new."""

    def files() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    assert keys(*words, "--folder", str(tmp_path)).exit_code == 0
    first = files()
    again = keys(*words, "--folder", str(tmp_path))
    assert isinstance(again.exception, curve.CurveError)
    assert "--force" in str(again.exception)
    assert files() == first
    assert keys(*words, "--folder", str(tmp_path), "--force").exit_code == 0
    new = files()
    assert new.keys() == first.keys()
    assert all(new[file] != first[file] for file in first)


def test_a_name_that_is_no_camera_id_is_refused(tmp_path: Path) -> None:
    """It would be the name of a file, and no frame could carry it."""
    assert keys("camera", "../cam1", "--folder", str(tmp_path)).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_redis_users_get_passwords_of_their_own(tmp_path: Path) -> None:
    """A password file for each user, for its owner only; the ACL file holds their hashes and no placeholder."""
    assert keys("redis", str(TEMPLATE), "--folder", str(tmp_path)).exit_code == 0
    acl = (tmp_path / "redis/users.acl").read_text()
    assert "@" not in acl.replace("-@all", "")
    assert all(line.startswith("user ") for line in acl.splitlines())
    passwords = {user: (tmp_path / f"redis/{user}.password").read_text().strip() for user in USERS}
    assert len(set(passwords.values())) == len(USERS)
    for user, password in passwords.items():
        assert len(password) >= 40
        assert f"user {user} on sanitize-payload #{hashlib.sha256(password.encode()).hexdigest()} " in acl
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "redis").iterdir()}
    assert modes == {0o600}


def test_a_file_that_is_no_template_is_refused(tmp_path: Path) -> None:
    """A missing file, or one that has been filled in: the error says what to give."""
    assert "deploy/redis/users.acl" in str(keys("redis", str(tmp_path / "none"), "--folder", str(tmp_path)).exception)
    (tmp_path / "filled.acl").write_text("user a on #00 -@all\n")
    said = keys("redis", str(tmp_path / "filled.acl"), "--folder", str(tmp_path)).exception
    assert "give the template" in str(said)


@pytest.mark.parametrize("options", [["--key", "x"], ["--server-key", "x"]])
def test_a_camera_needs_both_keys(options: list[str]) -> None:
    """Half of what CURVE needs would be no protection: it is refused."""
    done = CliRunner().invoke(app, ["camera", "sim", *options])
    assert done.exit_code == 2
    assert "go together" in done.output
