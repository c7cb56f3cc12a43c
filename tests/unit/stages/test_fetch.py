"""Fetch, against a hub of its own on the loopback: the real client, a few small files."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import timm
import torch
from safetensors.torch import save_file

from prima_ray.base import PrimaError
from prima_ray.cli import main
from prima_ray.models.image_tower import ImageTowerConfig
from prima_ray.models.text_tower import TextTowerConfig
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, resolve_text_model
from prima_ray.stages.fetch import CHECKSUMS, choose_files, run_fetch

REVISION = "0123456789abcdef0123456789abcdef01234567"
OPTIONS = {"depth": 1, "embed_dim": 24, "num_heads": 2}


@dataclass
class Hub:
    """What the fake hub has and was asked."""

    url: str
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    lies: set[str] = field(default_factory=set)
    """Files whose recorded hash is another one."""
    broken: set[str] = field(default_factory=set)
    """Files that the hub fails to send."""
    gated: bool = False
    sent: list[str] = field(default_factory=list)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str], *, send: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if send:
                self.wfile.write(body)

        def respond(self, *, send: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/models/"):
                repo = path.removeprefix("api/models/").partition("/revision/")[0]
                if hub.gated:
                    self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"}, send=send)
                elif repo not in hub.repos:
                    self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, send=send)
                else:
                    body = json.dumps(self.describe(repo)).encode()
                    self.answer(200, body, {"Content-Type": "application/json"}, send=send)
                return
            repo, _, rest = path.partition("/resolve/")
            name = rest.partition("/")[2]
            if name in hub.broken:
                self.answer(403, b"", {}, send=send)
                return
            data = hub.repos[repo][name]
            start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
            if send:
                hub.sent.append(name)
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": REVISION}
            self.answer(206 if start else 200, data[start:], headers, send=send)

        def describe(self, repo: str) -> dict[str, object]:
            siblings = []
            for name, data in hub.repos[repo].items():
                item: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
                if name.endswith(".safetensors"):
                    digest = "f" * 64 if name in hub.lies else hashlib.sha256(data).hexdigest()
                    item["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 134}
                siblings.append(item)
            return {"id": repo, "modelId": repo, "sha": REVISION, "private": False, "tags": [], "siblings": siblings}

        def do_HEAD(self) -> None:
            self.respond(send=False)

        def do_GET(self) -> None:
            self.respond(send=True)

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    found = Hub(url="")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(found))
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    # A token of the user's own has no business here.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def timm_files(tmp_path: Path) -> dict[str, bytes]:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_dinov3", img_size=32, **OPTIONS)
    file = tmp_path / "made.safetensors"
    save_file(model.state_dict(), file)
    return {"model.safetensors": file.read_bytes(), "config.json": b"{}", "README.md": b"words"}


def text_files() -> dict[str, bytes]:
    folder = Path(resolve_text_model(OFFLINE_TEXT_MODEL))
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "1_Pooling/config.json")
    return {
        **{name: (folder / name).read_bytes() for name in names},
        "model.safetensors": b"small",
        "pytorch_model.bin": b"a pickle",
        "modeling_own.py": b"import os",
        "onnx/model.onnx": b"another format",
        "training_args.bin": b"a pickle",
        "README.md": b"words",
        "LICENSE": b"MIT",
    }


def error_of(*names: str, to: Path, verify: bool = False) -> str:
    with pytest.raises(PrimaError) as caught:
        run_fetch(names, to=str(to), verify=verify)
    return str(caught.value)


def test_a_timm_model_by_name_is_what_the_image_tower_reads(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "vit_base_patch16_dinov3.lvd1689m"
    hub.repos[f"timm/{name}"] = timm_files(tmp_path)
    to = tmp_path / "weights"
    # The tag may be left out: it is timm's default.
    assert main(["fetch", "vit_base_patch16_dinov3", "--to", str(to)]) == 0
    assert capsys.readouterr().out == f"run: {to}\n"
    assert {item.name for item in (to / name).iterdir()} == {"model.safetensors", "config.json", CHECKSUMS}
    assert [item.name for item in to.iterdir()] == [name]
    tower = ImageTowerConfig(
        name="vit_base_patch16_dinov3", image_size=32, options=OPTIONS, weights=str(to / name), trainable="lora"
    ).build()
    torch.manual_seed(0)
    made = timm.create_model("vit_base_patch16_dinov3", img_size=32, **OPTIONS)
    assert torch.equal(tower.model.blocks[0].mlp.fc1.base_layer.weight, made.blocks[0].mlp.fc1.weight)


def test_what_is_brought_and_what_is_not(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.repos["owner/text"] = text_files()
    with caplog.at_level("INFO", "prima_ray"):
        assert run_fetch(["owner/text"], to=str(tmp_path)) == 0
    record = json.loads((tmp_path / "owner/text" / CHECKSUMS).read_text())
    wanted = {
        "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "1_Pooling/config.json",
        "model.safetensors", "LICENSE",
    }  # fmt: skip
    assert set(record["files"]) == wanted
    assert (record["source"], record["revision"]) == ("owner/text", REVISION)
    assert record["files"]["LICENSE"] == {"bytes": 3, "sha256": hashlib.sha256(b"MIT").hexdigest()}
    here = {str(item.relative_to(tmp_path / "owner/text")) for item in tmp_path.rglob("*") if item.is_file()}
    assert here == wanted | {CHECKSUMS}
    assert "owner/text/model.safetensors: 0.0 MB" in caplog.messages
    assert caplog.messages[-1].startswith(f"{tmp_path / 'owner/text'}: 7 files, ")


def test_a_finished_model_is_not_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    hub.repos["owner/text"] = text_files()
    run_fetch(["owner/text"], to=str(tmp_path))
    hub.repos.clear()
    hub.sent.clear()
    assert run_fetch(["owner/text"], to=str(tmp_path)) == 0
    assert hub.sent == []


def test_an_interrupted_fetch_looks_unfinished_and_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.repos["owner/text"] = text_files()
    hub.broken.add("tokenizer.json")
    text = error_of("owner/text", to=tmp_path)
    assert text.startswith(f"owner/text: could not be fetched from {hub.url} (")
    assert text.endswith(")\n  Check the network and HF_ENDPOINT; the same command continues where it stopped.")
    assert not (tmp_path / "owner").exists()
    assert error_of("owner/text", to=tmp_path, verify=True) == (
        f"{tmp_path}: text: no checksums.json: it was not fetched, or not to its end\n"
        "  Delete the model's folder and fetch it again."
    )
    hub.broken.clear()
    hub.sent.clear()
    run_fetch(["owner/text"], to=str(tmp_path))
    assert sorted(hub.sent) == ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]


def test_a_file_that_arrives_damaged_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repos["owner/text"] = text_files()
    hub.lies.add("model.safetensors")
    digest = hashlib.sha256(b"small").hexdigest()[:12]
    assert error_of("owner/text", to=tmp_path) == (
        f"owner/text: model.safetensors arrived damaged: its SHA-256 is {digest}, the hub says ffffffffffff\n"
        "  Run the command again."
    )
    assert not (tmp_path / "owner").exists()


def test_models_that_the_hub_does_not_give(hub: Hub, tmp_path: Path) -> None:
    assert error_of("owner/none", to=tmp_path) == "owner/none: no such model on the hub, or it is private"
    hub.repos["owner/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    assert error_of("owner/pickled", to=tmp_path) == (
        f"{hub.url}/owner/pickled: holds no safetensors weights, only pytorch_model.bin\n"
        "  Pickled weights can run code, so they are never brought: choose a model published as safetensors."
    )
    hub.gated = True
    assert error_of("owner/pickled", to=tmp_path) == (
        "owner/pickled: its owner gives it to registered users only\n"
        "  Accept its licence on the hub, and log in with `hf auth login` or HF_TOKEN."
    )


def test_no_network_is_said_in_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert main(["fetch", "owner/text", "--to", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second = printed.err.splitlines()
    assert first.startswith(f"prima: owner/text: could not be fetched from {url} (")
    assert second == "  Check the network and HF_ENDPOINT; the same command continues where it stopped."


def test_a_hub_that_is_switched_off_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert error_of("owner/text", to=tmp_path).startswith("owner/text: could not be fetched from ")


def test_a_local_folder_is_copied(tmp_path: Path) -> None:
    run_fetch([OFFLINE_TEXT_MODEL], to=str(tmp_path / "to"))
    target = tmp_path / "to" / OFFLINE_TEXT_MODEL
    assert TextTowerConfig(path=str(target)).build().pooling == "mean"
    assert not list(target.glob("*.md"))
    shutil.move(target, tmp_path / "mine")
    (tmp_path / "mine" / CHECKSUMS).unlink()
    run_fetch([str(tmp_path / "mine")], to=str(tmp_path / "again"))
    assert (tmp_path / "again" / "mine" / "model.safetensors").exists()


def test_verify_names_whatever_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for name in ("a.safetensors", "config.json", "vocab.txt"):
        (source / name).write_text(name)
    to = tmp_path / "to"
    arguments = ["fetch", str(source), "--to", str(to)]
    assert main(arguments) == 0
    assert main([*arguments, "--verify"]) == 0
    assert capsys.readouterr().out == f"run: {to}\n" * 2
    (to / "model" / "a.safetensors").write_text("other")
    (to / "model" / "config.json").unlink()
    (to / "model" / "extra.json").write_text("{}")
    assert main([*arguments, "--verify"]) == 2
    assert capsys.readouterr().err.endswith(
        f"prima: {to}: model/a.safetensors differs from its checksum; model/config.json is missing; "
        "model/extra.json was not fetched\n  Delete the model's folder and fetch it again.\n"
    )


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "to" / "model"
    source.mkdir()
    target.mkdir(parents=True)
    (source / "a.safetensors").write_text("a")
    assert error_of(str(source), to=tmp_path / "to") == (
        f"{target}: exists without a checksums.json: not brought by `prima fetch`\n  Choose another folder."
    )
    assert list(target.iterdir()) == []


def test_a_sharded_model_is_whole_or_a_mistake(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "model-1.safetensors").write_text("1")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert error_of(str(source), to=tmp_path / "to") == (
        "model.safetensors.index.json: names model-2.safetensors, which is not there"
    )
    (source / "model-2.safetensors").write_text("2")
    assert run_fetch([str(source)], to=str(tmp_path / "to")) == 0


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    hint = "A model of transformers is named owner/name."
    assert error_of("vit_base_patch16_dinov4", to=tmp_path).startswith(
        "timm publishes no weights 'vit_base_patch16_dinov4'\n  Perhaps vit_base_patch16_dinov3, "
    )
    assert error_of("nonsense", to=tmp_path) == f"timm publishes no weights 'nonsense'\n  {hint}"
    assert error_of("vit_base_patch16_dinov3.nope", to=tmp_path).startswith("timm publishes no weights ")
    assert error_of("./nowhere", to=tmp_path) == "./nowhere: no such model folder"


def test_nothing_outside_the_folder_is_chosen() -> None:
    names = ["../a.safetensors", "x/b.safetensors", "c.safetensors", "1_Pooling/config.json", "2_Dense/config.json"]
    assert choose_files(names, where="here") == ["1_Pooling/config.json", "c.safetensors"]
