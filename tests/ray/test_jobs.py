"""`ray job submit` against a cluster of `ray start`: a job server of this test's own on loopback, with a token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
import yaml

from prima_ray.data.phantoms import PhantomConfig, write_phantoms

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
DEADLINE_S = 240
ATTEMPTS = 3


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until(reached: Callable[[], bool], what: Callable[[], str], *, over: Callable[[], bool] = lambda: False) -> None:
    """Wait; `over` says that waiting is no use any more, and is asked now and then: a job's status costs seconds."""
    deadline = time.monotonic() + DEADLINE_S
    for turn in count(1):
        if reached():
            return
        assert time.monotonic() < deadline, what()
        assert turn % 20 or not over(), what()
        time.sleep(0.5)


@dataclass(frozen=True)
class Server:
    address: str
    environment: dict[str, str]

    def ray(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(RAY), "job", *map(str, arguments)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, cwd=ROOT)

    def submit(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.ray("submit", "--address", self.address, *arguments)

    def lines(self, job: str) -> list[str]:
        """What the entry point wrote."""
        said = self.ray("logs", "--address", self.address, job).stdout
        return said.rstrip().splitlines()

    def info(self, job: str) -> tuple[str, int | None]:
        """(status, the entry point's exit code)."""
        script = (
            "import json, sys; from ray.job_submission import JobSubmissionClient as Client\n"
            "found = Client(sys.argv[1]).get_job_info(sys.argv[2])\n"
            "print(json.dumps([found.status, found.driver_exit_code]))"
        )
        command = [sys.executable, "-c", script, self.address, job]
        said = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout
        status, code = json.loads(said.splitlines()[-1])
        return status, code


def refuses_strangers(address: str) -> bool:
    try:
        urlopen(f"{address}/api/version", timeout=5)  # noqa: S310 - our own server
    except HTTPError as error:
        return error.code == 401
    except (URLError, OSError):
        return False
    return False


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # Ray's sockets lie in this folder, and their paths may be a hundred letters long.
    folder = Path(tempfile.mkdtemp(prefix="prima-"))
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment |= {"RAY_agent_register_timeout_ms": "120000"}
    server, process = start_head(folder, environment)
    try:
        yield server
        assert process.poll() is None, f"the cluster ended by itself: {(folder / 'start.log').read_text()}"
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def start_head(folder: Path, environment: dict[str, str]) -> tuple[Server, subprocess.Popen[bytes]]:
    """The job server, and its process. Ray gives its own processes 30 s each, which a busy machine may exceed."""
    for attempt in range(ATTEMPTS):
        address, process = start_once(folder, environment, f"ray-{attempt}")
        server = Server(address, environment)
        # Its agent comes up last, and takes the cluster down where it does not.
        if process.poll() is None and server.ray("list", "--address", address).returncode == 0:
            return server, process
        end(process)
    raise AssertionError((folder / "start.log").read_text())


def start_once(folder: Path, environment: dict[str, str], temp: str) -> tuple[str, subprocess.Popen[bytes]]:
    """Until the server answers, or the process has given up."""
    names = (
        "dashboard-port", "port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port",
        "metrics-export-port", "ray-client-server-port",
    )  # fmt: skip
    # All of them: for a port that its agents choose the raylet waits some fifteen seconds, and gives up.
    ports = free_ports(len(names) + 40)
    command = [
        str(RAY), "start", "--head", "--block", "--disable-usage-stats", "--dashboard-host", "127.0.0.1",
        *(word for name, port in zip(names, ports, strict=False) for word in (f"--{name}", str(port))),
        "--worker-port-list", ",".join(map(str, ports[len(names) :])),
        "--num-cpus", "4", "--temp-dir", str(folder / temp),
    ]  # fmt: skip
    with (folder / "start.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{ports[0]}"
    until(lambda: process.poll() is not None or refuses_strangers(address), lambda: "the job server does not answer")
    return address, process


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        # Its session is this test's own.
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_phantoms(folder, PhantomConfig(num_patients=24, image_side=32))
    return folder


@pytest.fixture(scope="module")
def shards(server: Server, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by a submitted job, whose log is looked at here."""
    out = tmp_path_factory.mktemp("jobs") / "shards"
    done = server.submit(
        "--submission-id", "ingest", "--", sys.executable, ROOT / "jobs/ingest.py",
        ROOT / "jobs/configs/phantoms/ingest.yaml", "--set", f"out={out}", "--set", f"source.table={raw}/metadata.csv",
        "--set", f"source.images={raw}/images", "--set", "folds.count=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.info("ingest") == ("SUCCEEDED", 0)
    assert server.lines("ingest")[-1] == f"run: {out}"
    return out


def test_a_submitted_job_writes_what_the_command_writes(shards: Path) -> None:
    assert {"manifest.json", "run.json", "folds.parquet"} <= {path.name for path in shards.iterdir()}


def test_the_reason_of_a_failure_is_the_end_of_the_log(server: Server, raw: Path, tmp_path: Path) -> None:
    """`out` is relative, as in the shipped configs, and the job runs in Ray's copy of a folder."""
    config = (ROOT / "jobs/configs/phantoms/ingest.yaml").read_text()
    (tmp_path / "ingest.yaml").write_text(config)
    done = server.submit(
        "--submission-id", "lost", "--working-dir", tmp_path,
        "--", sys.executable, ROOT / "jobs/ingest.py", "ingest.yaml",
    )  # fmt: skip
    # Ray's command says 1 whatever the job's code was; the job's own is in its record.
    assert done.returncode == 1
    assert server.info("lost") == ("FAILED", 2)
    what, mend = server.lines("lost")[-2:]
    assert what.startswith("prima: ")
    assert what.endswith(
        "/runs/phantoms/shards: `out` lies in Ray's copy of the working directory, which goes with the job"
    )
    assert mend == "  Name a folder that stays: --set out=/shared/runs/NAME, or s3://bucket/NAME."
    assert "Traceback" not in done.stdout


def test_a_stopped_job_says_so_and_is_taken_up_when_it_is_submitted_again(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "finetune"
    config = {
        "out": str(out),
        "inputs": {"shards": str(shards)},
        "image_tower": {"name": "resnet10t", "image_size": 32},
        "views": {"image_size": 32, "num_views": 1},
        "optimizer": {"lr": 1e-3},
        "global_batch": 8,
        "epochs": 200,
        "max_steps": 250,
        "validate_every_epochs": 200,
        "checkpoint_every_steps": 5,
        "context": {"kind": "local", "device": "cpu"},
    }
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(config))
    command = ("--", sys.executable, ROOT / "jobs/finetune.py", path)
    runtime_env = ROOT / "jobs/runtime_env.yaml"
    submitted = server.submit("--submission-id", "first", "--runtime-env", runtime_env, "--no-wait", *command)
    assert submitted.returncode == 0
    steps = out / "steps.jsonl"
    until(
        lambda: steps.exists() and steps.read_text().count("\n") > 10,
        lambda: "\n".join(server.lines("first")),
        over=lambda: server.info("first")[0] in ("FAILED", "SUCCEEDED"),
    )
    assert server.ray("stop", "--address", server.address, "first").returncode == 0
    assert server.info("first")[0] == "STOPPED"
    assert server.lines("first")[-1] == "prima: stopped; the same command continues where it can"
    assert not (out / ".lock").exists()
    assert not (out / "run.json").exists()
    again = server.submit("--submission-id", "second", *command)
    assert again.returncode == 0, again.stdout
    assert server.lines("second")[-1] == f"run: {out}"
    starts = [json.loads(line)["from_step"] for line in (out / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[1] > 0
    assert [json.loads(line)["step"] for line in steps.read_text().splitlines()] == list(range(1, 251))
