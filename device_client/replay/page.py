"""The page of a replay: one HTML file in which all systems can be heard and compared, without network and server.

All tracks play at the same time, and all but one are silent. So a listener can switch in the middle of a word.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import soundfile
from matplotlib.image import imsave
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.device_client.hints.buffer import hint_words
from knowledge_boosting.device_client.replay.hint_log import HintLog
from knowledge_boosting.device_client.replay.loudness import at_loudness, common_loudness
from knowledge_boosting.device_client.replay.plot import Spectrogram
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.protos.codec import Samples

MAX_SECONDS = 120.0  # every track is a part of the page
_RANGE_DB = 80.0  # of the colours below the highest level
_MAX_POINTS = 4000  # of the plot of the hints


@dataclass(frozen=True)
class Track:
    """One system on the page."""

    name: str
    voices: Sequence[Samples]  # [M, N] each: one for every speaker, or a single one
    gain_db: float | None = None  # SI-SDRi


@dataclass(frozen=True)
class HintFigures:
    """The hints of the run."""

    log: HintLog
    ended_at: int  # stream time, ns
    model: ModelConfig


@dataclass(frozen=True)
class DelayCurve:
    """SI-SDRi in dB with the same hints at other delays, beside that of systems that do not depend on the delay."""

    gains: Mapping[float, float]  # by delay, ms
    levels: Mapping[str, float]  # by name of the system


@dataclass(frozen=True)
class Page:
    """The content of a page."""

    title: str
    tracks: Sequence[Track]
    rate: int  # Hz
    hints: HintFigures | None
    settings: Mapping[str, str]
    notice: str | None
    curve: DelayCurve | None = None


def check_page(path: Path, seconds: float) -> None:
    """Check that a page can be made of a recording.

    Raises:
        InputError: The name of the page does not end in .html, or the recording is too long.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path}: the name of a page must end in .html")
    if seconds > MAX_SECONDS:
        text = f"a page has at most {MAX_SECONDS:g} s of sound, and the recording has {seconds:.0f} s"
        raise InputError(f"{path}: {text}; give a part of the recording, or leave out --page")


def write_page(path: Path, page: Page) -> None:
    """Write the page. After an error there is no file.

    Raises:
        InputError: The file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    pictures = _Pictures(page)
    loudness = common_loudness(voice for track in page.tracks for voice in track.voices)
    voices = max(len(track.voices) for track in page.tracks)
    seconds = page.tracks[0].voices[0].shape[-1] / page.rate
    tracks = [
        {
            "name": track.name,
            "gain": None if track.gain_db is None else f"{track.gain_db:+.1f} dB",
            "pictures": [pictures.of(voice) for voice in track.voices],
            "sounds": [_sound(at_loudness(voice, loudness), page.rate) for voice in track.voices],
        }
        for track in page.tracks
    ]
    html = environment.get_template("page.html.jinja").render(
        title=page.title,
        notice=page.notice,
        settings=page.settings,
        seconds=seconds,
        voices=voices,
        tracks=tracks,
        hints=None if page.hints is None else _hint_plot(page.hints, seconds),
        curve=None if page.curve is None else _delay_plot(page.curve),
    )
    with atomic_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _sound(samples: Samples, rate: int) -> str:
    """Return samples ``[M, N]`` as FLAC in base64."""
    file = io.BytesIO()
    soundfile.write(file, samples.T, rate, format="FLAC", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode()


class _Pictures:
    """Draws spectrograms with one colour scale."""

    def __init__(self, page: Page) -> None:
        self._rate = page.rate
        self._top = max(float(self._levels(voice).max()) for track in page.tracks for voice in track.voices)

    def of(self, samples: Samples) -> str:
        """Return the spectrogram of the left channel as JPEG in base64."""
        levels = self._levels(samples)
        file = io.BytesIO()
        imsave(
            file,
            levels[::-1],
            vmin=self._top - _RANGE_DB,
            vmax=self._top,
            cmap="magma",
            format="jpeg",
            pil_kwargs={"quality": 85},
        )
        return base64.b64encode(file.getvalue()).decode()

    def _levels(self, samples: Samples) -> NDArray[np.float32]:
        spectrogram = Spectrogram(self._rate, samples.shape[-1])
        spectrogram.add(samples[0])
        return spectrogram.levels()[0]


def _hint_plot(figures: HintFigures, seconds: float) -> dict[str, Any]:
    """Return the points of the plot of the hints in a square of 100 by 100, with the age from the bottom up."""
    log, model = figures.log, figures.model
    ages = log.ages_ms(figures.ended_at)
    used, unused, missing = (np.flatnonzero(flags) for flags in log.classify(figures.ended_at))
    shown_ages = ages[~np.isnan(ages)]
    # Hints without delay that all went missing have no age at all.
    top = 1.25 * max(model.max_age_ms, float(np.percentile(shown_ages, 99)) if shown_ages.size else 0.0) or 1.0
    words = hint_words(on_arrival=model.on_arrival)

    def points(frames: NDArray[np.intp]) -> list[tuple[float, float]]:
        chosen = frames[:: max(1, -(-len(frames) // _MAX_POINTS))]
        at = log.captured_at[chosen] / 1e9 / seconds * 100
        height = np.nan_to_num(np.minimum(ages[chosen], top)) / top * 100
        return list(zip(np.round(at, 3).tolist(), np.round(100 - height, 2).tolist(), strict=True))

    return {
        "groups": [
            {"word": word, "kind": kind, "count": len(frames), "points": points(frames)}
            for word, kind, frames in (
                (words[0], "used", used),
                (words[1], "unused", unused),
                ("missing", "missing", missing),
            )
        ],
        "top_ms": round(top),
        "deadline_ms": model.max_age_ms,
        "deadline_at": round(100 - model.max_age_ms / top * 100, 2),
    }


def _delay_plot(curve: DelayCurve) -> dict[str, Any]:
    """Return the points of the curve in a plot of 600 by 160, with one step for each delay."""
    gains = list(curve.gains.values())
    low, high = min(*gains, *curve.levels.values()), max(*gains, *curve.levels.values())
    margin = 0.15 * (high - low) or 1.0

    def height(gain: float) -> float:
        return round(160 - 160 * (gain - low + margin) / (high - low + 2 * margin), 1)

    step = 600 / len(curve.gains)
    return {
        "points": [
            {"x": round((index + 0.5) * step, 1), "y": height(gain), "delay": f"{delay:g}", "gain": f"{gain:+.1f}"}
            for index, (delay, gain) in enumerate(curve.gains.items())
        ],
        "levels": [
            # The name stands at the end that is farther from the curve.
            {
                "name": name,
                "gain": f"{gain:+.1f}",
                "y": height(gain),
                "at_end": abs(gains[-1] - gain) > abs(gains[0] - gain),
            }
            for name, gain in curve.levels.items()
        ],
    }
