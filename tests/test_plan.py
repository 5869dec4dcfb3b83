"""Plans: built as was validated, kept under all that they depend on, built anew where they do not load."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import plan
from engines.build import BuildError
from engines.bundle import Bundle
from engines.plan import PlanCache, Profile, key_of, load_engine, profiles_for
from engines.tensorrt_lane import TensorRtEngine
from tests.doubles import simulated
from tests.doubles.trt import Severity, World
from tests.support.gpu import FRAME, MAX_BATCH, engine_of, simulated_bundle


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Simulated libraries; nothing may be left on the GPU at the end of the test."""
    with simulated(monkeypatch) as world:
        yield world


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle for the simulated network."""
    return simulated_bundle(tmp_path)


class TestBuild:
    def test_what_is_asked_for(self, world: World, bundle: Bundle) -> None:
        """Strongly typed, one profile of 1 to max_batch, no auxiliary streams, no TF32: the validated precision."""
        with engine_of(bundle) as engine:
            assert engine.manifest is bundle.manifest
            assert engine.max_batch == MAX_BATCH
        assert world.asked == {
            "model": b"graph",
            "network_flags": 2,
            "tf32": False,
            "max_aux_streams": 0,
            "profiles": [[(1, *FRAME), (MAX_BATCH, *FRAME), (MAX_BATCH, *FRAME)]],
        }

    def test_a_profile_for_each_batch_size(self, world: World, bundle: Bundle) -> None:
        """Beside the profile for every batch there is one for each size that is asked for."""
        profiles = profiles_for(8, exact=(1, 4))
        assert profiles == (Profile(1, 8, 8), Profile(1, 1, 1), Profile(4, 4, 4))
        kit = plan.toolkit()
        with plan.cuda.attached():
            key = key_of(kit, bundle.model, "fp32", FRAME, profiles)
            plan.build_plan(kit, bundle.model, key)
        assert [[shape[0] for shape in shapes] for shapes in world.asked["profiles"]] == [[1, 8, 8], [1] * 3, [4] * 3]

    def test_no_tensorrt(self, world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without TensorRT the error names the extra to install."""
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(BuildError, match=r"pip install 'dmdd-line\[tensorrt\]'"):
            TensorRtEngine(bundle, max_batch=1, precision="fp32")

    def test_parser_errors(self, world: World, bundle: Bundle) -> None:
        """A graph that cannot be read gives every one of the parser's reasons, and the log."""
        world.parse_errors = ["node 3: no importer for Foo", "node 9: UINT8 not supported"]
        with pytest.raises(BuildError) as caught:
            TensorRtEngine(bundle, max_batch=1, precision="fp32")
        for text in ("no importer for Foo", "UINT8 not supported", "ERROR: parsing failed"):
            assert text in str(caught.value)

    @pytest.mark.parametrize(
        "refusal",
        [
            "Builder",
            "create_network",
            "create_builder_config",
            "add_optimization_profile",
            "build_serialized_network",
            "deserialize_cuda_engine",
        ],
    )
    def test_refusals(self, world: World, bundle: Bundle, refusal: str) -> None:
        """Whatever TensorRT refuses with None, -1 or an exception is a BuildError with the log's text."""
        world.refuse = {refusal}
        with pytest.raises(BuildError, match=f"ERROR: {refusal}: simulated refusal"):
            TensorRtEngine(bundle, max_batch=2, precision="fp32")

    def test_impossible_profile(self, world: World, bundle: Bundle) -> None:
        """A batch size that no profile can have is a BuildError too."""
        with pytest.raises(BuildError, match="inconsistent"):
            TensorRtEngine(bundle, max_batch=0, precision="fp32")

    def test_one_logger(self, world: World, bundle: Bundle) -> None:
        """All engines share one logger, as TensorRT keeps the first that it is given."""
        with engine_of(bundle), engine_of(bundle):
            pass
        assert len(set(map(id, world.loggers))) == 1

    def test_log_keeps_what_matters(self, world: World, bundle: Bundle) -> None:
        """The text in an error holds the last warnings and errors, none of the chatter, none of an earlier build."""
        with engine_of(bundle):
            world.complain("of an earlier build")
        journal = plan.toolkit().journal
        world.refuse = {"build_serialized_network"}
        with pytest.raises(BuildError, match="simulated refusal") as caught:
            TensorRtEngine(bundle, max_batch=1, precision="fp32")
        assert "earlier" not in str(caught.value)
        for number in range(50):
            world.complain(f"number {number}.", Severity.WARNING)
            world.complain("chatter", Severity.VERBOSE)
        assert "WARNING: number 49." in str(journal)
        assert "number 9." not in str(journal)
        assert "chatter" not in str(journal)


