"""The files that bring the project to a cluster: Ray's own schema, tokens everywhere, one image."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# KubeRay's reference of ray.io/v1 (1.6.2): what a RayJob and the cluster in it may have.
RAYJOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "preRunningDeadlineSeconds",
    "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig",
    "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
CLUSTER = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
}  # fmt: skip
GROUP = {
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
    "replicas", "resources", "scaleStrategy", "suspend", "template",
}  # fmt: skip


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def rayjob() -> Any:
    return load("kubernetes/rayjob-align.yaml")["spec"]


def pods(cluster: Any) -> Iterator[Any]:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def test_the_launcher_takes_cluster_yaml() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    pytest.importorskip("jsonschema")
    config = load("cluster.yaml")
    util.validate_config(config)
    kinds = config["available_node_types"]
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) <= config["max_workers"]
    assert kinds["gpu"]["resources"]["GPU"] == 1
    assert kinds["gpu"]["min_workers"] < kinds["gpu"]["max_workers"]


def test_every_node_of_the_launcher_asks_for_the_token() -> None:
    config = load("cluster.yaml")
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert [line.startswith("RAY_AUTH_MODE=token ") for line in commands if "ray start" in line] == [True]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_every_pod_asks_for_the_token_and_is_not_root(rayjob: Any) -> None:
    cluster = rayjob["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
            assert "memory" in container["resources"]["limits"]


def test_the_rayjob_has_only_keys_that_kuberay_knows(rayjob: Any) -> None:
    cluster = rayjob["rayClusterSpec"]
    assert set(rayjob) <= RAYJOB
    assert set(cluster) <= CLUSTER
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())
    assert {"name": "shm", "mountPath": "/dev/shm"} in next(pods(cluster))["containers"][0]["volumeMounts"]  # noqa: S108


def test_the_rayjob_runs_what_is_in_the_image(rayjob: Any) -> None:
    words = rayjob["entrypoint"].split()
    assert words[0] == "python"
    assert (ROOT / words[1]).is_file()
    from prima_ray.config import load_config
    from prima_ray.stages.align import AlignConfig

    overrides = [word for before, word in itertools.pairwise(words) if before == "--set"]
    config = load_config(AlignConfig, ROOT / words[2], overrides)
    (gpus,) = (group for group in rayjob["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert config.worker_range == (gpus["minReplicas"], gpus["maxReplicas"])
    assert config.context.kind == "ray"
    assert config.context.autoscales


def test_versions_are_those_of_the_environment(rayjob: Any) -> None:
    assert rayjob["rayClusterSpec"]["rayVersion"] == importlib.metadata.version("ray")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    image = re.search(r"^FROM python:([\d.]+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert image is not None
    assert f">={image[1]}" == project["requires-python"]


def test_the_image_gets_what_it_copies() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY --chown")
        for word in line.split()[2:-1]
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)


def test_the_jobs_runtime_environment_is_one(tmp_path: Path) -> None:
    runtime_env = pytest.importorskip("ray.runtime_env")
    found = runtime_env.RuntimeEnv(**load("jobs/runtime_env.yaml"))
    assert int(found["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 3
