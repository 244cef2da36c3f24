"""Tests for the page of a replay: its content, and its use in a browser."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from knowledge_boosting.device_client.replay.hint_log import HintLog
from knowledge_boosting.device_client.replay.page import DelayCurve, HintFigures, Page, Track, write_page
from knowledge_boosting.models.config import FixedDelay, NetworkSize, Pair
from tests.processes import refusal_here, run

RATE, SECONDS = 16000, 3
TITLE = "a <b>&\"'</b></script>.wav"
Samples = NDArray[np.float32]


def tone(frequency: float, level: float) -> Samples:
    """Return a tone ``[2, N]`` of 3 s."""
    times = np.arange(RATE * SECONDS) / RATE
    return (level * np.stack([np.sin(2 * np.pi * frequency * times)] * 2)).astype(np.float32)


def hint_figures() -> HintFigures:
    size = NetworkSize(channels=4, hidden=4, blocks=1)
    model = Pair(task="ss", small=size, large=size, boosting=FixedDelay(delay=6))
    log = HintLog(RATE * SECONDS // 128, 6)
    log.captured_at[:] = np.arange(len(log.used)) * 8_000_000
    log.arrived_at[:] = log.captured_at + 30_000_000
    log.used[:-6] = True
    log.used[10:20] = False
    log.arrived_at[10:15] = -1
    return HintFigures(log, int(log.captured_at[-1]), model)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    tracks = [
        Track("Mixture", [tone(100, 0.5)]),
        Track("Small network with hints", [tone(200, 0.01), tone(300, 0.3)], 7.25),
        Track("Reference", [tone(400, 0.9), tone(500, 0.0)]),
    ]
    settings = {"Network": "48 ms <round> trip", "Bundle": "x"}
    curve = DelayCurve({8: 7.5, 48: 7.25, 200: 3.14}, {"Without hints": 3.0})
    write_page(path, Page(TITLE, tracks, RATE, hint_figures(), settings, notice="random weights", curve=curve))
    return path


def test_the_page_holds_every_sound_at_the_same_loudness(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="sounds">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    tracks = json.loads(found[1])
    assert [len(voices) for voices in tracks] == [1, 2, 2]
    sounds = [soundfile.read(io.BytesIO(base64.b64decode(voice)))[0] for voices in tracks for voice in voices]
    levels = [20 * np.log10(np.sqrt(np.mean(np.square(sound))) + 1e-9) for sound in sounds]
    assert levels[:4] == pytest.approx([-23] * 4, abs=0.05)
    assert levels[4] < -170  # silence stays silence
    for sound, frequency in zip(sounds, (100, 200, 300, 400), strict=False):
        assert sound.shape == (RATE * SECONDS, 2)
        assert np.abs(np.fft.rfft(sound[:, 0])).argmax() == frequency * SECONDS


def test_the_page_needs_nothing_else_and_shows_every_text_literally(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|https?:|url\(""", text)
    assert text.count("</script>") == 2
    assert "a &lt;b&gt;&amp;&#34;&#39;&lt;/b&gt;&lt;/script&gt;.wav" in text
    assert "48 ms &lt;round&gt; trip" in text
    assert "random weights" in text
    assert "+7.2 dB SI-SDRi" in text
    assert "+7.5 at 8 ms, +7.2 at 48 ms, +3.1 at 200 ms" in text
    assert "Without hints +3.0 dB" in text
    counts = [int(value) for value in re.findall(r"</i>(\d+) (?:on time|late|missing)", text)]
    assert counts == [len(hint_figures().log.used) - 6 - 10, 5, 5]


def test_hints_without_a_delay_that_never_came_are_counted(tmp_path: Path) -> None:
    hints = hint_figures()
    model = hints.model.model_copy(update={"boosting": FixedDelay(delay=0)})
    hints.log.arrived_at[:] = -1
    hints.log.used[:] = False
    page = Page("x", [Track("Mixture", [tone(100, 0.5)])], RATE, replace(hints, model=model), {}, notice=None)
    write_page(tmp_path / "page.HTML", page)
    text = (tmp_path / "page.HTML").read_text(encoding="utf-8")
    counts = [int(value) for value in re.findall(r"</i>(\d+) (?:on time|late|missing)", text)]
    assert sum(counts) == counts[2] > 300
    assert not re.search(r"\bnan\b|\binf\b", text.split('id="sounds"')[0], re.IGNORECASE)


