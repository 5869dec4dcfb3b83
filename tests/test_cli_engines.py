"""``dmdd engines``: what an operator types, from a bundle to a signed, validated, active engine and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from engines import bundle, signing
from engines.build import FrameDifference, ParityError
from engines.bundle import MODEL, BundleError, Evidence, Parity
from engines.precision import PrecisionError
from engines.store import Store, StoreError
from pipeline import gate
from pipeline.cli import app
from pipeline.errors import explain
from tests.support.engine import brightness_model, write_bundle
from tests.support.network import write_network

NAME = "bright"
FAST = ("--max-batch", "3")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a bundle."""
    return write_bundle(tmp_path / "bundle").folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The store that the commands are given; it does not exist yet."""
    return Store(tmp_path / "store")


def call(store: Store, *words: str | Path) -> Result:
    """The result of ``dmdd engines WORDS`` on the store."""
    return CliRunner().invoke(app, ["engines", *map(str, words), "--store", str(store.root)])


def said(store: Store, *words: str | Path) -> str:
    """What a command that works says."""
    result = call(store, *words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def line_config(tmp_path: Path, store: Store, engine: str = "", cameras: str = "[cameras.cam1]") -> Path:
    """The config of a line."""
    path = tmp_path / "config.toml"
    path.write_text(f'[engine]\nstore = "{store.root}"\nname = "{NAME}"\n{engine}\n{cameras}\n')
    return path


def broken(folder: Path) -> Path:
    """A bundle whose model does not give the stored scores."""
    good = write_bundle(folder / "good")
    parity = good.parity()
    shifted = Parity(parity.frames, parity.scores + np.float32(0.3), parity.heatmaps)
    return bundle.write(folder / "broken", good.manifest, brightness_model(), shifted).folder


def test_from_a_folder_to_an_active_engine_and_back(store: Store, source: Path) -> None:
    """Added, activated through the gate, rolled back: each step says what it did and what comes next."""
    assert "`dmdd engines activate bright@1`" in said(store, "add", source)
    assert "bright@1 is active" in said(store, "activate", NAME, *FAST)
    said(store, "add", source)
    assert "bright@2 is active" in said(store, "activate", NAME, *FAST)
    assert store.active(NAME) == "2"
    assert said(store, "rollback", NAME) == "bright@1 is active again\n"
    assert store.active(NAME) == "1"


def test_the_list_shows_every_version(store: Store, source: Path, tmp_path: Path) -> None:
    """Method, size, threshold, date, the gates that it passed, its signer, and which one is active."""
    assert "no engines" in said(store, "list")
    for _ in range(2):
        said(store, "add", source)
    said(store, "activate", "bright@1", *FAST)
    signing.keygen(tmp_path / "key")
    signer = store.sign(NAME, "1", tmp_path / "key")
    (store.root / NAME / "2" / MODEL).write_bytes(b"other")
    rows = [
        re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in said(store, "list").splitlines() if "bright@" in line
    ]
    assert rows[0] == [
        "bright@1",
        "none",
        "32x32 mono",
        "0.5",
        "2026-01-01T00:00",
        "openvino-fp32",
        signer,
        "active",
    ]
    assert rows[1][:2] == ["bright@2", "REFUSED"]


def test_verify_says_what_it_verified_and_keeps_the_report(store: Store, source: Path, tmp_path: Path) -> None:
    """Files, signature, threshold, and the gate on every lane, every batch size, every stored frame."""
    store.add(source, NAME)
    output = said(store, "verify", "bright@1", "--lanes", "3", *FAST, "--json", tmp_path / "figures.json")
    assert f"sha256 {bundle.load(source).digest}" in output
    assert "signature: none" in output
    assert "threshold: no scores are stored" in output
    assert "bright@1 reproduces its reference on openvino in fp32" in output
    stored = (store.root / NAME / "1.gate-openvino-fp32.json").read_bytes()
    report = msgspec.json.decode(stored, type=gate.GateReport)
    assert (report.engine, report.passed, report.reason) == ("bright@1", True, "")
    assert report.box["openvino"]
    cases = {(row["lane"], row["batch"], row["frame"]) for row in report.rows}
    assert cases == {(lane, batch, frame) for lane in range(3) for batch in (1, 2, 3) for frame in range(4)}
    assert msgspec.json.decode((tmp_path / "figures.json").read_bytes(), type=gate.GateReport) == report
    assert gate.kept(store, store.get(NAME, "1")) == [report]


def test_a_threshold_is_chosen_again_from_its_evidence(store: Store, source: Path, tmp_path: Path) -> None:
    """Where the stored scores do not give it, the engine is neither verified nor activated."""
    loaded = bundle.load(source)
    threshold = msgspec.structs.replace(loaded.manifest.threshold, value=0.5, false_reject_rate=0.25, samples=3)
    for folder, scores in (("fits", (0.1, 0.2, 0.5)), ("does-not", (0.1, 0.2, 0.3))):
        store.add(bundle.with_threshold(loaded, tmp_path / folder, threshold, Evidence(scores)).folder, NAME)
    assert "threshold: 0.5, chosen again from 3 stored scores" in said(store, "verify", "bright@1", *FAST)
    for command in ("verify", "activate"):
        assert "calibrate again" in str(call(store, command, "bright@2", *FAST).exception)
    assert store.active(NAME) is None


def test_an_engine_that_differs_is_refused_and_the_old_one_stays(store: Store, source: Path, tmp_path: Path) -> None:
    """The report says why, and is kept."""
    said(store, "add", source)
    said(store, "activate", NAME, *FAST)
    said(store, "add", broken(tmp_path / "made"))
    result = call(store, "activate", NAME, *FAST)
    assert isinstance(result.exception, ParityError)
    assert store.active(NAME) == "1"
    (report,) = gate.kept(store, store.get(NAME, "2"))
    assert not report.passed
    assert "lane 0: bright@" in report.reason
    assert "openvino-fp32" not in said(store, "list").splitlines()[-2]


def test_the_differences_of_a_refused_engine_are_printed_and_kept(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has to find the cause sees every frame."""

    def refuse(*_: object) -> None:
        error = ParityError("too far")
        error.differences = [FrameDifference(0, 1, 0.75, 0.25, 3.5, verdict_agrees=False)]  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(gate, "parity_gate", refuse)
    store.add(source, NAME)
    result = call(store, "verify", "bright@1")
    assert isinstance(result.exception, ParityError)
    assert re.search(r"0 +│ 0\.2500 +│ 0\.7500 +│ 0\.50000 +│ 3\.500 +│ 0 +│ 1 +│ DIFFERENT", result.output)
    (row,) = gate.kept(store, store.get(NAME, "1"))[0].rows
    assert (row["lane"], row["score"], row["verdict_agrees"]) == (0, 0.75, False)


