"""The page in a real browser: headless Chromium, over a tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prima_ray.serving.engine import Answer, LocalEngine, Question, Unavailable
from prima_ray.serving.keys import KeyRing, add_key
from prima_ray.serving.model import Model
from tests.conftest import jpeg
from tests.endpoint import running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")


class _Engine(LocalEngine):
    """The real model, until it is told to abstain or to be busy."""

    mood = ""

    async def answer(self, question: Question) -> Answer:
        if self.mood == "busy":
            raise Unavailable("too many requests are waiting", reason="queue_full", retry_after_s=2)
        found = await super().answer(question)
        if self.mood == "abstain":
            reason = {"cause": "uncertain", "text": "too uncertain: 41.0%, less than 55.0%"}
            found.fields.update(abstained=True, reasons=[reason])
        return found


@pytest.fixture(scope="module")
def engine(tiny_fuse: Path) -> _Engine:
    return _Engine(Model(str(tiny_fuse)))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "<b>lesion.jpg"
    file.write_bytes(jpeg(np.random.default_rng(3), 90, 70))
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=[1280, 390], ids=["desk", "phone"])
def page(browser: Any, engine: _Engine, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page of this width; whatever its console complains of, and whatever it asks of elsewhere, is a mistake."""
    engine.mood = ""
    wrong: list[str] = []
    with running(engine) as port:
        context = browser.new_context(viewport={"width": request.param, "height": 900})
        found = context.new_page()
        home = f"http://127.0.0.1:{port}/"
        expected = ("503",)
        found.on("console", lambda message: message.type == "error" and not any(
            word in message.text for word in expected) and wrong.append(message.text))  # fmt: skip
        found.on("pageerror", lambda error: wrong.append(str(error)))
        found.on("request", lambda asked: asked.url.startswith((home, "blob:", "data:")) or wrong.append(asked.url))
        found.goto(home)
        found.wait_for_selector("#attribute-age")
        yield found
        context.close()
    assert wrong == []


def fits(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


def test_an_exam_is_answered(page: Any, photo: Path) -> None:
    assert "toy-fuse" in page.inner_text("#model")
    assert "Research software" in page.inner_text(".warning")
    page.set_input_files("#photos", [str(photo), str(photo)])
    assert page.locator("#chosen img").count() == 2
    page.get_by_label("Remove photo 2").click()
    page.select_option("#attribute-itch", "true")
    page.fill("#attribute-age", "61")
    page.click("#ask")
    page.wait_for_selector("#result meter")
    shown = page.inner_text("#result")
    assert page.locator("#result meter").count() == 3
    assert "basal cell carcinoma" in shown
    assert "Prediction set" in shown
    assert "Age" in shown
    assert "61" in shown
    assert fits(page)
    page.click("#clear")
    assert page.locator("#chosen img").count() == 0
    assert not page.is_visible("#result")


def test_it_says_that_the_model_abstains(page: Any, engine: _Engine, photo: Path) -> None:
    engine.mood = "abstain"
    page.set_input_files("#photos", str(photo))
    page.click("#ask")
    page.wait_for_selector(".abstain")
    assert "too uncertain" in page.inner_text(".abstain")
    assert page.inner_text("#result h2") == "No diagnosis to rely on"
    assert fits(page)


def test_it_says_what_is_wrong(page: Any, engine: _Engine, photo: Path) -> None:
    page.click("#ask")
    assert page.inner_text("#result .error") == "Choose at least one photo."
    engine.mood = "busy"
    page.set_input_files("#photos", str(photo))
    page.click("#ask")
    page.wait_for_selector("#result .error >> text=too many")
    assert page.inner_text("#result .error") == "too many requests are waiting Try again in 2 s."
    assert fits(page)


def test_the_keyboard_is_enough(page: Any, photo: Path) -> None:
    page.set_input_files("#photos", str(photo))
    page.focus("#photos")
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
        if seen[-1] == "attribute-itch":
            page.keyboard.press("y")
        if seen[-1] == "ask":
            page.keyboard.press("Enter")
            break
    assert {"attribute-region", "attribute-itch", "attribute-age", "explain", "ask"} <= set(seen)
    page.wait_for_selector("#result meter")
    assert page.evaluate("document.activeElement.id") == "result"
    assert "yes" in page.inner_text("#result dl")


def test_a_key_is_asked_for_where_it_is_needed(browser: Any, engine: _Engine, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "clinic")
    with running(engine, keys=KeyRing(tmp_path / "keys")) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#key")
        assert page.inner_text("#model") == "An API key is needed."
        page.fill("#key", key)
        page.click("#unlock")
        page.wait_for_selector("#attribute-age")
        page.close()
