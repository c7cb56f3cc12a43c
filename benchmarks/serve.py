"""The endpoint on Ray Serve against the same model behind plain FastAPI and uvicorn: one machine, in turns.

First what batching can give this model on all cores (the ceiling), then answers a second and their times for 1, 4, 16
and 64 clients, then what is left of the way to a model that does nothing. FastAPI gets the threads, and torch threads,
that are best for it: by the median time at 1 client, by answers a second above. Serve has one replica with all cores at
1 client, and above as many replicas as there are cores, one torch thread each (`--replicas`, `--replica-cpus`).

"Of the ceiling" compares with a model that has the machine to itself, "of what is left" with what is left of that when
every answer also takes its way from client to model: 1 / (1 / ceiling + 1 / answers of the no-op).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from _harness import REPOSITORY, Figures, interleave, parse, parser, report
from _load import run as drive
from _model_alone import exams_per_second

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


def serve_command(run: str, port: int, replicas: int, cpus: int) -> list[str]:
    keys = [f"scaling.min_replicas={replicas}", f"scaling.max_replicas={replicas}", f"replica.num_cpus={cpus}"]
    sets = [part for item in keys for part in ("--set", item)]
    return ["-m", "prima_ray.cli", "serve", run, "--port", str(port), *sets]


def ceiling(run: str, body: Path, *, pairs: int, seconds: float) -> tuple[Any, str]:
    """Exams a second of the model alone, in batches of 1 and of 16; and how it is best spread over the cores."""
    cores = os.cpu_count() or 1
    spreads = {"processes": (cores, 1), "torch threads": (1, cores)}

    def at(spread: str, batch: int) -> Figures:
        processes, threads = spreads[spread]
        return exams_per_second(
            run, body, processes=processes, torch_threads=threads, batch=batch, seconds=min(seconds, 5)
        )

    best = max(spreads, key=lambda spread: at(spread, 16)["exams/s"])
    contenders = {f"batches of {batch}": (lambda _, batch=batch: at(best, batch)) for batch in (16, 1)}
    return interleave(contenders, pairs=pairs), best


def answered(url: str, body: Path, *, clients: int, seconds: float) -> Figures:
    """Figures of a load whose every request was answered."""
    found = drive(url, body, clients=clients, seconds=seconds)
    if set(found["statuses"]) != {"200"}:
        raise SystemExit(f"{url}: {found['statuses']}")
    return {key: found[key] for key in ("exams/s", "p50 ms", "p99 ms")}


def best_threads(run: str, body: Path, folder: Path, seconds: float) -> tuple[dict[int, tuple[int, int]], Any]:
    """FastAPI's (threads, torch threads): with the shortest median time at 1 client, with the most answers at 16."""
    cores = os.cpu_count() or 1
    found: dict[tuple[int, int], dict[int, Figures]] = {}
    for threads, torch_threads in ((1, 1), (1, cores), (cores, 1), (2 * cores, 1)):
        with fastapi(run, 18311, (threads, torch_threads), folder) as url:
            drive(url, body, clients=16, seconds=2)
            found[threads, torch_threads] = {
                clients: answered(url, body, clients=clients, seconds=seconds) for clients in (1, 16)
            }
    best = {
        1: min(found, key=lambda key: found[key][1]["p50 ms"]),
        16: max(found, key=lambda key: found[key][16]["exams/s"]),
    }
    tried = [
        {"threads": threads, "torch threads": torch_threads, "p50 ms, 1 client": round(figures[1]["p50 ms"], 1),
         "exams/s, 16 clients": round(figures[16]["exams/s"], 1)}
        for (threads, torch_threads), figures in found.items()
    ]  # fmt: skip
    return best, tried


def fastapi(run: str, port: int, threads: tuple[int, int], folder: Path) -> AbstractContextManager[str]:
    """The peer with (threads, torch threads)."""
    options = ("--threads", str(threads[0]), "--torch-threads", str(threads[1]))
    return server(contender("fastapi", run, port, *options), port, folder / f"fastapi-{port}.log")


