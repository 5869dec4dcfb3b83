"""The config file: typed, validated, and wrong values explained by key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from pipeline import config
from pipeline.config import Camera, Config, ConfigError, Socket, parse

LEAST: dict[str, Any] = {"cameras": {"cam1": {}}}


def complaint(**tables: Any) -> str:
    """What is said of a config with these tables, and a camera."""
    with pytest.raises(ConfigError) as caught:
        parse({**LEAST, **tables}, "line.toml")
    return str(caught.value)


def test_one_camera_is_all_that_a_config_needs() -> None:
    """Everything else has a default, and the defaults are the documented ones."""
    got = parse(LEAST)
    assert (got.line.name, got.engine.name, got.engine.target, got.engine.precision) == (
        "line1",
        "demo",
        "openvino",
        "fp32",
    )
    assert (got.sockets, got.cameras) == ((Socket(),), {"cam1": Camera()})


def test_every_key_is_described() -> None:
    """A key without a description cannot be explained to the engineer who edits the file."""

    def keys(section: type[BaseModel]) -> list[tuple[str, str | None]]:
        return [(f"{section.__name__}.{name}", field.description) for name, field in section.model_fields.items()]

    sections = [config.Line, config.Socket, config.Limits, config.EngineSettings, config.Redis, config.Spool]
    for section in [*sections, config.Logging, config.Swap, Camera]:
        assert [name for name, description in keys(section) if not description] == []


def test_settings_cannot_be_changed_while_the_line_runs() -> None:
    """What was validated is what runs."""
    got = parse(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        got.line.name = "other"  # type: ignore[misc]


def test_a_camera_may_have_an_engine_of_its_own() -> None:
    """A camera's engine counts before engine.name."""
    got = parse({"engine": {"name": "caps"}, "cameras": {"a": {}, "b": {"engine": "pins@2"}}})
    assert (got.engine_of("a"), got.engine_of("b")) == ("caps", "pins@2")


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"redis": {"timeout_ms": "soon"}}, ["redis.timeout_ms = 'soon'", "valid integer"]),
        ({"engine": {"lanes": 0}}, ["engine.lanes = 0", "greater than or equal to 1"]),
        ({"engine": {"lanes": 1.5}}, ["engine.lanes = 1.5", "integer"]),
        ({"engine": {"exact_batches": [0]}}, ["engine.exact_batches.0 = 0", "greater than or equal to 1"]),
        ({"engine": {"exact_batches": [1, 9]}}, ["engine", "max_batch = 8", "take out [9]"]),
        ({"engine": {"target": "cuda"}}, ["engine.target = 'cuda'", "'openvino' or 'tensorrt'"]),
        ({"line": {"name": "line one"}}, ["line.name = 'line one'", "pattern"]),
        ({"line": {"drain_timeout_s": float("nan")}}, ["line.drain_timeout_s = nan", "less than or equal to 60"]),
        ({"line": 3}, ["line = 3", "Line"]),
        ({"sockets": []}, ["sockets = []", "at least 1"]),
        ({"sockets": [{"kind": "push"}]}, ["sockets.0.kind = 'push'", "'pull', 'sub' or 'rep'"]),
        ({"cameras": {"cam1": {"deadline_ms": 0}}}, ["cameras.cam1.deadline_ms = 0", "greater than 0"]),
        ({"cameras": {"cam1": {"deadline_ms": 60_001}}}, ["cameras.cam1.deadline_ms = 60001", "60000"]),
        ({"cameras": {"cam1": {"deadline_ms": float("inf")}}}, ["cameras.cam1.deadline_ms = inf", "60000"]),
        ({"cameras": {"cam1": {"rotate": 45}}}, ["cameras.cam1.rotate = 45", "0, 90, 180 or 270"]),
        ({"cameras": {"cam1": {"weight": 0}}}, ["cameras.cam1.weight = 0", "greater than or equal to 0.001"]),
        ({"cameras": {"cam1": {"drop_policy": "drop"}}}, ["cameras.cam1.drop_policy = 'drop'", "'drop_oldest'"]),
        ({"limits": {"queue_age_ms": -1}}, ["limits.queue_age_ms = -1", "greater than or equal to 0"]),
        ({"cameras": {"cam1": {"first_seq": 2}}}, ["cameras.cam1.first_seq = 2", "less than or equal to 1"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tables: dict[str, Any], said: list[str]) -> None:
    """The message has the file, the key, the value and the values that would do."""
    message = complaint(**tables)
    assert message.startswith("line.toml: 1 error(s)\n")
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"camera": {}}, "camera: unknown key; did you mean cameras?"),
        ({"line": {"nmae": "x"}}, "line.nmae: unknown key; did you mean name?"),
        ({"cameras": {"cam1": {"deadline": 5}}}, "cameras.cam1.deadline: unknown key; did you mean deadline_ms?"),
        ({"sockets": [{"adress": "x"}]}, "sockets.0.adress: unknown key; did you mean address?"),
        ({"logging": {"zzz": 1}}, "logging.zzz: unknown key; known here: level, format"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(tables: dict[str, Any], said: str) -> None:
    """A misspelt key is an error and not a default: the likely one is named, or all there are."""
    assert said in complaint(**tables)


@pytest.mark.parametrize("raw", [{}, {"line": {"name": "a"}}])
def test_a_config_without_cameras_says_how_to_name_one(raw: dict[str, Any]) -> None:
    """The one thing that has no default is asked for in words."""
    with pytest.raises(ConfigError, match=r"cameras: missing; at least one \[cameras.NAME\] table is needed"):
        parse(raw)


def test_an_empty_table_of_cameras_is_refused() -> None:
    """[cameras] alone names no camera."""
    assert "cameras" in complaint(cameras={})


@pytest.mark.parametrize("name", ["top left", "", "-a", "a:b", "x" * 65, "caf\u00e9", "cam1\n"])
def test_a_camera_name_that_no_frame_can_carry_is_refused(name: str) -> None:
    """Camera names obey the same rule as camera ids on the wire."""
    message = complaint(cameras={name: {}})
    assert f"cameras.{name} = {name!r}" in message
    assert "pattern" in message


def test_a_reply_socket_is_for_imagezmq_only() -> None:
    """Our own cameras do not wait for replies: the message says what to use instead."""
    message = complaint(sockets=[{"kind": "rep"}])
    assert "sockets.0" in message
    assert "protocol = 'imagezmq' only" in message
    assert parse({**LEAST, "sockets": [{"kind": "rep", "protocol": "imagezmq"}]}).sockets[0].kind == "rep"


@pytest.mark.parametrize(
    ("roi", "said"),
    [
        ([0, 0, 0, 10], "width and height must be at least 1"),
        ([0, 0, 10, 0], "width and height must be at least 1"),
        ([0, 0, 10], "cameras.cam1.roi.3: missing"),
        ([0, 0, 10, 10, 10], "cameras.cam1.roi"),
        ([-1, 0, 10, 10], "cameras.cam1.roi.0 = -1"),
        ([0, 0, 10, 20_000], "cameras.cam1.roi.3 = 20000"),
        ("all", "cameras.cam1.roi = 'all'"),
    ],
)
def test_a_region_that_cannot_be_is_refused(roi: Any, said: str) -> None:
    """x, y, width and height, none negative, none empty."""
    assert said in complaint(cameras={"cam1": {"roi": roi}})


def test_a_region_is_four_numbers() -> None:
    """A list in the file becomes a region."""
    assert Camera(roi=[1, 2, 3, 4]).roi == (1, 2, 3, 4)  # type: ignore[arg-type]


def test_all_errors_are_told_at_once() -> None:
    """One edit mends the file, not one edit a start."""
    message = complaint(line={"nmae": "x"}, engine={"lanes": 0}, cameras={"cam1": {"rotate": 1}})
    assert message.startswith("line.toml: 3 error(s)\n")
    assert message.count("\n  ") == 3


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    """The place of the mistake is told."""
    path = tmp_path / "config.toml"
    path.write_text("[cameras.a]\ndeadline_ms = \n")
    with pytest.raises(ConfigError, match=r"config\.toml: not valid TOML: .*line 2"):
        config.load(path)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are no config."""
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load(path)


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    """Nothing is guessed where there is no config."""
    with pytest.raises(ConfigError, match=r"none\.toml: No such file or directory; give the config file with --config"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path)


def test_relative_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line finds its store and its spool wherever it is started from."""
    folder = tmp_path / "etc"
    folder.mkdir()
    path = folder / "config.toml"
    path.write_text(
        '[engine]\nstore = "engines"\n[spool]\npath = "../spool"\n'
        '[redis]\npassword_file = "redis.secret"\n[cameras.a]\n'
    )
    monkeypatch.chdir(tmp_path)
    for given_path in (path, Path("etc/config.toml")):
        got = config.load(given_path)
        assert got.engine.store == folder / "engines"
        assert got.spool.path.resolve() == tmp_path / "spool"
        assert got.redis.password_file == str(folder / "redis.secret")


def test_absolute_paths_stay(tmp_path: Path) -> None:
    """A store elsewhere is where the file says."""
    path = tmp_path / "config.toml"
    path.write_text('[engine]\nstore = "/var/lib/engines"\n[cameras.a]\n')
    assert config.load(path).engine.store == Path("/var/lib/engines")


tables = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*Config.model_fields, *Camera.model_fields, "kind", "cam1"]) | st.text(max_size=4), inner
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*Config.model_fields]) | st.text(max_size=4), tables))
def test_any_table_is_a_config_or_a_config_error(raw: dict[str, Any]) -> None:
    """Whatever TOML can hold, the outcome is settings or an explanation, never a traceback."""
    try:
        parse(raw)
    except ConfigError as error:
        assert "error(s)\n  " in str(error)  # noqa: PT017 - not raising is right too
