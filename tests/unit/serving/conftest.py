"""A real tiny model behind the app, in this process."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from prima_ray.serving.app import create_app
from prima_ray.serving.config import ServingConfig
from prima_ray.serving.engine import LocalEngine
from prima_ray.serving.model import Model
from tests.conftest import jpeg

HERE = "http://127.0.0.1"


@pytest.fixture(scope="session")
def model(tiny_fuse: Path) -> Model:
    return Model(str(tiny_fuse))


@pytest.fixture(scope="session")
def photo() -> bytes:
    import numpy as np

    return jpeg(np.random.default_rng(1), 60, 50)


@pytest.fixture
def serve(model: Model) -> Callable[..., TestClient]:
    """A client of an app of one's own; keywords of `create_app`, and keys of `ServingConfig` in `settings`."""

    def make(engine: Any = None, settings: dict[str, Any] | None = None, **options: Any) -> TestClient:
        config = ServingConfig.model_validate(settings or {})
        return TestClient(create_app(engine or LocalEngine(model), config, **options), base_url=HERE)

    return make


@pytest.fixture
def client(serve: Callable[..., TestClient]) -> TestClient:
    return serve()


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()
