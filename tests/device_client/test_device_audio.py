"""The sound card's side of the live loop, with PortAudio's part played by the test."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.device_client.audio.devices import DeviceAudio, open_device_audio
from knowledge_boosting.device_client.commands.devices import print_devices
from knowledge_boosting.models.config import Framing
from knowledge_boosting.protos.codec import Samples


class PortAudioError(Exception):
    pass


class Card:
    """A sound card that is driven block by block."""

    def __init__(self, microphones: int = 2, loudspeakers: int = 2) -> None:
        self.devices = [
            {"index": 0, "name": "card", "hostapi": 0, "max_input_channels": microphones, "default_samplerate": 16000.0}
            | {"max_output_channels": loudspeakers, "default_low_input_latency": 0.0, "default_low_output_latency": 0.0}
        ]
        self.trouble_opening: str | None = None
        self.trouble_starting: str | None = None
        self.active = self.closed = False

    def open(self, *, callback: Callable[..., None], channels: tuple[int, int], **_: Any) -> "Card":
        if self.trouble_opening is not None:
            raise PortAudioError(self.trouble_opening)
        self._callback, self.channels, self.latency = callback, channels, (0.0, 0.0)
        return self

    def start(self) -> None:
        if self.trouble_starting is not None:
            raise PortAudioError(self.trouble_starting)
        self.active = True

    def abort(self) -> None:
        self.active = False

    def close(self, *, ignore_errors: bool) -> None:
        self.closed = ignore_errors

    def block(self, captured: Samples) -> Samples:
        """One block ``[n, channels]`` captured; what is played meanwhile."""
        played = np.full((len(captured), self.channels[1]), np.nan, np.float32)
        status = SimpleNamespace(input_overflow=False, output_underflow=False)
        self._callback(captured, played, len(captured), None, status)
        return played


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    card = Card()
    module: Any = ModuleType("sounddevice")
    module.PortAudioError, module.Stream = PortAudioError, card.open
    module.query_devices = lambda: card.devices
    module.query_hostapis = lambda: [{"name": "system"}]
    module.default = SimpleNamespace(device=(0, 0))
    module.check_input_settings = module.check_output_settings = lambda *_, **__: None
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    yield card


def pass_through(audio: DeviceAudio, chunk: Samples) -> None:
    """What the loop does, with a network that changes nothing."""
    assert audio.read(chunk)
    audio.write(chunk[:, -128:].copy())


def captured(block: int) -> Samples:
    """Samples that say where they belong."""
    place = np.arange(128 * block, 128 * (block + 1), dtype=np.float32)
    return np.stack([place, -place], axis=1)


def run(card: Card, audio: DeviceAudio, blocks: int, stalled: range = range(0)) -> Samples:
    """What is played while so many blocks are captured; during some of them the loop gets nothing done."""
    audio.start()
    played, done = [], 0
    for block in range(blocks):
        played.append(card.block(captured(block)))
        while block not in stalled and done < block - audio.overruns:  # a block is lost whole
            pass_through(audio, np.zeros((2, 128 if done else 192), np.float32))
            done += 1
    return np.concatenate(played)


@pytest.mark.parametrize("buffer_ms", [0, 8, 30])
def test_what_is_captured_is_played_after_a_fixed_time(buffer_ms: float, card: Card) -> None:
    with open_device_audio(None, None, Framing(), 2, None, buffer_ms) as audio:
        played = run(card, audio, 60)
        silence = 256 + round(16 * buffer_ms)
        assert not played[:silence].any()
        # A chunk that is played is the newest of its window: 64 samples behind the first ones.
        np.testing.assert_array_equal(played[silence:, 0], 64 + np.arange(len(played) - silence))
        np.testing.assert_array_equal(played[:, 1], -played[:, 0])
        assert (audio.underruns, audio.overruns) == (0, 0)
        assert audio.latency_ms == pytest.approx(16 + buffer_ms)
    assert card.closed


def test_after_a_stall_the_delay_is_what_it_was(card: Card) -> None:
    with open_device_audio(None, None, Framing(), 2, None, 0) as audio:
        played = run(card, audio, 60, stalled=range(20, 25))
        assert audio.underruns == 5
        assert audio.overruns == 0
        gap = slice(21 * 128, 26 * 128)
        assert not played[gap].any()
        expected = 64 + np.arange(len(played) - 256)
        np.testing.assert_array_equal(played[256 : gap.start, 0], expected[: gap.start - 256])
        np.testing.assert_array_equal(played[gap.stop :, 0], expected[gap.stop - 256 :])


def test_captured_sound_that_is_lost_is_counted_and_no_reason_to_drop_more(card: Card) -> None:
    with open_device_audio(None, None, Framing(), 2, None, 0) as audio:
        played = run(card, audio, 300, stalled=range(20, 170))  # more than the ring of a second holds
        assert audio.overruns == 26  # of the 151 blocks meanwhile 125 found room
        expected = 64 + np.arange(len(played) - 256)
        np.testing.assert_array_equal(played[-50 * 128 :, 0], expected[-50 * 128 :])


def test_one_microphone_is_heard_by_both_ears_and_one_loudspeaker_plays_both(card: Card) -> None:
    card.devices[0] |= {"max_input_channels": 1, "max_output_channels": 1}
    with open_device_audio(None, None, Framing(), 2, None, 0) as audio:
        audio.start()
        for _ in range(2):
            card.block(np.full((128, 1), 0.5, np.float32))
        window = np.zeros((2, 192), np.float32)
        assert audio.read(window)
        assert (window == 0.5).all()
        audio.write(np.stack([np.full(128, 1.0), np.full(128, 0.0)]).astype(np.float32))
        assert (card.block(np.zeros((128, 1), np.float32)) == 0.5).all()


@pytest.mark.parametrize(
    ("trouble", "words"),
    [("Device unavailable", "is another program using it?"), ("Invalid sample rate", "try --rate 16000")],
)
def test_a_device_that_does_not_open_says_why(trouble: str, words: str, card: Card) -> None:
    card.trouble_opening = trouble
    with (
        pytest.raises(InputError, match=words.replace("?", r"\?")),
        open_device_audio(None, None, Framing(), 2, 44100, 8),
    ):
        pass
    card.trouble_opening, card.trouble_starting = None, trouble
    with open_device_audio(None, None, Framing(), 2, 44100, 8) as audio, pytest.raises(InputError, match=trouble):
        audio.start()
    assert card.closed


def test_a_stream_that_stopped_goes_on_and_a_device_that_went_away_ends_the_session(card: Card) -> None:
    with open_device_audio(None, None, Framing(), 2, None, 0) as audio:
        audio.start()
        card.active = False
        start = card.start

        def start_and_capture() -> None:
            start()
            for block in range(2):
                card.block(captured(block))

        card.start = start_and_capture  # type: ignore[method-assign]
        assert audio.read(np.zeros((2, 192), np.float32))
        assert audio.underruns >= 1
        card.start = start  # type: ignore[method-assign]
        card.active, card.trouble_starting = False, "Device unavailable"
        with pytest.raises(Failure, match="went away"):
            audio.read(np.zeros((2, 128), np.float32))


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 0), (2, 0), (0, 2), (2, 2)])
def test_devices_are_listed_whatever_is_missing(
    inputs: int, outputs: int, card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    if inputs + outputs:
        card.devices[0] |= {"max_input_channels": inputs, "max_output_channels": outputs}
    else:
        card.devices.clear()
    print_devices()
    told = capsys.readouterr()
    assert ("card" in told.out) == bool(inputs + outputs)
    assert ("no sound devices" in told.out) == (not inputs + outputs)
    picked = ", ".join(way for way, channels in (("input", inputs), ("output", outputs)) if channels)
    assert picked in told.out
    assert ("no microphone" in told.err) == (not inputs)
    assert ("no loudspeaker" in told.err) == (not outputs)
    assert ("apt-get install" in told.err) == (not (inputs and outputs))
