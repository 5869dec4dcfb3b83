"""The manifests for k3s: the same commands and configs as the containers, and no more rights than the units."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import config
from tests.support.commands import check
from tests.support.manifests import IMAGES, PROGRAM, ROOT, last

FOLDER = ROOT / "deploy/k3s"
CONTAINER = ROOT / "deploy/container"
PARTS: list[str] = yaml.safe_load((FOLDER / "cpu/kustomization.yaml").read_text())["resources"]
OBJECTS: list[dict[str, Any]] = [
    found for name in PARTS for found in yaml.safe_load_all((FOLDER / "cpu" / name).read_text())
]
PATCH: dict[str, Any] = yaml.safe_load((FOLDER / "gpu/line.yaml").read_text())
WORK = {one["metadata"]["name"]: one for one in OBJECTS if one["kind"] in {"StatefulSet", "Deployment"}}
each_pod = pytest.mark.parametrize("name", WORK)
HANDED = "/run/secrets"


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    """The objects of a kind, by name."""
    return {one["metadata"]["name"]: one for one in OBJECTS if one["kind"] == kind}


def pod(name: str) -> dict[str, Any]:
    """What a pod is made of."""
    found: dict[str, Any] = WORK[name]["spec"]["template"]["spec"]
    return found


def container(name: str) -> dict[str, Any]:
    """The one container of a pod."""
    (found,) = pod(name)["containers"]
    assert isinstance(found, dict)
    return found


def probes(name: str) -> Iterator[list[str]]:
    """The commands by which a pod is looked after."""
    for kind, probe in container(name).items():
        if kind.endswith("Probe") and "exec" in probe:
            yield probe["exec"]["command"]


def test_every_file_is_used() -> None:
    """No manifest lies beside the others without being applied."""
    assert {path.name for path in (FOLDER / "cpu").glob("*.yaml")} == {"kustomization.yaml", *PARTS}
    assert set(WORK) == {"redis", "line", "monitor"}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
def test_kustomize_builds_it(name: str) -> None:
    """All in one namespace, but the namespace itself; on the GPU variant only the line differs."""
    command = ["kubectl", "kustomize", str(FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(OBJECTS)
    assert {one["metadata"].get("namespace") for one in built if one["kind"] != "Namespace"} == {"dmdd"}
    (line,) = (one for one in built if one["kind"] == "StatefulSet" and one["metadata"]["name"] == "line")
    spec = line["spec"]["template"]["spec"]
    assert ("nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]) == (name == "gpu")
    assert spec.get("runtimeClassName") == ("nvidia" if name == "gpu" else None)
    assert spec["containers"][0]["securityContext"] == container("line")["securityContext"]


class TestPods:
    """Line, page and Redis."""

    @each_pod
    def test_it_is_hardened(self, name: str) -> None:
        """As the units are: no root, no new rights, nothing to write but its volumes, a filter of system calls."""
        user, _, group = last(IMAGES["dmdd-line:cpu"], "USER").text.partition(":")
        assert pod(name)["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": int(user),
            "runAsGroup": int(group),
            "fsGroup": int(group),
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert pod(name)["automountServiceAccountToken"] is False
        assert container(name)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod(name))

    @each_pod
    def test_it_is_looked_after(self, name: str) -> None:
        """A probe that restarts it, memory that is asked for and limited, no secret in a variable."""
        found = container(name)
        assert "livenessProbe" in found
        assert set(found["resources"]["requests"]) == {"cpu", "memory"}
        assert "memory" in found["resources"]["limits"]
        assert "cpu" not in found["resources"]["limits"]
        assert "env" not in found

    @each_pod
    def test_what_it_mounts_is_there(self, name: str) -> None:
        """Every volume is defined, and its config map exists with the file."""
        volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
        claims = {claim["metadata"]["name"] for claim in WORK[name]["spec"].get("volumeClaimTemplates", [])}
        mounts = {mount["name"]: mount for mount in container(name)["volumeMounts"]}
        assert set(mounts) == {*volumes, *claims}
        for volume, mount in mounts.items():
            wanted = volumes.get(volume, {}).get("configMap")
            if wanted:
                assert mount["subPath"] in of_kind("ConfigMap")[wanted["name"]]["data"]

    @each_pod
    def test_selectors_find_it(self, name: str) -> None:
        """Its own selector, its service, and the ports that the service leads to."""
        labels = WORK[name]["spec"]["template"]["metadata"]["labels"]
        assert WORK[name]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        service = of_kind("Service")[name]["spec"]
        assert service["selector"].items() <= labels.items()
        ports = {port["containerPort"] for port in container(name)["ports"]}
        assert {port["port"] for port in service["ports"]} == ports

    @pytest.mark.parametrize("name", ["line", "monitor"])
    def test_commands(self, name: str) -> None:
        """What it runs and is asked by are commands; its image is one that is built here."""
        assert container(name)["image"] in IMAGES
        check(container(name)["args"], name)
        for words in probes(name):
            assert words[0] == PROGRAM
            check(words[1:], name)

    @pytest.mark.parametrize(("name", "file"), [("line", "line.toml"), ("monitor", "monitor.toml")])
    def test_its_password_is_where_it_is_looked_for(self, name: str, file: str) -> None:
        """The key of the secret is the user's own; the file's name is the credential of the config."""
        loaded = config.load(CONTAINER / file)
        (volume,) = (one for one in pod(name)["volumes"] if "secret" in one)
        (item,) = volume["secret"]["items"]
        assert item == {"key": f"{loaded.redis.username}.password", "path": loaded.redis.credential}
        assert volume["secret"]["defaultMode"] == 0o440
        assert {"name": volume["name"], "mountPath": HANDED, "readOnly": True} in container(name)["volumeMounts"]

    def test_there_is_one_line(self) -> None:
        """Never two with one spool; a stop waits until it has drained."""
        loaded = config.load(CONTAINER / "line.toml")
        assert WORK["line"]["kind"] == "StatefulSet"
        assert WORK["line"]["spec"]["replicas"] == 1
        grace = pod("line")["terminationGracePeriodSeconds"]
        assert grace > max(loaded.line.drain_timeout_s, loaded.redis.startup_timeout_s)

    def test_only_pods_of_the_line_reach_redis(self) -> None:
        """The network policy lets in those that have the label, which line and page have."""
        policy = of_kind("NetworkPolicy")["redis"]["spec"]
        (rule,) = policy["ingress"]
        ((label, value),) = rule["from"][0]["podSelector"]["matchLabels"].items()
        named = {
            name for name, work in WORK.items() if work["spec"]["template"]["metadata"]["labels"].get(label) == value
        }
        assert named == {"line", "monitor"}
        assert (
            policy["podSelector"]["matchLabels"].items()
            <= WORK["redis"]["spec"]["template"]["metadata"]["labels"].items()
        )


def test_configs_are_those_of_the_containers() -> None:
    """Byte for byte; so what is checked there holds here."""
    maps = of_kind("ConfigMap")
    assert maps["line-config"]["data"]["config.toml"] == (CONTAINER / "line.toml").read_text()
    assert maps["monitor-config"]["data"]["config.toml"] == (CONTAINER / "monitor.toml").read_text()
    assert maps["redis-config"]["data"]["line.conf"] == (ROOT / "deploy/redis/line.conf").read_text()
    address = tomllib.loads(maps["line-config"]["data"]["config.toml"])["redis"]["url"]
    assert re.findall(r"//(\w+):(\d+)/", address) == [
        ("redis", str(of_kind("Service")["redis"]["spec"]["ports"][0]["port"]))
    ]


def test_redis_has_room_for_what_it_may_hold() -> None:
    """Its limit is above maxmemory, or the cluster would kill it before it refuses writes."""
    settings = (ROOT / "deploy/redis/line.conf").read_text()
    (most,) = re.findall(r"(?m)^maxmemory (\d+)gb$", settings)
    assert int(container("redis")["resources"]["limits"]["memory"].removesuffix("Gi")) > int(most)


def test_the_gpu_variant() -> None:
    """One GPU for the line, by the device plugin; its image is one that is built here."""
    spec = PATCH["spec"]["template"]["spec"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert spec["containers"][0]["image"] in IMAGES
    assert Path(IMAGES[spec["containers"][0]["image"]]).suffix == ".tensorrt"
