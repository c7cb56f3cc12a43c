"""What happens to requests when something goes wrong under load, and how replicas follow the load. One machine.

Faults, a row each: requests sent, answered, refused (429, 503), failed (anything else, and no answer at all). Then a
load that comes and falls to a single client, who goes on asking while a replica is taken away, with the number of
replicas beside it. Then the memory of the server's processes over many requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
from _harness import REPOSITORY, circumstances
from _load import drive
from serve import find_run, server, write_body

from prima_ray.base import write_json

PORT = 18321
PROFILE = REPOSITORY / "serve_configs" / "demo.yaml"
MANY, ONE = "12 clients", "1 client"


class Load(threading.Thread):
    """Clients in the background; `found` is there when it has been joined."""

    def __init__(
        self, url: str, body: Path, *, clients: int, seconds: float, enough: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__()
        asked = body.read_bytes()
        self._call = lambda: asyncio.run(drive(url, asked, clients=clients, seconds=seconds, enough=enough))
        self.found: dict[str, Any] = {}

    def run(self) -> None:
        self.found = self._call()


def family() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def replicas() -> list[psutil.Process]:
    """Processes of the model's replicas below this one."""
    found = []
    for child in family():
        try:
            if child.name().startswith("ray::ServeRepli"):
                found.append(child)
        except psutil.Error:
            continue
    return found


def row(found: dict[str, Any]) -> dict[str, float]:
    seen = Counter({int(key): value for key, value in found["statuses"].items()})
    refused = seen[429] + seen[503]
    total = sum(seen.values())
    return {"sent": total, "200": seen[200], "refused": refused, "failed": total - seen[200] - refused,
            "p99 ms": round(found["p99 ms"], 1)}  # fmt: skip


def settle(url: str) -> None:
    """Until the known exam is answered: what replaced a lost replica may still be starting."""
    for _ in range(180):
        with contextlib.suppress(OSError), urlopen(url.replace("/v1/diagnoses", "/readyz"), timeout=30) as response:  # noqa: S310
            if response.status == 200:
                return
        time.sleep(1)
    raise SystemExit(f"{url}: not ready again")


def fault(url: str, body: Path, seconds: float, happens: Callable[[], None], *, clients: int = 4) -> dict[str, float]:
    """A load of so many seconds, and after a fifth of it what happens."""
    settle(url)
    load = Load(url, body, clients=clients, seconds=seconds)
    load.start()
    time.sleep(seconds / 5)
    happens()
    load.join()
    return row(load.found)


def kill_one() -> None:
    replicas()[0].kill()


def stop_one() -> None:
    """It lives, and does nothing: as good as hung."""
    os.kill(replicas()[0].pid, signal.SIGSTOP)


def follow(url: str, body: Path, seconds: float, watched: Path) -> dict[str, Any]:
    """No load, many clients, then one, who goes on until the replicas are back at one (90 s at most): replicas by time,
    what was answered to either, and how long after the load had changed Serve's target did (``watched``)."""
    began, samples, over = time.monotonic(), [], threading.Event()
    started = time.time()

    def now() -> float:
        return round(time.monotonic() - began, 1)

    def watch() -> None:
        while not over.is_set():
            samples.append((now(), len(replicas())))
            over.wait(0.5)

    def back() -> bool:
        """At one for ten seconds: what was asked for under the load may still be coming."""
        recent = [count for at, count in samples if at >= now() - 10]
        return now() - since >= 10 and max(recent, default=2) == 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    found: dict[str, Any] = {}
    answers: list[tuple[float, float, int]] = []
    time.sleep(3)
    for name, clients, limit_s, enough in ((MANY, 12, seconds, lambda: False), (ONE, 1, 90.0, back)):
        since = now()
        load = Load(url, body, clients=clients, seconds=limit_s, enough=enough)
        load.start()
        load.join()
        found[name] = {**row(load.found), "from s": since, "to s": now()}
        answers += [(since + ended, took, status) for ended, took, status in load.found["trace"]]
    over.set()
    watcher.join()
    changes = [(float(at) - started, int(count)) for at, count in map(str.split, watched.read_text().splitlines())]
    for name, wanted in ((MANY, 2), (ONE, 1)):
        since = found[name]["from s"]
        found[name]["target changed after s"] = next(
            (round(at - since, 1) for at, count in changes if at >= since and count == wanted), None
        )
    return {**found, "replicas by s": samples, "target by s": _steps(changes, now()), "p50 ms by s": by_second(answers)}