def test_a_replay_writes_a_page_with_and_without_references(
    golden_bundle: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = golden_bundle("ss_delay6_compression2")
    rng = np.random.default_rng(0)
    sources = rng.normal(0, 0.05, (2, RATE, 2)).astype(np.float32)
    for name, samples in (("1", sources[0]), ("2", sources[1]), ("mixture", sources.sum(0))):
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE, subtype="FLOAT")
    call = [tmp_path / "mixture.wav", "-o", tmp_path / "out.wav", "--bundle", bundle, "--page", tmp_path / "page.html"]
    for references, names in (
        ([], ["Mixture", "Small network with hints", "Large network"]),
        (
            ["--reference", tmp_path / "1.wav", "--reference", tmp_path / "2.wav"],
            ["Mixture", "Small network with hints", "Large network", "Reference: the true voices"],
        ),
    ):
        result = run("kb-client", "replay", *call, "--with-large", *references)
        assert result.returncode == 0, result.stderr
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert re.findall(r'<span class="name">(.*?)</span>', text) == names
        assert (" dB SI-SDRi</span>" in text) == bool(references)
    for page, expected in (("page.txt", "must end in .html"), ("out-speaker1.wav", "two outputs have this name")):
        call[-1] = tmp_path / page
        assert expected in refusal_here("kb-client", capsys, "replay", *call)
    soundfile.write(tmp_path / "mixture.wav", np.zeros((121 * 8000, 2)), 8000)
    call[-1] = tmp_path / "long.html"
    assert "a page has at most 120 s" in refusal_here("kb-client", capsys, "replay", *call)
    assert not (tmp_path / "long.html").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_in_a_browser(page: Path, browser: Any, size: tuple[int, int], scheme: str, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    tab, requests, faults = context.new_page(), [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda message: faults.append(message.text))
    tab.goto(page.as_uri())
    play = tab.get_by_role("button", name="Play")
    play.wait_for()
    position = tab.get_by_role("slider", name="Position in seconds")

    def seconds() -> float:
        return float(position.input_value())

    def wait_until(at: float) -> None:
        tab.wait_for_function("at => Number(document.getElementById('seek').value) >= at", arg=at)

    play.click()
    wait_until(0.3)
    for key, name in (("2", "Small network with hints"), ("3", "Reference"), ("1", "Mixture")):
        before = seconds()
        tab.keyboard.press(key)
        assert name in tab.get_by_role("button", pressed=True).inner_text()
        assert tab.get_by_role("status").inner_text() == name
        wait_until(before + 0.1)  # the sound goes on
    tab.get_by_role("button", name="Small network with hints").click()
    tab.get_by_role("radio", name="2").check()
    assert tab.get_by_role("img", name="Spectrogram of Small network with hints, speaker 2").is_visible()
    assert not tab.get_by_role("img", name="Spectrogram of Small network with hints, speaker 1").is_visible()
    tab.keyboard.press("Escape")
    tab.get_by_role("button", name="Pause").click()
    stopped = seconds()
    tab.keyboard.press("ArrowLeft")
    assert seconds() == pytest.approx(max(stopped - 1, 0), abs=0.05)
    tab.keyboard.press(" ")
    tab.get_by_role("button", name="Pause").wait_for()
    wait_until(SECONDS)  # to the end
    tab.get_by_role("button", name="Play").wait_for()

    unnamed = tab.evaluate(
        """() => [...document.querySelectorAll("button, input")].filter(
            each => !(each.getAttribute("aria-label") || each.textContent.trim() || each.closest("label"))).length"""
    )
    assert unnamed == 0
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not faults
    assert requests == [page.as_uri()]
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    context.close()
