"""A second node with a disk of its own where the first one has its folder: a mount namespace does it on one machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("ray")

SCRIPT = """
import subprocess, sys, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from prima_ray.base import PrimaError
from prima_ray.training.shared_folder import check_shared, nodes_without

own, shared = sys.argv[1:]
for attempt in range(3):
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        break
    except Exception as error:  # Ray gives its processes 30 s, a constant; a busy machine may need longer
        if "timed out during startup" not in str(error) or attempt == 2:
            raise
ray.init(address=cluster.address, logging_level="ERROR")
assert nodes_without(own) == {}, "one node: nobody is asked"
start = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address} --num-cpus=1 --block"
node = subprocess.Popen(
    ["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {own} && exec {start}"],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)
try:
    deadline = time.monotonic() + 120
    while sum(item["Alive"] for item in ray.nodes()) < 2:
        assert node.poll() is None and time.monotonic() < deadline, "the second node did not come up"
        time.sleep(0.2)
    check_shared(shared)
    try:
        check_shared(own)
    except PrimaError as error:
        print(error, flush=True)
    assert [list(Path(item).iterdir()) for item in (own, shared)] == [[], []], "probes are removed"
finally:
    node.terminate()
    node.wait(timeout=30)
    ray.shutdown()
    cluster.shutdown()
"""


def _may_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_folder_on_one_machines_disk_is_refused(tmp_path: Path):
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir()
    shared.mkdir()
    if not _may_mount(own):
        pytest.skip("mount namespaces are not allowed here")
    # A process of its own: two clusters in one confuse Ray.
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(own), str(shared)],
        capture_output=True, text=True, timeout=480, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    what, mend = answer.stdout.splitlines()[-2:]
    head, _, why = what.partition(" cannot use this folder: ")
    assert head.startswith(f"{own}: the cluster's node ")
    assert why == "what another machine wrote there is not seen; it is on a disk of one machine"
    assert mend == (
        "  Name in `out` a folder that every node mounts at this path (NFS), or an object store (s3://...)."
    )