def _steps(changes: Sequence[tuple[float, int]], end: float) -> list[tuple[float, int]]:
    """Changes from the beginning, second 0, to the end."""
    before = [count for at, count in changes if at <= 0]
    after = [(round(at, 1), count) for at, count in changes if at > 0]
    return [(0.0, before[-1]), *after, (end, after[-1][1] if after else before[-1])]


def by_second(answers: Sequence[tuple[float, float, int]]) -> list[tuple[int, float]]:
    """The median time of what was answered in each second."""
    seconds: dict[int, list[float]] = {}
    for ended, took, status in answers:
        if status == 200:
            seconds.setdefault(int(ended), []).append(1000 * took)
    return [(second, round(statistics.median(times), 1)) for second, times in sorted(seconds.items())]


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, figsize=(7, 3.8), layout="constrained", sharex=True)
    for key, colour, label in (("replicas by s", "#1a5f8a", "processes"), ("target by s", "#b3432b", "target")):
        times, counts = zip(*found[key], strict=True)
        above.step(times, counts, where="post", color=colour, label=label)
    above.set(ylabel="replicas", yticks=range(max(counts) + 2))
    above.legend(loc="upper right")
    seconds, medians = zip(*found["p50 ms by s"], strict=True)
    below.step(seconds, medians, where="post", color="#1a5f8a")
    below.set(xlabel="seconds", ylabel="median time, ms", ylim=(0, None))
    for axes in (above, below):
        for name, colour in ((MANY, "#f0a202"), (ONE, "#7a9e3f")):
            axes.axvspan(found[name]["from s"], found[name]["to s"], color=colour, alpha=0.2, label=name)
    answered, refused, failed = (found[MANY][key] + found[ONE][key] for key in ("200", "refused", "failed"))
    above.set_title(f"{answered} answered, {refused} refused, {failed} failed", fontsize=10)
    below.legend(loc="upper right")
    figure.savefig(path)


def memory(url: str, body: Path, requests: int) -> dict[str, Any]:
    """Resident MiB of the server and its replicas, at the start and after each tenth."""

    def now() -> float:
        named = [item for item in family() if item.is_running()]
        wanted = ("ray::ServeRepli", "prima", "python")
        return sum(item.memory_info().rss for item in named if item.name().startswith(wanted)) / 2**20

    samples, sent = [round(now(), 1)], 0
    while sent < requests:
        target = sent + requests // 10
        while sent < target:
            found = asyncio.run(drive(url, body.read_bytes(), clients=16, seconds=2))
            sent += sum(found["statuses"].values())
        samples.append(round(now(), 1))
    return {"requests": sent, "MiB by tenths": samples}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run of fuse; default: the small preset's, else the demo's")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a fault's load (default %(default)s)")
    parser.add_argument("--requests", type=int, default=10_000, help="for the memory; 0: not measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    given = parser.parse_args(argv)
    written: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = find_run(given.run)
        body = write_body(run, folder)
        common = ["-m", "prima_ray.cli", "serve", run, "--port", str(PORT)]
        quick = ["--set", "replica.health_period_s=2", "--set", "replica.health_timeout_s=4"]
        with server([*common, *quick, "--set", "request_timeout_s=60"], PORT, folder / "log") as url:
            faults = {
                "one replica of one is killed": fault(url, body, given.seconds, kill_one),
                "one replica of one hangs (SIGSTOP)": fault(url, body, 2 * given.seconds, stop_one),
                "a burst of 400 clients": fault(url, body, given.seconds / 3, lambda: None, clients=400),
            }
            for name, found in faults.items():
                print(f"{name}: {found}", flush=True)
            written["faults"] = faults
            if given.requests:
                written["memory"] = memory(url, body, given.requests)
                print(f"memory: {written['memory']}", flush=True)
        watched = folder / "target"
        command = [str(Path(__file__).with_name("_serve_watched.py")), str(watched), *common[3:]]
        with server([*command, "--config", str(PROFILE)], PORT, folder / "log") as url:
            written["autoscaling"] = follow(url, body, given.seconds, watched)
            print(f"autoscaling: {written['autoscaling']}", flush=True)
    plot(written["autoscaling"], given.out / "serve_autoscaling.png")
    head = {"benchmark": "serve_faults", **circumstances("serve_faults", argv)}
    write_json(given.out / "serve_faults.json", {**head, **written})
    print("written: serve_faults.json", file=sys.stderr)


if __name__ == "__main__":
    main()