def test_what_is_built_ahead_is_where_the_line_looks(store: Store, tmp_path: Path) -> None:
    """The rewritten graph lies in the config's cache, and the gate's report beside the version."""
    store.add(write_network(tmp_path / "network").folder, NAME)
    store.activate(NAME, "1")
    config = line_config(tmp_path, store, f'precision = "int8"\ncache = "{tmp_path / "cache"}"')
    result = CliRunner().invoke(app, ["build", NAME, "--config", str(config)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert f"{NAME}@1 reproduces its reference on openvino in int8" in result.output
    assert list((tmp_path / "cache" / "graphs").glob("*.onnx"))
    assert [report.kind for report in gate.kept(store, store.get(NAME))] == ["openvino-int8"]


def test_images_for_a_precision_that_measures_nothing_are_refused(store: Store, source: Path, tmp_path: Path) -> None:
    """fp32 is the bundle's own graph: the message says which precisions take images."""
    store.add(source, NAME)
    words = ["build", f"{NAME}@1", "--store", str(store.root), "--images", str(tmp_path)]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, PrecisionError)
    assert "only fp16 and int8" in (explain(error) or "")


def test_signing_and_demanding_signatures(store: Store, source: Path, tmp_path: Path) -> None:
    """With the line's config an unsigned engine is refused, signed it is activated, tampered with refused again."""
    (tmp_path / "keys").mkdir()
    assert "public" in said_without_store("keygen", tmp_path / "keys" / "line")
    config = line_config(tmp_path, store, 'require_signature = true\ntrusted_keys = "keys"\nthreads = 1\nmax_batch = 2')
    said(store, "add", source)
    for command in ("verify", "activate"):
        assert "is not signed" in str(call(store, command, NAME + "@1", "--config", config).exception)
    assert "bright@1 is signed by key" in said(store, "sign", NAME, "--key", tmp_path / "keys" / "line")
    assert "signature: by key" in said(store, "verify", "bright@1", "--config", config)
    assert "is active" in said(store, "activate", NAME, "--config", config)
    (report,) = gate.kept(store, store.get(NAME))
    assert (report.target.threads, report.target.max_batch, report.target.lanes) == (1, 2, 2)
    (store.root / NAME / "1" / bundle.SIGNATURE).unlink()
    said(store, "add", source)
    said(store, "sign", "bright@2", "--key", tmp_path / "keys" / "line")
    said(store, "activate", "bright@2", "--config", config)
    assert "is not signed" in str(call(store, "rollback", NAME, "--config", config).exception)
    assert store.active(NAME) == "2"


def said_without_store(*words: str | Path) -> str:
    """What a command that takes no store says."""
    result = CliRunner().invoke(app, ["engines", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_folder_is_signed_before_it_is_sent(store: Store, source: Path, tmp_path: Path) -> None:
    """The signature comes along into the store."""
    said_without_store("keygen", tmp_path / "key")
    said(store, "sign", source, "--key", tmp_path / "key")
    said(store, "add", source)
    assert signing.check(store.get(NAME, "1"))


def test_prune_says_what_goes_and_spares_what_the_config_names(store: Store, source: Path, tmp_path: Path) -> None:
    """A dry run removes nothing; a version that a camera or a recipe names stays."""
    for _ in range(6):
        store.add(source, NAME)
    store.activate(NAME, "2")
    cameras = '[cameras.cam1]\nengine = "bright@3"\nrecipes = { lid = "bright@4" }'
    config = line_config(tmp_path, store, cameras=cameras)
    words = ("prune", "--keep", "1", "--config", config)
    assert said(store, *words, "--dry-run") == "bright: 1 5 would be removed; 1 2 3 4 5 6 in the store\n"
    assert said(store, *words) == "bright: 1 5 removed; 2 3 4 6 in the store\n"
    assert said(store, "prune", NAME, "--keep", "1") == "bright: 3 4 removed; 2 6 in the store\n"
    assert call(store, "prune", "--keep", "0").exit_code == 2


def test_show_prints_the_manifest(store: Store, source: Path) -> None:
    """As JSON on standard output, with everything that was verified on the other one."""
    store.add(source, NAME)
    store.activate(NAME, "1")
    result = call(store, "show", NAME)
    assert json.loads(result.stdout)["name"] == NAME
    assert "verified" in result.stderr


@pytest.mark.parametrize("command", ["show", "verify", "activate", "rollback"])
def test_what_is_not_there_is_said(store: Store, source: Path, command: str) -> None:
    """One line with what there is."""
    store.add(source, NAME)
    assert isinstance(call(store, command, "caps").exception, StoreError)


@pytest.mark.parametrize("command", ["show", "verify", "activate"])
def test_a_damaged_engine_is_refused(store: Store, source: Path, command: str) -> None:
    """Before anything of it is compiled."""
    store.add(source, NAME)
    (store.root / NAME / "1" / MODEL).write_bytes(b"other")
    assert isinstance(call(store, command, "bright@1").exception, BundleError)