def stages(url: str) -> Counter[str]:
    """Of the endpoint's metrics: stage -> the seconds so far, and "count", the answers so far."""
    found: Counter[str] = Counter()
    with urlopen(url.replace("/v1/diagnoses", "/metrics")) as response:  # noqa: S310
        for line in response.read().decode().splitlines():
            if match := re.fullmatch(r'prima_stage_seconds_(sum|count){stage="(\w+)"} (\S+)', line):
                kind, stage, value = match.groups()
                if kind == "sum":
                    found[stage] = float(value)
                elif stage == "total":
                    found["count"] = float(value)
    return found


def where_it_goes(seconds: Counter[str], alone_ms: float) -> dict[str, float]:
    """Mean milliseconds of an answer within the endpoint. "there" ends where the model begins, "back" is what no stage
    accounts for: the way back, and the app.

    Args:
        seconds: see `stages`, of a load by one client: an exam that has company would count its whole batch.
        alone_ms: of an answer of the model in a process that has the machine to itself.
    """
    mean = {stage: 1000 * seconds[stage] / seconds["count"] for stage in seconds}
    model = sum(mean[stage] for stage in ("decode", "encode", "fuse", "check"))
    parts = {
        "reading the body": mean["read"], "there": mean["queue"], "the model": model,
        "back": mean["total"] - mean["read"] - mean["queue"] - model, "the model alone": alone_ms,
    }  # fmt: skip
    return {name: round(value, 2) for name, value in parts.items()}


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
    found.add_argument("--replica-cpus", type=int, default=1, help="torch threads of each (default %(default)s)")
    arguments = parse(found, argv, seconds=1.0)
    pairs, seconds = arguments.pairs, arguments.seconds
    sections: dict[str, dict[str, Any]] = {}
    reached, spent, cores = {}, {}, os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = find_run(arguments.run)
        body = write_body(run, folder)
        measured, spread = ceiling(run, body, pairs=pairs, seconds=seconds)
        most = statistics.median(measured.values["exams/s"]["batches of 16"])
        sections["ceiling of batching"] = {
            "pairs": measured, "ratio": ("exams/s", "batches of 16", "batches of 1"), "one a core": spread
        }  # fmt: skip
        best, tried = best_threads(run, body, folder, seconds)
        for clients in CLIENTS:
            alone = clients == 1
            peer = fastapi(run, 18311, best[1 if alone else 16], folder)
            mine = (1, cores) if alone else (arguments.replicas, arguments.replica_cpus)
            with peer as other, server(serve_command(run, 18312, *mine), 18312, folder / "serve.log") as ours:
                for url in (other, ours):
                    drive(url, body, clients=max(4, clients), seconds=2)
                before = stages(ours)
                measured = versus({"serve": ours, "fastapi": other}, body, clients, pairs=pairs, seconds=seconds)
                spent[clients] = stages(ours) - before
            ratio = ("p50 ms" if alone else "exams/s", "serve", "fastapi")
            reached[clients] = statistics.median(measured.values["exams/s"]["serve"])
            sections[f"{clients} clients"] = {
                "pairs": measured,
                "ratio": ratio,
                "of the ceiling": round(reached[clients] / most, 3),
                "replicas": mine[0],
                "torch threads": mine[1],
            }
        noop = [server(contender(f"noop-{kind}", run, port), port, folder / f"{kind}.log")
                for kind, port in (("fastapi", 18313), ("serve", 18314))]  # fmt: skip
        with noop[0] as one, noop[1] as two:
            for clients in (1, 16):
                measured = versus({"serve": two, "fastapi": one}, body, clients, pairs=pairs, seconds=min(seconds, 3))
                ratio = ("p50 ms" if clients == 1 else "exams/s", "serve", "fastapi")
                sections[f"no-op, {clients} clients"] = {"pairs": measured, "ratio": ratio}
        way = statistics.median(sections["no-op, 16 clients"]["pairs"].values["exams/s"]["serve"])
        for clients in CLIENTS[1:]:
            left = 1 / (1 / most + 1 / way)
            sections[f"{clients} clients"]["of what is left"] = round(reached[clients] / left, 3)
        by_itself = exams_per_second(run, body, processes=1, torch_threads=cores, batch=1, seconds=min(seconds, 5))
        sections["1 clients"]["fastapi"] = tried
        sections["1 clients"]["of an answer, ms"] = where_it_goes(spent[1], 1000 / by_itself["exams/s"])
    report("serve", arguments, sections=sections, argv=argv)


if __name__ == "__main__":
    main()
