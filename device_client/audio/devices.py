"""Live audio of a sound card: PortAudio through sounddevice, with ring buffers between its callback and the frame loop.

sounddevice is imported only when it is needed, because its import fails if PortAudio is missing.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np

from knowledge_boosting.common.errors import Failure, InputError, reason
from knowledge_boosting.device_client.audio.files import resample
from knowledge_boosting.device_client.audio.resampler import LowDelayResampler
from knowledge_boosting.device_client.audio.rings import SampleRing, WakeEvent
from knowledge_boosting.models.config import Framing
from knowledge_boosting.protos.codec import ENROLLMENT_RATE, Samples

Direction = Literal["input", "output"]
_RING_SECONDS = 1.0
_MAX_RESTARTS = 20
_SMOOTHING = 0.02  # of the latency of the devices, for each block


@dataclass(frozen=True)
class Device:
    """A device of the sound system."""

    index: int
    name: str
    system: str  # ALSA, Core Audio, WASAPI, ...
    inputs: int  # channels
    outputs: int  # channels
    rate: int  # preferred sample rate, Hz
    input_latency: float  # lowest latency that the device reports, seconds
    output_latency: float


def _portaudio() -> ModuleType:
    """Import sounddevice.

    Raises:
        InputError: sounddevice or PortAudio is not installed.
    """
    try:
        import sounddevice
    except ImportError:
        text = "live audio needs the package sounddevice; run pip install 'knowledge-boosting[client]'"
        raise InputError(text) from None
    except OSError:
        text = "PortAudio is missing; on Debian or Ubuntu, run apt-get install libportaudio2"
        raise InputError(text) from None
    module: ModuleType = sounddevice
    return module


def list_devices() -> list[Device]:
    """List all sound devices.

    Raises:
        InputError: sounddevice or PortAudio is not installed.
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


def _with_channels(devices: list[Device], direction: Direction) -> list[Device]:
    return [device for device in devices if (device.inputs if direction == "input" else device.outputs)]


def default_device(devices: list[Device], direction: Direction) -> Device | None:
    """Return the device that is used if the user names none. None if there is no device for that direction."""
    usable = _with_channels(devices, direction)
    default = _portaudio().default.device[0 if direction == "input" else 1]
    return next((device for device in usable if device.index == default), usable[0] if usable else None)


def find_device(name: str | None, direction: Direction) -> Device:
    """Find a device.

    Args:
        name: Its index, its name, or a part of its name that no other device has. None: the default device.
        direction: Whether it is for input or output.

    Raises:
        InputError: There is no such device, or several devices match.
    """
    devices = list_devices()
    default, usable = default_device(devices, direction), _with_channels(devices, direction)
    if default is None:
        raise InputError(f"--{direction}: this machine has no {direction} device; see 'kb-client devices'")
    if name is None:
        return default
    if name.isdecimal():
        matches = [device for device in usable if device.index == int(name)]
    else:
        matches = [device for device in usable if device.name.lower() == name.lower()]
        matches = matches or [device for device in usable if name.lower() in device.name.lower()]
    if not matches:
        raise InputError(f"--{direction} {name}: no such {direction} device; 'kb-client devices' lists all devices")
    if len(matches) > 1:
        names = ", ".join(f"{device.index} ({device.name}, {device.system})" for device in matches)
        raise InputError(f"--{direction} {name}: several devices have this name; give an index: {names}")
    return matches[0]


def record_speech(name: str | None, seconds: float) -> Samples:
    """Record speech from an input device, which :func:`find_device` finds by ``name``.

    Returns:
        Samples ``[N]`` at 16 kHz.

    Raises:
        InputError: There is no such device, or it cannot be opened.
    """
    portaudio, device = _portaudio(), find_device(name, "input")
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


