"""The files that bring the endpoint to a cluster are what Serve, Grafana and the endpoint itself understand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prima_ray.base import PrimaError
from prima_ray.cli import main
from prima_ray.config import load_config
from prima_ray.serving.config import ServingConfig
from prima_ray.serving.metrics import Metrics

FOLDER = Path(__file__).parents[3] / "serve_configs"
SERVICE = FOLDER.parent / "kubernetes" / "rayservice.yaml"
KINDS = {"build_model": {"run"}, "build_gateway": {"api_keys"}}


def deployed() -> dict[str, Any]:
    found = {
        name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("small", "autoscaled", "two_models")
    }
    service = yaml.safe_load(SERVICE.read_text())
    return {**found, "rayservice": yaml.safe_load(service["spec"]["serveConfigV2"])}


@pytest.mark.parametrize("name", ["small", "autoscaled", "two_models", "rayservice"])
def test_serve_takes_the_file_and_every_gateway_asks_a_model_of_it(name: str) -> None:
    schema = pytest.importorskip("ray.serve.schema")
    raw = deployed()[name]
    schema.ServeDeploySchema.model_validate(raw)
    models = {item["name"] for item in raw["applications"] if item["import_path"].endswith(":build_model")}
    for item in raw["applications"]:
        module, kind = item["import_path"].split(":")
        assert module == "prima_ray.serving.deployments"
        settings = {key: value for key, value in item["args"].items() if key not in KINDS[kind]}
        ServingConfig.model_validate(settings)
        assert KINDS[kind] <= set(item["args"])
        assert (item["route_prefix"] is None) == (kind == "build_model")
        if kind == "build_gateway":
            (gateway,) = item["deployments"]
            assert gateway["user_config"]["model"] in models
    # Above the endpoint's own time-out, which says what happened.
    assert raw["http_options"]["request_timeout_s"] > ServingConfig().request_timeout_s
    assert raw["logging_config"]["enable_access_log"] is False


def test_the_demos_profile_is_one_of_prima_serve() -> None:
    config = load_config(ServingConfig, FOLDER / "demo.yaml")
    assert config.scaling.max_replicas > config.scaling.min_replicas
    assert config.scaling.upscale_delay_s + config.scaling.look_back_s < 5


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    text = (FOLDER / "grafana_dashboard.json").read_text()
    names = set(re.findall(r"prima_[a-z_]+", " ".join(
        target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]
    )))  # fmt: skip
    known = set(re.findall(r"^# TYPE (prima_\w+)", Metrics().text().decode(), flags=re.MULTILINE))
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert bare <= known
    # Creation times are noise, the rest is shown.
    assert {name for name in known if not name.endswith("_created")} - bare == set()


def test_mistakes_before_anything_is_started(
    tiny_fuse: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert main(["serve", *arguments]) == 2
        return capfd.readouterr().err.removeprefix("prima: ").rstrip("\n")

    run = str(tiny_fuse)
    for host in ("0.0.0.0", "::", "example.org"):  # noqa: S104
        assert said(run, "--host", host) == (
            f"{host}: this address can be reached from other machines: --api-keys FILE is needed\n"
            "  `prima keys FILE --add NAME` makes a file with a key; 127.0.0.1 needs none."
        )
    assert said(run, "--host", "0.0.0.0", "--api-keys", str(tmp_path / "none")).endswith(  # noqa: S104
        "none: no such file of API keys\n  `prima keys FILE --add NAME` makes it with its first key."
    )
    assert said(str(tmp_path), "--port", "0") == (
        f"{tmp_path}: no model here\n  Name the run directory of `prima fuse` or `prima finetune`."
    )
    assert "unknown key" in said(run, "--set", "limits.max_pixel=3").lower()
    with pytest.raises(PrimaError, match="is above max_replicas"):
        load_config(ServingConfig, None, ["scaling.min_replicas=3"])
