"""Folders that are really not writable, not shared, or gone with the job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prima_ray.base import PrimaError
from prima_ray.training.checks import Finding, Subject, run_checks
from prima_ray.training.checks.storage import STORAGE, disk_space, inputs_on_every_node, refuse_lost, writable
from prima_ray.training.facts import Facts, FolderState, observe, probe_folder, sweep


def texts(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(item.level, str(item.as_error())) for item in findings]


def test_a_probe_is_written_and_swept(tmp_path: Path) -> None:
    out = probe_folder(str(tmp_path / "not" / "there" / "yet")).address
    assert out == str(tmp_path)
    state = observe([out], probe=".probe").folders[0]
    assert state.error is None
    assert [path.name for path in tmp_path.iterdir()] == [".probe"]
    sweep([out], ".probe")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs a folder nobody may write to")
def test_a_folder_that_cannot_be_written_to() -> None:
    # Not even root writes here.
    facts = observe(["/proc/self"], probe=".probe")
    ((level, text),) = texts(run_checks([writable], Subject(here=facts)))
    assert level == "error"
    assert text.startswith("/proc/self: cannot be written to (")
    assert text.endswith(")\n  Change its owner or mode, or name another folder.")


def test_a_folder_that_is_every_nodes_own(tmp_path: Path) -> None:
    here = observe([str(tmp_path)])
    nodes = {"10.0.0.1": here, "10.0.0.2": here}
    why = "what it writes there is not seen here"
    assert texts(run_checks([writable], Subject(here=here, nodes=nodes, blind={str(tmp_path): {"10.0.0.2": why}}))) == [
        (
            "error",
            f"{tmp_path}: the cluster's node 10.0.0.2 cannot use this folder: {why}\n"
            "  Name in `out` a folder that every node mounts at this path (NFS), or an object store (s3://...).",
        )
    ]
    assert texts(run_checks([writable], Subject(here=here, nodes=nodes))) == [
        ("ok", f"{tmp_path}: 2 nodes can write here")
    ]


def test_an_input_that_a_node_does_not_have(tmp_path: Path) -> None:
    there = observe(inputs=[str(tmp_path / "shards"), str(tmp_path), "s3://bucket/shards"])
    assert texts(run_checks([inputs_on_every_node], Subject(here=there, nodes={"10.0.0.2": there}))) == [
        (
            "error",
            f"10.0.0.2: {tmp_path}/shards: is not there on this node\n"
            "  Put it where every node finds it under this path, or use an address such as s3://bucket/folder.",
        )
    ]


@pytest.mark.parametrize(
    ("free", "level", "text"),
    [
        (50 << 30, "ok", "50.0 of 100.0 GiB are free"),
        (4 << 30, "warning", "4.0 of 100.0 GiB are free: Ray writes no objects out where 95% are used"),
        (100 << 20, "error", "0.1 of 100.0 GiB are free, less than a checkpoint may need"),
    ],
)
def test_room_on_the_disk(free: int, level: str, text: str) -> None:
    state = FolderState("/shared", free_bytes=free, total_bytes=100 << 30)
    (item,) = run_checks([disk_space], Subject(here=Facts("here", "3.11.7", folders=(state,))))
    assert (item.level, item.what, item.where) == (level, text, "/shared")


def test_an_out_that_goes_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "session_latest" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(PrimaError) as caught:
        refuse_lost("runs/align")
    assert str(caught.value) == (
        f"{copy}/runs/align: `out` lies in Ray's copy of the working directory, which goes with the job\n"
        "  Name a folder that stays: --set out=/shared/runs/NAME, or s3://bucket/NAME."
    )
    refuse_lost(str(tmp_path / "align"))
    refuse_lost("s3://bucket/align")


def test_a_check_that_fails_is_a_finding(tmp_path: Path) -> None:
    def broken(_: Subject) -> object:
        raise OSError(5, "Input/output error")

    (item,) = run_checks([broken], Subject(here=observe()))  # type: ignore[list-item]
    assert (item.level, item.what, item.check) == ("error", "could not be looked at (Input/output error)", "broken")
    assert len(STORAGE) == 4
