"""The endpoint on Ray Serve: batches across requests, lost replicas, a full queue, another model under load."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from prima_ray.base import is_loopback
from prima_ray.inference.diagnosis import Diagnoser
from prima_ray.inference.predictor import Exam
from prima_ray.serving import deployments
from prima_ray.serving.app import create_app
from prima_ray.serving.config import ServingConfig
from prima_ray.serving.deployments import ModelReplica
from prima_ray.serving.keys import add_key
from prima_ray.serving.server import build_server, listen
from prima_ray.stages.predict import predict_folder
from prima_ray.stages.serve import Endpoint
from tests.conftest import jpeg
from tests.unit.serving.conftest import text64

CONFIG = ServingConfig.model_validate(
    {
        "replica": {"num_cpus": 0.5, "drain_s": 5},
        "batch": {"max_size": 4},
        "max_queued_requests": 16,
        # A replica that is started again on a busy machine takes its time.
        "request_timeout_s": 240,
    }
)


class Live:
    """An endpoint on the tests' cluster: its own loop in a thread, as `prima serve` has one."""

    proxy = ""
    """Serve's own address."""

    def __init__(self, run: Path) -> None:
        self.link = run
        self.endpoint = Endpoint(str(run), CONFIG)
        self.listening = listen("127.0.0.1", 0)
        self.listening.listen(128)
        self.port = self.listening.getsockname()[1]
        app = create_app(self.endpoint.engine, CONFIG, metrics=self.endpoint.metrics)
        self.server = build_server(app, CONFIG.limits)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.do(self.endpoint.begin(), 120)
        self.serving = asyncio.run_coroutine_threadsafe(self.server.serve(sockets=[self.listening]), self.loop)

    def do(self, work: Any, timeout_s: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def version(self) -> str:
        return str(self.endpoint.engine.served().card.version)

    def stop(self) -> None:
        self.server.should_exit = True
        self.serving.result(60)
        deployments.stop_serve()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)
        self.listening.close()


