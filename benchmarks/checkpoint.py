"""What a checkpoint costs training: written at once, and beside it, on a local disk and on an S3-compatible server.

Steps of a perceptron on a CPU, its AdamW state exported and written by the program's own `CheckpointWriter`. A turn is
some steps with checkpoints between them, and the wait for the last one at the end. `stall_s` is a turn's time over that
of a turn without checkpoints in the same pair, a checkpoint; so it holds what the thread takes from the steps beside
it. `blocked_s` is the time for which the training thread stood still, the last wait included.

    python benchmarks/checkpoint.py [--pairs 7] [--megabytes 100] [--quick]
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from _harness import WORK, Figures, Pairs, parse, parser, report, turns

from prima_ray.data.storage import Folder
from prima_ray.training.checkpoint import Origin, Progress
from prima_ray.training.checkpoint_writer import CheckpointWriter
from prima_ray.training.config import CheckpointConfig, OptimizerConfig
from prima_ray.training.engine import build_optimizer, read_adam_state, trainable_parameters

_WIDTH = 2048
_BATCH = 64
_NAMES = ("synchronous", "asynchronous")


class _Training:
    """Steps, and the state after them."""

    def __init__(self, megabytes: int) -> None:
        torch.manual_seed(0)
        # Weights and two moments, four bytes each.
        layers = max(1, round(megabytes * 1e6 / (12 * _WIDTH**2)))
        self.model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(layers)))
        self.optimizer = build_optimizer(self.model, OptimizerConfig(lr=1e-4))
        self.pixels = torch.randn(_BATCH, _WIDTH)
        self.step()
        self.state_bytes = sum(value.nbytes for value in read_adam_state(self.optimizer, self.named).values())

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        return trainable_parameters(self.model)

    def step(self) -> None:
        self.model(self.pixels).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _turn(training: _Training, address: str | None, *, asynchronous: bool, steps: int, checkpoints: int) -> Figures:
    config = CheckpointConfig(keep_last=1, asynchronous=asynchronous)
    writer = CheckpointWriter(address, config, Origin()) if address else None
    blocked, begun = 0.0, time.perf_counter()
    for number in range(1, checkpoints + 1):
        for _ in range(steps):
            training.step()
        if writer:
            halted = time.perf_counter()
            writer.wait()
            writer.save(read_adam_state(training.optimizer, training.named), Progress(step=number))
            blocked += time.perf_counter() - halted
    # What follows the last checkpoint of a real run is another stretch of steps.
    for _ in range(steps):
        training.step()
    if writer:
        halted = time.perf_counter()
        writer.wait()
        blocked += time.perf_counter() - halted
    seconds = time.perf_counter() - begun
    if writer:
        writer.close()
    return {"seconds": seconds, "blocked_s": blocked / checkpoints}


def _measure(training: _Training, address: str, *, pairs: int, steps: int, checkpoints: int) -> Pairs:
    found = Pairs(_NAMES)
    times: dict[str, Figures] = {}
    for pair, name in turns(("none", *_NAMES), pairs):
        times[name] = _turn(
            training,
            None if name == "none" else address,
            asynchronous=name == "asynchronous",
            steps=steps,
            checkpoints=checkpoints,
        )
        print(f"pair {pair + 1}/{pairs}: {name:<12} {times[name]['seconds']:.2f} s", file=sys.stderr, flush=True)
        if len(times) == len(_NAMES) + 1:
            for other in _NAMES:
                stall = (times[other]["seconds"] - times["none"]["seconds"]) / checkpoints
                found.add(other, {"stall_s": stall, "blocked_s": times[other]["blocked_s"]})
            times = {}
    return found


@contextmanager
def _server() -> Iterator[str]:
    """A bucket on an S3-compatible server, in a process of its own on the same cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = {
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    before = dict(os.environ)
    os.environ.update(ours)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port)
        made = Folder.at("s3://bench/checkpoints?allow_bucket_creation=true")
        made.filesystem.create_dir("bench")
        yield "s3://bench/checkpoints"
    finally:
        server.terminate()
        server.wait()
        os.environ.clear()
        os.environ.update(before)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> int:
    command = parser(__doc__, shards=False)
    command.add_argument("--megabytes", type=int, default=100, help="of state (default %(default)s)")
    command.add_argument("--steps", type=int, default=12, help="between checkpoints (default %(default)s)")
    command.add_argument("--checkpoints", type=int, default=1, help="a turn (default %(default)s)")
    arguments = parse(command, argv, megabytes=20, steps=2)
    training = _Training(arguments.megabytes)
    keys = {"pairs": arguments.pairs, "steps": arguments.steps, "checkpoints": arguments.checkpoints}
    begun = time.perf_counter()
    for _ in range(3):
        training.step()
    setting = {
        "state_megabytes": round(training.state_bytes / 1e6, 1),
        "step_s": round((time.perf_counter() - begun) / 3, 3),
        "steps_between": arguments.steps,
    }

    def section(measure: Callable[[str], Pairs], address: str) -> dict[str, object]:
        return {"pairs": measure(address), "ratio": ("blocked_s", "asynchronous", "synchronous"), **setting}

    def measure(address: str) -> Pairs:
        _turn(training, address, asynchronous=False, steps=1, checkpoints=1)  # what is done once a process
        return _measure(training, address, **keys)

    WORK.mkdir(parents=True, exist_ok=True)
    disk = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=WORK))
    try:
        sections = {"disk": section(measure, str(disk))}
        with _server() as bucket:
            sections["s3"] = section(measure, bucket)
    finally:
        shutil.rmtree(disk)
    report("checkpoint", arguments, sections=sections, argv=argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
