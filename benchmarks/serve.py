"""The endpoint on Ray Serve against the same model behind plain FastAPI and uvicorn: one machine, in turns.

First what batching can give this model here (the ceiling), then answers a second and their times for 1, 4, 16 and 64
clients, then what is left of the way to a model that does nothing. FastAPI gets the thread count that is best for it at
16 clients, Serve as many replicas as there are cores; one torch thread each.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from _harness import REPOSITORY, Figures, interleave, parse, parser, report
from _load import run as drive

CLIENTS = (1, 4, 16, 64)


def find_run(named: str | None) -> str:
    """The run named, that of the small preset, or the demo's."""
    for found in (named, "runs/pad_ufes_20/fuse", "runs/demo/fuse"):
        if found is not None and (Path(found) / "model" / "config.json").exists():
            return str(Path(found).resolve())
    raise SystemExit("no run to serve: name one with --run, or run `prima demo` first")


def write_body(run: str, folder: Path) -> Path:
    """One exam of the run's data set: a photo of 600 x 450 pixels and the attributes of its known exam."""
    from prima_ray.data.images import decode_image, encode_image
    from prima_ray.inference.bundle import load_bundle

    known = load_bundle(Path(run) / "model").known_exam
    if known is None:
        raise SystemExit(f"{run}: saved before there were known exams; train it again")
    photo, _, _ = encode_image(decode_image(known.photo).resize((600, 450)), max_side=None, quality=90)
    path = folder / "body.json"
    images = [base64.b64encode(photo).decode()]
    path.write_text(json.dumps({"images": images, "attributes": known.attributes}))
    return path


@contextlib.contextmanager
def server(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """Start it, wait until it is ready, and stop it by its pid afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(1800):
            if process.poll() is not None:
                raise SystemExit(f"the server ended:\n{log.read_text()[-2000:]}")
            with contextlib.suppress(OSError), urlopen(f"{url}/readyz", timeout=30) as response:  # noqa: S310
                if response.status == 200:
                    break
            time.sleep(0.1)
        yield f"{url}/v1/diagnoses"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def contender(kind: str, run: str, port: int, *options: str) -> list[str]:
    return [str(Path(__file__).with_name("_serve_contenders.py")), kind, str(port), run, *options]


def serve_command(run: str, port: int, replicas: int) -> list[str]:
    scaling = [f"scaling.min_replicas={replicas}", f"scaling.max_replicas={replicas}"]
    sets = [part for item in scaling for part in ("--set", item)]
    return ["-m", "prima_ray.cli", "serve", run, "--port", str(port), *sets]


def ceiling(run: str, body: Path, *, pairs: int, seconds: float) -> Any:
    """Exams a second of the model alone, in this process, in batches of 1 and of 16."""
    import torch

    from prima_ray.inference.predictor import Exam
    from prima_ray.serving.engine import Question
    from prima_ray.serving.model import Model

    torch.set_num_threads(1)
    model, asked = Model(run), json.loads(body.read_text())
    exam = Exam(tuple(map(base64.b64decode, asked["images"])), asked["attributes"])

    def at(size: int) -> Figures:
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            model.answer([Question(exam)] * size)
            count += size
        return {"exams/s": count / (time.perf_counter() - started)}

    at(1), at(16)
    return interleave({"batches of 16": lambda _: at(16), "batches of 1": lambda _: at(1)}, pairs=pairs)


def answered(url: str, body: Path, *, clients: int, seconds: float) -> Figures:
    """Figures of a load whose every request was answered."""
    found = drive(url, body, clients=clients, seconds=seconds)
    if set(found["statuses"]) != {"200"}:
        raise SystemExit(f"{url}: {found['statuses']}")
    return {key: found[key] for key in ("exams/s", "p50 ms", "p99 ms")}


def best_threads(run: str, body: Path, folder: Path, seconds: float) -> tuple[int, dict[int, float]]:
    """FastAPI's thread count with the most answers at 16 clients."""
    found = {}
    for threads in (1, 2, 4):
        with server(contender("fastapi", run, 18311, "--threads", str(threads)), 18311, folder / "log") as url:
            drive(url, body, clients=16, seconds=2)
            found[threads] = answered(url, body, clients=16, seconds=seconds)["exams/s"]
    return max(found, key=lambda count: found[count]), {key: round(value, 1) for key, value in found.items()}


def versus(contenders: dict[str, str], body: Path, clients: int, *, pairs: int, seconds: float) -> Any:
    """Both servers under as many clients, in turns."""
    calls = {
        name: (lambda _, url=url: answered(url, body, clients=clients, seconds=seconds))
        for name, url in contenders.items()
    }
    return interleave(calls, pairs=pairs)


def main(argv: Sequence[str] | None = None) -> None:
    found = parser(__doc__, shards=False)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument("--run", help="a run of fuse; default: the small preset's, else the demo's")
    found.add_argument("--seconds", type=float, default=6.0, help="a measurement (default %(default)s)")
    found.add_argument("--replicas", type=int, default=os.cpu_count() or 1, help="of Serve (default: one a core)")
    arguments = parse(found, argv, seconds=1.0)
    pairs, seconds = arguments.pairs, arguments.seconds
    sections: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = find_run(arguments.run)
        body = write_body(run, folder)
        measured = ceiling(run, body, pairs=pairs, seconds=seconds)
        sections["ceiling of batching"] = {"pairs": measured, "ratio": ("exams/s", "batches of 16", "batches of 1")}
        threads, tried = best_threads(run, body, folder, seconds)
        fastapi = server(contender("fastapi", run, 18311, "--threads", str(threads)), 18311, folder / "fastapi.log")
        served = server(serve_command(run, 18312, arguments.replicas), 18312, folder / "serve.log")
        with fastapi as one, served as two:
            for url in (one, two):
                drive(url, body, clients=4, seconds=2)
            for clients in CLIENTS:
                measured = versus({"serve": two, "fastapi": one}, body, clients, pairs=pairs, seconds=seconds)
                ratio = ("p50 ms" if clients == 1 else "exams/s", "serve", "fastapi")
                sections[f"{clients} clients"] = {"pairs": measured, "ratio": ratio}
        noop = [server(contender(f"noop-{kind}", run, port), port, folder / f"{kind}.log")
                for kind, port in (("fastapi", 18313), ("serve", 18314))]  # fmt: skip
        with noop[0] as one, noop[1] as two:
            for clients in (1, 16):
                measured = versus({"serve": two, "fastapi": one}, body, clients, pairs=pairs, seconds=min(seconds, 3))
                ratio = ("p50 ms" if clients == 1 else "exams/s", "serve", "fastapi")
                sections[f"no-op, {clients} clients"] = {"pairs": measured, "ratio": ratio}
        sections["1 clients"] |= {"fastapi threads": threads, "tried": tried, "replicas": arguments.replicas}
    report("serve", arguments, sections=sections, argv=argv)


if __name__ == "__main__":
    main()