@pytest.fixture(scope="module")
def live(cluster: None, tiny_fuse: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    link = tmp_path_factory.mktemp("live") / "current"
    link.symlink_to(tiny_fuse)
    from ray import serve

    # As `deployments.start_serve`, and with a proxy, which the gateway of a cluster is behind.
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    found = Live(link)
    found.proxy = f"http://127.0.0.1:{port}"
    yield found
    found.stop()


@pytest.fixture(scope="module")
def body() -> bytes:
    photo = jpeg(np.random.default_rng(5), 80, 60)
    return json.dumps({"images": [text64(photo)], "attributes": {"age": 61, "itch": True}}).encode()


async def ask(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
    return await client.post("/v1/diagnoses", content=body, headers={"content-type": "application/json"})


def client_of(live: Live) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=100)
    return httpx.AsyncClient(base_url=live.url, timeout=300, limits=limits)


@contextmanager
def load(live: Live, body: bytes, clients: int = 4) -> Iterator[Counter[int]]:
    """Clients that ask again and again; what they were answered is complete when the block ends."""
    seen: Counter[int] = Counter()
    over = threading.Event()

    async def one(client: httpx.AsyncClient) -> None:
        while not over.is_set():
            seen[(await ask(client, body)).status_code] += 1

    async def everybody() -> None:
        async with client_of(live) as client:
            await asyncio.gather(*(one(client) for _ in range(clients)))

    thread = threading.Thread(target=lambda: asyncio.run(everybody()))
    thread.start()
    try:
        wait_for(lambda: seen[200] >= clients)
        yield seen
        reached = seen[200]
        # Whatever happened in the block, they are answered afterwards too.
        wait_for(lambda: seen[200] >= reached + clients)
    finally:
        over.set()
        thread.join(300)


def wait_for(reached: Callable[[], bool], limit_s: float = 240) -> None:
    end = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_requests_share_batches_and_get_the_answers_of_one(live: Live, body: bytes, tiny_fuse: Path) -> None:
    async def many() -> list[httpx.Response]:
        async with client_of(live) as client:
            return await asyncio.gather(*(ask(client, body) for _ in range(12)))

    answers = [response.json() for response in asyncio.run(many())]
    photo = jpeg(np.random.default_rng(5), 80, 60)
    wanted = Diagnoser.load(tiny_fuse).diagnose_one(Exam((photo,), {"age": 61, "itch": True}))
    for answer in answers:
        assert answer["probabilities"] == pytest.approx(dict(wanted.probabilities), abs=1e-5)
    assert len({answer["request_id"] for answer in answers}) == 12
    metrics = httpx.get(f"{live.url}/metrics").text
    counted = next(line for line in metrics.splitlines() if line.startswith('prima_batch_size_bucket{le="1.0"}'))
    assert float(counted.split()[-1]) < 12
    assert httpx.get(f"{live.url}/readyz").json()["model"]["version"] == live.version()


def test_shards_through_ray_data_and_requests_get_the_same_answers(
    live: Live, tiny_fuse: Path, labelled_shards: str, tmp_path: Path
) -> None:
    predict_folder(str(tiny_fuse), labelled_shards, tmp_path / "p.parquet")
    batch = {row["exam_id"]: row for row in pq.read_table(tmp_path / "p.parquet").to_pylist()}
    # One photo and two, with and without an age, with and without a label.
    exams = pq.read_table(Path(labelled_shards) / "part-00000.parquet").to_pylist()
    for exam in exams:
        # Shards hold the canonical strings of what is sent as JSON's own kinds.
        given = {name: value if name == "region" else json.loads(value) for name, value in exam["attributes"]}
        sent = {"images": [text64(photo["bytes"]) for photo in exam["images"]], "attributes": given}
        answer = httpx.post(f"{live.url}/v1/diagnoses", json=sent, timeout=120).json()
        row = batch[exam["exam_id"]]
        assert answer["prediction"] == row["prediction"]
        assert answer["probabilities"] == pytest.approx({c: row[f"prob_{c}"] for c in ("BCC", "NEV", "SEK")}, abs=1e-5)


def test_what_goes_far_past_the_queue_is_503_and_the_rest_is_answered(live: Live, body: bytes) -> None:
    async def many() -> list[httpx.Response]:
        async with client_of(live) as client:
            return await asyncio.gather(*(ask(client, body) for _ in range(100)))

    seen = Counter(response.status_code for response in asyncio.run(many()))
    assert set(seen) <= {200, 503}
    assert seen[200] >= 8


def test_a_replica_that_is_killed_costs_no_request(live: Live, body: bytes) -> None:
    import ray

    with load(live, body) as seen:
        victims = [
            actor
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["namespace"] == "serve" and "#Model#" in actor["name"]
        ]
        assert victims
        ray.kill(ray.get_actor(victims[0]["name"], namespace="serve"), no_restart=False)
    assert set(seen) == {200}


def test_another_model_goes_live_under_load_and_a_broken_one_does_not(
    live: Live, body: bytes, tiny_fuse: Path, tmp_path: Path
) -> None:
    first = live.version()
    broken, better = tmp_path / "broken", tmp_path / "better"
    shutil.copytree(tiny_fuse, broken)
    weights = broken / "model" / "fusion" / "model.safetensors"
    save_file({name: torch.randn_like(value) for name, value in load_file(weights).items()}, weights)
    # A model folder without its run: it is believed, and has a version of its own.
    shutil.copytree(tiny_fuse / "model", better / "model")
    config = better / "model" / "config.json"
    config.write_text(config.read_text().replace('"title": ""', '"title": "Another"'))

    def point(to: Path) -> None:
        live.link.unlink()
        live.link.symlink_to(to)

    with load(live, body) as seen:
        hangup = asyncio.Event()
        watcher = asyncio.run_coroutine_threadsafe(live.endpoint.switch_at(hangup), live.loop)
        try:
            point(broken)
            live.loop.call_soon_threadsafe(hangup.set)
            wait_for(lambda: 'prima_switches_total{outcome="refused"} 1.0' in httpx.get(f"{live.url}/metrics").text)
            assert live.version() == first
            point(better)
            live.loop.call_soon_threadsafe(hangup.set)
            wait_for(lambda: 'prima_switches_total{outcome="done"} 1.0' in httpx.get(f"{live.url}/metrics").text)
            assert live.version() != first
        finally:
            watcher.cancel()
    assert set(seen) == {200}
    assert httpx.get(f"{live.url}/v1/schema").json()["title"] == "Another"


def test_the_gateway_of_a_cluster_asks_the_model_that_it_is_told(live: Live, body: bytes, tmp_path: Path) -> None:
    from ray import serve

    key = add_key(tmp_path / "keys", "clinic")
    settings = {"rate": {"per_minute": 1, "burst": 2}, "request_timeout_s": 60}
    arguments = {"api_keys": str(tmp_path / "keys"), "model": live.endpoint.app, **settings}
    serve.run(deployments.build_gateway(arguments), name="gateway", route_prefix="/clinic")
    with httpx.Client(base_url=f"{live.proxy}/clinic", timeout=90) as client:
        assert client.get("/v1/schema").status_code == 401
        client.headers["authorization"] = f"Bearer {key}"
        assert client.get("/readyz").json()["model"]["version"] == live.version()
        asked = [
            client.post("/v1/diagnoses", content=body, headers={"content-type": "application/json"}) for _ in "123"
        ]
    assert [item.status_code for item in asked] == [200, 200, 429]
    assert asked[0].json()["model"]["version"] == live.version()
    assert int(asked[2].headers["retry-after"]) >= 1
    serve.delete("gateway")


@pytest.mark.parametrize(
    "build",
    [lambda keys: deployments.Limiter(CONFIG.rate), lambda keys: deployments.Gateway(CONFIG, keys, None)],
    ids=["limiter", "gateway"],
)
def test_on_a_cluster_that_keeps_to_loopback_replicas_do(
    build: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve._private import replica

    bound: list[str] = []
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, address: bound.append(address))
    monkeypatch.setattr(deployments, "lines_to_stderr", lambda: None)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    add_key(tmp_path / "keys", "clinic")
    build(str(tmp_path / "keys"))
    replica.add_port_to_grpc_server(None, "[::]:0")
    assert bound == ["127.0.0.1:0"]


def test_a_replica_that_hangs_says_so(cluster: None, tiny_fuse: Path) -> None:
    replica = ModelReplica(str(tiny_fuse), CONFIG)
    asyncio.run(replica.check_health())
    replica._began = time.monotonic() - CONFIG.replica.hang_s - 1
    with pytest.raises(RuntimeError, match=r"a batch has been under way for more than 60 s"):
        asyncio.run(replica.check_health())


def test_prima_serve_answers_on_loopback_alone_and_drains(tiny_fuse: Path, body: bytes, tmp_path: Path) -> None:
    prima = str(Path(sys.executable).with_name("prima"))
    command = [prima, "serve", str(tiny_fuse), "--port", "0", "--set", "replica.num_cpus=0.5"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        said = tmp_path / "log"
        wait_for(lambda: "http://" in said.read_text() or process.poll() is not None, 180)
        url = re.findall(r"http://\S+/", said.read_text())[0]
        request = urllib.request.Request(f"{url}v1/diagnoses", body, {"content-type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            assert json.load(response)["model"]["name"] == "toy-fuse"
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        open_ports = [item for item in psutil.net_connections("tcp") if item.status == "LISTEN" and item.pid in family]
        assert open_ports
        assert all(is_loopback(item.laddr.ip.removeprefix("::ffff:")) for item in open_ports)
    finally:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, f"run: {tiny_fuse}\n"), said.read_text()[-2000:]
