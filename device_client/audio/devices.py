"""The sound card: PortAudio through sounddevice, with rings between its callback and the frame loop.

Nothing here is imported before it is needed, because sounddevice cannot be imported where PortAudio is missing.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import soxr

from knowledge_boosting.common.errors import Failure, InputError, reason
from knowledge_boosting.device_client.audio.files import resample
from knowledge_boosting.device_client.audio.rings import SampleRing, Signal
from knowledge_boosting.models.config import Framing
from knowledge_boosting.protos.codec import ENROLLMENT_RATE, Samples

Way = Literal["input", "output"]
_RING_SECONDS = 1.0
_MOST_RESTARTS = 20


@dataclass(frozen=True)
class Device:
    """A device of the sound system."""

    index: int
    name: str
    system: str  # ALSA, Core Audio, WASAPI, ...
    inputs: int  # channels
    outputs: int
    rate: int  # that it prefers, hertz
    input_latency: float  # the least it claims to do with, seconds
    output_latency: float


def _portaudio() -> ModuleType:
    """The sounddevice module.

    Raises:
        InputError: it is not installed, or PortAudio is not.
    """
    try:
        import sounddevice
    except ImportError:
        raise InputError("live audio needs sounddevice: pip install 'knowledge-boosting[client]'") from None
    except OSError:
        raise InputError("PortAudio is missing; on Debian or Ubuntu: apt-get install libportaudio2") from None
    module: ModuleType = sounddevice
    return module


def list_devices() -> list[Device]:
    """All devices there are.

    Raises:
        InputError: PortAudio is missing.
    """
    portaudio = _portaudio()
    systems = [system["name"] for system in portaudio.query_hostapis()]
    return [
        Device(
            index=row["index"],
            name=row["name"],
            system=systems[row["hostapi"]],
            inputs=row["max_input_channels"],
            outputs=row["max_output_channels"],
            rate=round(row["default_samplerate"]),
            input_latency=row["default_low_input_latency"],
            output_latency=row["default_low_output_latency"],
        )
        for row in portaudio.query_devices()
    ]


def _of(devices: list[Device], way: Way) -> list[Device]:
    return [device for device in devices if (device.inputs if way == "input" else device.outputs)]


def default_device(devices: list[Device], way: Way) -> Device | None:
    """The device that is picked where none is asked for; None where there is none."""
    usable = _of(devices, way)
    default = _portaudio().default.device[0 if way == "input" else 1]
    return next((device for device in usable if device.index == default), usable[0] if usable else None)


def find_device(wanted: str | None, way: Way) -> Device:
    """The device with an index, or whose name holds a text (in full, or as the only one); None: the default.

    Raises:
        InputError: there is none, or the text is in several names.
    """
    found = list_devices()
    default, devices = default_device(found, way), _of(found, way)
    if default is None:
        raise InputError(f"--{way}: there is no {way} device here; see 'kb-client devices'")
    if wanted is None:
        return default
    if wanted.isdecimal():
        found = [device for device in devices if device.index == int(wanted)]
    else:
        found = [device for device in devices if device.name.lower() == wanted.lower()]
        found = found or [device for device in devices if wanted.lower() in device.name.lower()]
    if not found:
        raise InputError(f"--{way} {wanted}: no such {way} device; 'kb-client devices' lists what there is")
    if len(found) > 1:
        names = ", ".join(f"{device.index} ({device.name}, {device.system})" for device in found)
        raise InputError(f"--{way} {wanted}: is the name of several devices; give an index: {names}")
    return found[0]


def record_speech(wanted: str | None, seconds: float) -> Samples:
    """Speech ``[N]`` at 16 kHz from an input device.

    Raises:
        InputError: there is no such device, or it cannot be opened.
    """
    portaudio, device = _portaudio(), find_device(wanted, "input")
    try:
        captured = portaudio.rec(
            round(seconds * device.rate),
            samplerate=device.rate,
            channels=1,
            dtype="float32",
            device=device.index,
            blocking=True,
        )
    except (portaudio.PortAudioError, ValueError) as error:
        raise InputError(f"{device.name}: cannot record ({reason(error)}); see 'kb-client devices'") from None
    return resample(captured[:, 0], device.rate, ENROLLMENT_RATE)


class Resampler:
    """Samples at another rate, as a stream; equal rates pass through."""

    def __init__(self, rate: int, target: int, channels: int) -> None:
        # The variable-rate filter: the others work on blocks of tens of milliseconds.
        self._stream = soxr.ResampleStream(rate, target, channels, vr=True) if rate != target else None
        self.delay = 0.0  # seconds
        if self._stream is not None:
            # Filled with silence, it gives as much as it gets from the first block on.
            silence = np.zeros((rate, channels), np.float32)
            self.delay = 1 - len(self._stream.resample_chunk(silence)) / target

    def __call__(self, samples: Samples) -> Samples:
        """The samples ``[n, channels]`` at the target rate, as far as they are known."""
        if self._stream is None:
            return samples
        converted: Samples = self._stream.resample_chunk(samples)
        return converted


class DeviceAudio:
    """A full-duplex stream of a sound card as live audio."""

    def __init__(
        self, source: Device, target: Device, framing: Framing, microphones: int, rate: int | None, buffer_ms: float
    ) -> None:
        """Open the devices; :func:`open_device_audio` starts them and closes them again.

        Args:
            rate: of the devices, hertz; None: the bundle's if they take it, else what the input prefers.
            buffer_ms: audio kept ready to be played, beyond what the frames need; the output device is asked for
                as much.

        Raises:
            InputError: a device is in use, or does not take the rate or the channels.
        """
        self._portaudio = _portaudio()
        self._framing = framing
        self._devices = source, target
        channels = min(microphones, source.inputs), min(2, target.outputs)
        self.rate = rate or self._best_rate(channels)
        block = round(self.rate * framing.chunk_seconds)
        try:
            self._stream = self._portaudio.Stream(
                samplerate=self.rate,
                blocksize=block,
                device=(source.index, target.index),
                channels=channels,
                dtype="float32",
                # Captured sound must come block by block: bursts would leave hints no time.
                latency=(source.input_latency, max(target.output_latency, buffer_ms / 1e3)),
                callback=self._callback,
            )
        except (self._portaudio.PortAudioError, ValueError) as error:
            raise InputError(self._why(error)) from None
        self._captured = SampleRing(round(_RING_SECONDS * self.rate), channels[0])
        # Room for what a loop that was held up makes of a full ring of captured samples, beside what is kept ready.
        self._to_play = SampleRing(round(2 * _RING_SECONDS * self.rate), channels[1])
        self._block = np.zeros((block, channels[0]), np.float32)
        self._resampled = SampleRing(round(_RING_SECONDS * framing.sample_rate), channels[0])
        self._chunk = np.zeros((framing.n_fft, channels[0]), np.float32)
        self._downward = Resampler(self.rate, framing.sample_rate, channels[0])
        self._upward = Resampler(framing.sample_rate, self.rate, channels[1])
        # Blocks that have gone by when the first frame is there to be played, and what is kept ready.
        blocks = math.ceil(framing.n_fft / framing.chunk)
        self._silence = block * blocks + round(buffer_ms * self.rate / 1e3)
        self._wake = Signal()
        self._stopped = False
        self._restarts = 0
        self._owed = 0  # samples that were played as silence, because they were not there yet
        self.underruns = 0
        self.overruns = 0

    @property
    def latency_ms(self) -> float:
        """From microphone to loudspeaker: frames, our buffer, resampling, and what the devices say of their buffers."""
        devices: float = sum(self._stream.latency)
        return 1e3 * (self._silence / self.rate + devices) + self.resampling_ms

    @property
    def resampling_ms(self) -> float:
        """The share of resampling in it."""
        return 1e3 * (self._downward.delay + self._upward.delay)

    def start(self) -> None:
        try:
            self._start()
        except self._portaudio.PortAudioError as error:
            raise InputError(self._why(error)) from None

    def _start(self) -> None:
        self._to_play.skip(len(self._to_play))
        self._to_play.write(np.zeros((self._silence, self._stream.channels[1]), np.float32))
        self._owed = 0
        self._stream.start()

    def _restart(self) -> None:
        """Go on after PortAudio has given up, as it does after some underruns with ALSA."""
        self.underruns += 1
        self._restarts += 1
        if self._restarts > _MOST_RESTARTS:
            raise Failure("the sound device stops again and again; try --buffer-ms 50, another --rate or other devices")
        try:
            self._stream.abort()
            self._start()
        except self._portaudio.PortAudioError:
            raise Failure("the sound device went away; plug it in and start again") from None

    def close(self) -> None:
        """Let the devices go."""
        self._stream.close(ignore_errors=True)

    def read(self, samples: Samples) -> bool:
        chunk = self._chunk[: samples.shape[1]]
        while len(self._resampled) < len(chunk):
            if len(self._captured) < len(self._block):
                if self._stopped:
                    return False
                self._wake.wait(0.2)
                if not self._stream.active and not self._stopped:
                    self._restart()
                continue
            self._captured.read(self._block)
            self._resampled.write(self._downward(self._block))
        self._resampled.read(chunk)
        samples[:] = chunk.T  # a single microphone is heard at both ears
        return True

    def write(self, samples: Samples) -> None:
        channels = self._stream.channels[1]
        played = samples.T if len(samples) == channels else np.repeat(samples.mean(axis=0)[:, None], channels, axis=1)
        self._to_play.write(self._upward(np.ascontiguousarray(played)))

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def _callback(self, captured: Samples, to_play: Samples, frames: int, _time: Any, status: Any) -> None:
        lost = frames - self._captured.write(captured)
        self._wake.set()
        self.overruns += bool(lost or status.input_overflow)
        # What was late is not played late, so that the delay stays what it was; what was never captured never comes.
        self._owed = max(0, self._owed - self._to_play.skip(self._owed) - lost)
        missing = frames - self._to_play.read(to_play)
        to_play[frames - missing :] = 0
        self._owed += missing
        self.underruns += bool(missing or status.output_underflow)

    def _best_rate(self, channels: tuple[int, int]) -> int:
        source, target = self._devices
        wanted = self._framing.sample_rate
        try:
            self._portaudio.check_input_settings(source.index, channels[0], "float32", samplerate=wanted)
            self._portaudio.check_output_settings(target.index, channels[1], "float32", samplerate=wanted)
        except (self._portaudio.PortAudioError, ValueError):
            return source.rate
        return wanted

    def _why(self, error: Exception) -> str:
        source, target = self._devices
        text = reason(error)
        names = source.name if source == target else f"{source.name}, {target.name}"
        mend = "see 'kb-client devices', or choose others with --input and --output"
        if "sample rate" in text.lower():
            mend = f"try --rate {source.rate}"
        elif "unavailable" in text.lower():
            mend = "is another program using it?"
        return f"{names}: cannot be opened at {self.rate} Hz ({text}); {mend}"


@contextmanager
def open_device_audio(
    source: str | None, target: str | None, framing: Framing, microphones: int, rate: int | None, buffer_ms: float
) -> Iterator[DeviceAudio]:
    """Live audio of the devices with these names or indexes; None: the default ones.

    Raises:
        InputError: a device cannot be used.
    """
    found = find_device(source, "input"), find_device(target, "output")
    opened = DeviceAudio(*found, framing, microphones, rate, buffer_ms)
    try:
        yield opened
    finally:
        opened.close()
