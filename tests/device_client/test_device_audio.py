"""Tests for live audio of a sound card, with a fake PortAudio."""

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
    """A fake sound card. The test calls its callback block by block."""

    def __init__(self, microphones: int = 2, loudspeakers: int = 2) -> None:
        self.devices = [
            {"index": 0, "name": "card", "hostapi": 0, "max_input_channels": microphones, "default_samplerate": 16000.0}
            | {"max_output_channels": loudspeakers, "default_low_input_latency": 0.0, "default_low_output_latency": 0.0}
        ]
        self.open_error: str | None = None
        self.start_error: str | None = None
        self.active = self.closed = False
        self.seconds = 0.0  # from the capture to the playback of a block

    def open(self, *, callback: Callable[..., None], channels: tuple[int, int], **_: Any) -> "Card":
        if self.open_error is not None:
            raise PortAudioError(self.open_error)
        self._callback, self.channels, self.latency = callback, channels, (0.0, 0.0)
        return self

    def start(self) -> None:
        if self.start_error is not None:
            raise PortAudioError(self.start_error)
        self.active = True

    def abort(self) -> None:
        self.active = False

    def close(self, *, ignore_errors: bool) -> None:
        self.closed = ignore_errors

    def block(self, captured: Samples) -> Samples:
        """Capture one block ``[n, channels]``, and return the block that is played at the same time."""
        played = np.full((len(captured), self.channels[1]), np.nan, np.float32)
        status = SimpleNamespace(input_overflow=False, output_underflow=False)
        times = SimpleNamespace(inputBufferAdcTime=5.0, currentTime=5.0, outputBufferDacTime=5.0 + self.seconds)
        self._callback(captured, played, len(captured), times, status)
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
    """Do what the frame loop does, with a network that changes nothing."""
    assert audio.read(chunk)
    audio.write(chunk[:, -128:].copy())


def captured(block: int) -> Samples:
    """Return samples whose values are their positions in the stream."""
    position = np.arange(128 * block, 128 * (block + 1), dtype=np.float32)
    return np.stack([position, -position], axis=1)


def run(card: Card, audio: DeviceAudio, blocks: int, stalled: range = range(0)) -> Samples:
    """Return what is played while blocks are captured. During the blocks ``stalled`` the loop does nothing."""
    audio.start()
    played, done = [], 0
    for block in range(blocks):
        played.append(card.block(captured(block)))
        while block not in stalled and done < block - audio.overruns:  # an overrun loses a whole block
            pass_through(audio, np.zeros((2, 128 if done else 192), np.float32))
            done += 1
    return np.concatenate(played)


@pytest.mark.parametrize("buffer_ms", [0, 8, 30])
def test_captured_audio_is_played_after_a_fixed_time(buffer_ms: float, card: Card) -> None:
    with open_device_audio(None, None, Framing(), 2, None, buffer_ms) as audio:
        played = run(card, audio, 60)
        silence = 256 + round(16 * buffer_ms)
        assert not played[:silence].any()
        # A played chunk is the newest one of its window, which begins 64 samples earlier.
        np.testing.assert_array_equal(played[silence:, 0], 64 + np.arange(len(played) - silence))
        np.testing.assert_array_equal(played[:, 1], -played[:, 0])
        assert (audio.underruns, audio.overruns) == (0, 0)
        assert audio.latency_ms == pytest.approx(16 + buffer_ms)
    assert card.closed


def test_the_latency_includes_what_the_devices_report_of_their_blocks(card: Card) -> None:
    with open_device_audio(None, None, Framing(), 2, 48000, 8) as audio:
        audio.start()
        assert audio.latency_ms == pytest.approx(24 + 1.88, abs=0.01)  # no block has come yet
        card.seconds = 0.021
        for _ in range(200):
            card.block(np.zeros((384, 2), np.float32))
        assert audio.latency_ms == pytest.approx(24 + 1.88 + 21, abs=0.01)
        card.seconds = -5.0  # a system without these times
        card.block(np.zeros((384, 2), np.float32))
        assert audio.latency_ms == pytest.approx(24 + 1.88 + 21, abs=0.01)


def test_a_stall_does_not_change_the_latency(card: Card) -> None:
    with open_device_audio(None, None, Framing(), 2, None, 0) as audio:
        played = run(card, audio, 60, stalled=range(20, 25))
        assert audio.underruns == 5
        assert audio.overruns == 0
        gap = slice(21 * 128, 26 * 128)
        assert not played[gap].any()
        expected = 64 + np.arange(len(played) - 256)
        np.testing.assert_array_equal(played[256 : gap.start, 0], expected[: gap.start - 256])
        np.testing.assert_array_equal(played[gap.stop :, 0], expected[gap.stop - 256 :])


def test_lost_input_is_counted_and_causes_no_further_loss(card: Card) -> None:
    with open_device_audio(None, None, Framing(), 2, None, 0) as audio:
        played = run(card, audio, 300, stalled=range(20, 170))  # longer than the ring buffer of one second
        assert audio.overruns == 26  # 125 of the 151 blocks fit into the ring buffer
        expected = 64 + np.arange(len(played) - 256)
        np.testing.assert_array_equal(played[-50 * 128 :, 0], expected[-50 * 128 :])


def test_a_single_input_channel_is_repeated_and_a_single_output_channel_gets_the_mean(card: Card) -> None:
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
    ("error", "fix"),
    [("Device unavailable", "close other programs that use the device"), ("Invalid sample rate", "try --rate 16000")],
)
def test_the_error_of_a_device_that_cannot_be_opened_says_how_to_fix_it(error: str, fix: str, card: Card) -> None:
    card.open_error = error
    with pytest.raises(InputError, match=fix), open_device_audio(None, None, Framing(), 2, 44100, 8):
        pass
    card.open_error, card.start_error = None, error
    with open_device_audio(None, None, Framing(), 2, 44100, 8) as audio, pytest.raises(InputError, match=error):
        audio.start()
    assert card.closed


def test_a_stopped_stream_is_restarted_and_a_disconnected_device_ends_the_session(card: Card) -> None:
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
        card.active, card.start_error = False, "Device unavailable"
        with pytest.raises(Failure, match="no longer available"):
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
    captured = capsys.readouterr()
    assert ("card" in captured.out) == bool(inputs + outputs)
    assert ("no sound devices" in captured.out) == (not inputs + outputs)
    defaults = ", ".join(name for name, channels in (("input", inputs), ("output", outputs)) if channels)
    assert defaults in captured.out
    assert ("no microphone" in captured.err) == (not inputs)
    assert ("no loudspeaker" in captured.err) == (not outputs)
    assert ("apt-get install" in captured.err) == (not (inputs and outputs))


def test_the_list_of_devices_does_not_cut_names(
    card: Card, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card.devices[0] |= {"name": "Monitor of Built-in Audio Analog Stereo"}
    monkeypatch.setenv("COLUMNS", "60")
    print_devices()
    cells = [line.split("│")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert "MonitorofBuilt-inAudioAnalogStereo" in "".join(cells).replace(" ", "")