class TestProgress:
    def test_is_told(self, world: World, bundle: Bundle) -> None:
        """A build says its phase, the steps done and all steps, so that a watchdog can be fed."""
        told: list[tuple[str, int, int]] = []
        with engine_of(bundle, progress=lambda *step: told.append(step)):
            pass
        assert told == [("Tactics", 0, 2), ("Tactics", 1, 2), ("Tactics", 2, 2), ("Tactics", 2, 2)]

    def test_ends_the_build(self, world: World, bundle: Bundle) -> None:
        """What a callback raises ends the build at once and comes out as it is."""

        def interrupt(_: str, done: int, __: int) -> None:
            if done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), engine_of(bundle, progress=interrupt):
            pass
        assert world.builds == 0


class TestCache:
    def test_a_second_start_builds_nothing(self, world: World, bundle: Bundle, tmp_path: Path) -> None:
        """The plan of the first start serves the second."""
        for _ in range(2):
            with engine_of(bundle, cache=tmp_path / "cache"):
                pass
        assert world.builds == 1

    def test_without_a_cache_each_start_builds(self, world: World, bundle: Bundle) -> None:
        """An engine that is given no folder leaves nothing behind."""
        for _ in range(2):
            with engine_of(bundle):
                pass
        assert world.builds == 2

    @pytest.mark.parametrize("change", ["graph", "tensorrt", "gpu", "capability", "driver", "precision", "profiles"])
    def test_whatever_a_plan_depends_on_names_it(self, world: World, bundle: Bundle, change: str) -> None:
        """Another graph, TensorRT, GPU, driver, precision or batch is another plan."""
        kit = plan.toolkit()
        with plan.cuda.attached():
            key = key_of(kit, bundle.model, "fp32", FRAME, profiles_for(4))
        other = profiles_for(8) if change == "profiles" else "other"
        assert plan.msgspec.structs.replace(key, **{change: other}).name != key.name

    def test_a_plan_that_does_not_load_is_built_anew(
        self, world: World, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A recorded plan that TensorRT refuses is replaced, which is said with TensorRT's own reason."""
        kit, cache = plan.toolkit(), PlanCache(tmp_path / "plans")
        with plan.cuda.attached():
            key = key_of(kit, bundle.model, "fp32", FRAME, profiles_for(2))
            cache.keep(key, b"plan of 9.0")
            runtime = kit.trt.Runtime(kit.logger)
            engine = load_engine(kit, runtime, bundle.model, key, cache)
            assert engine is not None
            del engine
        assert cache.load(key) == b"plan of 11.4.0"
        said = capsys.readouterr().out
        assert "plan_rebuilt" in said
        assert "another version" in said

    @pytest.mark.parametrize("file", ["plan", "json"])
    def test_an_altered_plan_is_never_loaded(
        self, world: World, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
    ) -> None:
        """A plan, or a record, that is not what was written is not given to TensorRT; the start builds anew."""
        with engine_of(bundle, cache=tmp_path / "cache"):
            pass
        (path,) = (tmp_path / "cache" / "plans").glob(f"*.{file}")
        path.write_bytes(path.read_bytes()[:-4] + b"evil")
        with engine_of(bundle, cache=tmp_path / "cache"):
            pass
        assert world.builds == 2
        assert "plan_" in capsys.readouterr().out

    def test_a_folder_that_others_write_to_is_refused(self, world: World, bundle: Bundle, tmp_path: Path) -> None:
        """Plans are code: a folder that others may write to is refused with the remedy."""
        folder = tmp_path / "cache" / "plans"
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        with pytest.raises(BuildError, match="chmod 700"):
            TensorRtEngine(bundle, max_batch=1, precision="fp32", cache=tmp_path / "cache")

    def test_a_failed_build_keeps_nothing(self, world: World, bundle: Bundle, tmp_path: Path) -> None:
        """Only a plan that was built and has loaded is kept."""
        world.refuse = {"deserialize_cuda_engine"}
        with pytest.raises(BuildError):
            TensorRtEngine(bundle, max_batch=1, precision="fp32", cache=tmp_path / "cache")
        assert list((tmp_path / "cache" / "plans").glob("*.plan")) == []


class TestTimings:
    def test_are_used_again(self, world: World, bundle: Bundle, tmp_path: Path) -> None:
        """What one build has measured, the next one on the box is given."""
        for size in (1, 2):
            TensorRtEngine(bundle, max_batch=size, precision="fp32", cache=tmp_path / "cache").close()
        assert world.timings == [b"", b"timings of 11.4.0"]

    def test_foreign_ones_are_measured_anew(self, world: World, bundle: Bundle, tmp_path: Path) -> None:
        """Timings that TensorRT refuses do not stop the build; they are said to be of no use, and replaced."""
        TensorRtEngine(bundle, max_batch=1, precision="fp32", cache=tmp_path / "cache").close()
        (path,) = (tmp_path / "cache" / "plans").glob("*.timings")
        path.write_bytes(b"timings of 9.0")
        TensorRtEngine(bundle, max_batch=2, precision="fp32", cache=tmp_path / "cache").close()
        assert world.timings[-1] == b""
        assert path.read_bytes() == b"timings of 11.4.0"