class DeviceAudio:
    """Live audio from a full-duplex stream of a sound card."""

    def __init__(
        self, source: Device, target: Device, framing: Framing, microphones: int, rate: int | None, buffer_ms: float
    ) -> None:
        """Open the devices. :func:`open_device_audio` also closes them.

        Args:
            source: The input device.
            target: The output device.
            framing: The bundle's framing.
            microphones: Channels of the bundle's input.
            rate: Sample rate of the devices, Hz. None: the bundle's rate if both devices support it, otherwise the
                rate that the input device prefers.
            buffer_ms: Audio that is buffered for playback, in addition to what the frames need. It is also the latency
                that the output device is asked for.

        Raises:
            InputError: A device is in use, or it does not support the rate or the channels.
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
                # Captured audio must arrive block by block. In bursts, hints would come too late.
                latency=(source.input_latency, max(target.output_latency, buffer_ms / 1e3)),
                callback=self._callback,
            )
        except (self._portaudio.PortAudioError, ValueError) as error:
            raise InputError(self._open_error(error)) from None
        self._captured = SampleRing(round(_RING_SECONDS * self.rate), channels[0])
        # After a stall, the loop turns a full ring of captured samples into output, beside the buffered audio.
        self._to_play = SampleRing(round(2 * _RING_SECONDS * self.rate), channels[1])
        self._block = np.zeros((block, channels[0]), np.float32)
        self._resampled = SampleRing(round(_RING_SECONDS * framing.sample_rate), channels[0])
        self._chunk = np.zeros((framing.n_fft, channels[0]), np.float32)
        self._input_resampler = LowDelayResampler(self.rate, framing.sample_rate, channels[0])
        self._output_resampler = LowDelayResampler(framing.sample_rate, self.rate, channels[1])
        # Playback begins with silence: the blocks until the first frame is ready, and the buffered audio.
        blocks = math.ceil(framing.n_fft / framing.chunk)
        self._initial_silence = block * blocks + round(buffer_ms * self.rate / 1e3)
        self._wake = WakeEvent()
        self._stopped = False
        self._restarts = 0
        self._silence_debt = 0  # samples that were replaced by silence because they were late
        self._devices_seconds = 0.0  # from the capture of a block to the playback of the one that it is exchanged for
        self.underruns = 0
        self.overruns = 0

    @property
    def latency_ms(self) -> float:
        """Latency from microphone to loudspeaker: frames, buffer, resampling, and the latency of the devices."""
        # Before the first block, the best figures are the sizes of the buffers. Later their filling is known.
        devices: float = self._devices_seconds or sum(self._stream.latency)
        return 1e3 * (self._initial_silence / self.rate + devices) + self.resampling_ms

    @property
    def resampling_ms(self) -> float:
        """The part of the latency that resampling adds."""
        return 1e3 * (self._input_resampler.delay + self._output_resampler.delay)

    def start(self) -> None:
        try:
            self._start()
        except self._portaudio.PortAudioError as error:
            raise InputError(self._open_error(error)) from None

    def _start(self) -> None:
        self._to_play.skip(len(self._to_play))
        self._to_play.write(np.zeros((self._initial_silence, self._stream.channels[1]), np.float32))
        self._silence_debt = 0
        self._stream.start()

    def _restart(self) -> None:
        """Start the stream again. PortAudio stops it after some underruns with ALSA."""
        self.underruns += 1
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise Failure("the sound device stops repeatedly; try --buffer-ms 50, another --rate or other devices")
        try:
            self._stream.abort()
            self._start()
        except self._portaudio.PortAudioError:
            raise Failure("the sound device is no longer available; reconnect it and start again") from None

    def close(self) -> None:
        """Close the devices."""
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
            self._resampled.write(self._input_resampler(self._block))
        self._resampled.read(chunk)
        samples[:] = chunk.T  # a single channel is broadcast to all microphones
        return True

    def write(self, samples: Samples) -> None:
        channels = self._stream.channels[1]
        played = samples.T if len(samples) == channels else np.repeat(samples.mean(axis=0)[:, None], channels, axis=1)
        self._to_play.write(self._output_resampler(np.ascontiguousarray(played)))

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def _callback(self, captured: Samples, to_play: Samples, frames: int, times: Any, status: Any) -> None:
        seconds = times.outputBufferDacTime - times.inputBufferAdcTime
        if 0 < seconds < 1:  # some systems do not report both times
            before = self._devices_seconds or seconds
            self._devices_seconds = before + _SMOOTHING * (seconds - before)
        lost = frames - self._captured.write(captured)
        self._wake.set()
        self.overruns += bool(lost or status.input_overflow)
        # Samples that come too late are skipped, so that the latency does not grow. Lost input never becomes output, so
        # it reduces the debt.
        self._silence_debt = max(0, self._silence_debt - self._to_play.skip(self._silence_debt) - lost)
        missing = frames - self._to_play.read(to_play)
        to_play[frames - missing :] = 0
        self._silence_debt += missing
        self.underruns += bool(missing or status.output_underflow)

    def _best_rate(self, channels: tuple[int, int]) -> int:
        source, target = self._devices
        rate = self._framing.sample_rate
        try:
            self._portaudio.check_input_settings(source.index, channels[0], "float32", samplerate=rate)
            self._portaudio.check_output_settings(target.index, channels[1], "float32", samplerate=rate)
        except (self._portaudio.PortAudioError, ValueError):
            return source.rate
        return rate

    def _open_error(self, error: Exception) -> str:
        source, target = self._devices
        text = reason(error)
        names = source.name if source == target else f"{source.name}, {target.name}"
        fix = "see 'kb-client devices', or choose other devices with --input and --output"
        if "sample rate" in text.lower():
            fix = f"try --rate {source.rate}"
        elif "unavailable" in text.lower():
            fix = "close other programs that use the device"
        return f"{names}: cannot be opened at {self.rate} Hz ({text}); {fix}"


@contextmanager
def open_device_audio(
    source: str | None, target: str | None, framing: Framing, microphones: int, rate: int | None, buffer_ms: float
) -> Iterator[DeviceAudio]:
    """Open an input and an output device as live audio, and close them when the block ends.

    Args:
        source: The input device, as for :func:`find_device`.
        target: The output device, as for :func:`find_device`.
        framing: As for :class:`DeviceAudio`.
        microphones: As for :class:`DeviceAudio`.
        rate: As for :class:`DeviceAudio`.
        buffer_ms: As for :class:`DeviceAudio`.

    Raises:
        InputError: A device cannot be used.
    """
    devices = find_device(source, "input"), find_device(target, "output")
    audio = DeviceAudio(*devices, framing, microphones, rate, buffer_ms)
    try:
        yield audio
    finally:
        audio.close()
