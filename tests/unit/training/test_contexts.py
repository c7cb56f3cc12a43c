"""What a person sees of long work."""

from __future__ import annotations

import re
import time

import pytest

from prima_ray.training.contexts import LocalContext, _LineBar, counting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_workers_progress_is_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]):
    bar = _LineBar(100, 10, "align", "step", every_s=10)
    for second in range(1, 26):
        clock[0] = 100.0 + second
        bar.update(loss=1 / second)
    for _ in range(65):
        bar.update(loss=0.5)
    assert capsys.readouterr() == (
        "",
        "align: step 11/100, loss 1.0000\n"
        "align: step 21/100, loss 0.0909, 79 s left\n"
        "align: step 31/100, loss 0.0476, 69 s left\n"
        "align: step 100/100, loss 0.5000, 0 s left\n",
    )


def test_counting_shows_nothing_where_there_is_nothing_to_do(capsys: pytest.CaptureFixture[str]):
    with counting(LocalContext("cpu"), "features"):
        pass
    assert capsys.readouterr().err == ""
    with counting(LocalContext("cpu"), "features") as done:
        done(3, 8)
        done(5, 8)
    assert re.search(r"features: 100%\S* 8/8 \[.*exam/s\]\s*$", capsys.readouterr().err)
