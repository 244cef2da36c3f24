"""Rooms with a listener and two talkers, drawn at random, and what the listener's ears get from each talker.

Shoebox rooms by the image-source method, with pyroomacoustics. The listener is a head, heard through its measured
head-related responses (a SOFA file), two microphones a few centimetres apart as laptops and tablets have them, or one
microphone, whose signal comes twice. Angles are degrees: azimuth counterclockwise from where the head faces (90 is
left), elevation from the horizontal. Ear 0 is the left one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.training.data.corpus import SAMPLE_RATE, Samples

RESPONSE_LENGTH = 4096  # samples; 256 ms
BANK_FILE = "responses.safetensors"
_FADE = 512
_MAX_ORDER = 15  # an order of 15 has 4991 images, and takes about 0.1 s
_HEAD_HEIGHT = (1.2, 1.8)  # m, ears of a listener who sits or stands
_HEAD_MARGIN = 0.5  # m to the walls
_TALKER_MARGIN = 0.3  # m to walls, floor and ceiling
_TRIES = 10_000
HEADROOM = 0.99  # of full scale
# With the 186 samples of a KEMAR response at 16 kHz this fills an FFT of 256, which pyroomacoustics takes the next
# power of two for: half the time of its default of 81, and 57 dB below the response.
_FRACTIONAL_DELAY = 71

_SOFA_FIELDS = ("Data.IR", "Data.SamplingRate", "Data.Delay", "SourcePosition", "ReceiverPosition")

Range = tuple[float, float]


@dataclass(frozen=True)
class RoomRanges:
    """What rooms are drawn from, uniformly between two ends each."""

    side: Range = (3.0, 8.0)  # m, length and width
    height: Range = (2.4, 3.5)  # m
    absorption: Range = (0.2, 0.7)  # share of the energy that a surface takes
    anechoic: float = 0.0  # share of rooms without reflections
    distance: Range = (0.5, 2.0)  # m from the head's centre to a talker
    azimuth: Range = (-180.0, 180.0)
    elevation: Range = (-15.0, 15.0)
    separation: float = 15.0  # least difference of the talkers' azimuths
    microphones: float = 0.0  # share of rooms with two microphones and no head
    mono: float = 0.0  # share of rooms with one microphone
    unequal: float = 0.0  # share of other rooms in which one ear or microphone is 20 dB less sensitive

    def __post_init__(self) -> None:
        check_range("--side", self.side, 2, 50)
        check_range("--height", self.height, 2.2, 20)
        check_range("--absorption", self.absorption, 0.1, 1)
        check_range("--distance", self.distance, 0.2, 20)
        check_range("--azimuth", self.azimuth, -180, 180)
        check_range("--elevation", self.elevation, -60, 60)
        if self.azimuth[1] - self.azimuth[0] <= self.separation:
            raise InputError(f"--separation {self.separation:g}: does not fit into --azimuth; widen that range")
        if not 0 <= self.microphones + self.mono <= 1:
            raise InputError("--microphones, --mono: are shares of the rooms, together at most 1")
        if self.distance[0] > self.side[0] / 2 - _TALKER_MARGIN:
            raise InputError(
                f"--distance {self.distance[0]:g} …: too far for a room with --side {self.side[0]:g}; "
                f"begin at {self.side[0] / 2 - _TALKER_MARGIN:g} m or less, or make rooms larger"
            )


def check_range(flag: str, values: Range, least: float, most: float) -> None:
    """Whether a flag's two values are a range within bounds.

    Raises:
        InputError: they are not, which a NaN is not either.
    """
    if not least <= values[0] <= values[1] <= most:
        raise InputError(f"{flag} {values[0]:g} {values[1]:g}: give LOW HIGH, {least:g} <= LOW <= HIGH <= {most:g}")


MICROPHONES, MONO = "microphones", "mono"
_SPACING = (0.03, 0.2)  # m, of two microphones
_UNEQUAL_DB = 6.0  # most that one of them is more sensitive than the other
_WEAK_DB = 20.0  # as when one of two microphones is covered


@dataclass(frozen=True)
class Listener:
    """What hears a room."""

    kind: str  # the name of a head, or MICROPHONES or MONO
    spacing: float = 0.0  # m, between two microphones
    difference: float = 0.0  # dB, sensitivity of the left ear or microphone over the right one


def _draw_listener(rng: np.random.Generator, ranges: RoomRanges, heads: Sequence[str]) -> Listener:
    listener = _draw_kind(rng, ranges, heads)
    if ranges.unequal and rng.uniform() < ranges.unequal and listener.kind != MONO:
        return replace(listener, difference=_WEAK_DB * float(rng.choice((-1, 1))))
    return listener


def _draw_kind(rng: np.random.Generator, ranges: RoomRanges, heads: Sequence[str]) -> Listener:
    # Where only one head is possible nothing is drawn.
    if ranges.microphones or ranges.mono:
        share = rng.uniform()
        if share < ranges.mono:
            return Listener(MONO)
        if share < ranges.mono + ranges.microphones:
            return Listener(MICROPHONES, rng.uniform(*_SPACING), rng.uniform(-_UNEQUAL_DB, _UNEQUAL_DB))
    return Listener(heads[int(rng.integers(len(heads)))] if len(heads) > 1 else heads[0])


class Place(NamedTuple):
    """Where a talker is, seen from the head's centre (degrees, m), and in the room."""

    azimuth: float
    elevation: float
    distance: float
    position: tuple[float, float, float]  # m


@dataclass(frozen=True)
class Room:
    """A shoebox room with its origin in a corner, and who is where in it."""

    size: tuple[float, float, float]  # m
    absorption: float  # the same for every surface; 1 is an anechoic room
    head: tuple[float, float, float]  # m, the point between the ears
    facing: float  # degrees, counterclockwise from the room's x axis
    talkers: tuple[Place, Place]
    listener: Listener

    @property
    def order(self) -> int:
        """Reflections that are rendered: until the walls have taken 30 dB, 15 at most."""
        if self.absorption >= 1:
            return 0
        return min(_MAX_ORDER, math.ceil(-3 / math.log10(1 - self.absorption)))

    @property
    def rt60(self) -> float:
        """Reverberation time in s by Eyring's formula; the rendered one is cut where order and length end."""
        if self.absorption >= 1:
            return 0.0
        length, width, height = self.size
        surface = 2 * (length * width + length * height + width * height)
        return 0.161 * length * width * height / (-surface * math.log(1 - self.absorption))

    def record(self) -> dict[str, str | float]:
        """Every value by name and unit, the columns of ``metadata.csv``."""
        record: dict[str, str | float] = {
            "listener": self.listener.kind,
            "spacing_m": self.listener.spacing,
            "sensitivity_difference_db": self.listener.difference,
            **dict(zip(("length_m", "width_m", "height_m"), self.size, strict=True)),
            "absorption": self.absorption,
            "rt60_s": self.rt60,
            "order": self.order,
            **dict(zip(("head_x_m", "head_y_m", "head_z_m"), self.head, strict=True)),
            "facing_deg": self.facing,
        }
        for number, talker in enumerate(self.talkers):
            record |= {
                f"azimuth{number:02d}_deg": talker.azimuth,
                f"elevation{number:02d}_deg": talker.elevation,
                f"distance{number:02d}_m": talker.distance,
            }
            for axis, value in zip("xyz", talker.position, strict=True):
                record[f"{axis}{number:02d}_m"] = value
        return record


def draw_room(rng: np.random.Generator, ranges: RoomRanges, heads: Sequence[str]) -> Room:
    """A room, its listener, which may be any of the heads, and two talkers.

    Places outside the room or too close together are drawn again, so that far talkers are rarer in small rooms.

    Raises:
        InputError: the ranges leave no place for two talkers.
    """
    size = (rng.uniform(*ranges.side), rng.uniform(*ranges.side), rng.uniform(*ranges.height))
    absorption = rng.uniform(*ranges.absorption)
    if rng.uniform() < ranges.anechoic:
        absorption = 1.0
    for _ in range(_TRIES):
        head = (
            rng.uniform(_HEAD_MARGIN, size[0] - _HEAD_MARGIN),
            rng.uniform(_HEAD_MARGIN, size[1] - _HEAD_MARGIN),
            rng.uniform(*_HEAD_HEIGHT),
        )
        facing = rng.uniform(0, 360)
        talkers = (_draw_place(rng, ranges, head, facing), _draw_place(rng, ranges, head, facing))
        inside = all(
            _TALKER_MARGIN <= x <= side - _TALKER_MARGIN
            for talker in talkers
            for x, side in zip(talker.position, size, strict=True)
        )
        apart = abs((talkers[0].azimuth - talkers[1].azimuth + 180) % 360 - 180)
        if inside and apart >= ranges.separation:
            return Room(size, absorption, head, facing, talkers, _draw_listener(rng, ranges, heads))
    raise InputError(
        f"--distance, --azimuth, --elevation: no place for two talkers in a room of "
        f"{size[0]:.1f} x {size[1]:.1f} x {size[2]:.1f} m; widen these ranges or make rooms larger"
    )


def _draw_place(rng: np.random.Generator, ranges: RoomRanges, head: tuple[float, float, float], facing: float) -> Place:
    azimuth, elevation = rng.uniform(*ranges.azimuth), rng.uniform(*ranges.elevation)
    distance = rng.uniform(*ranges.distance)
    turn, rise = math.radians(facing + azimuth), math.radians(elevation)
    return Place(
        azimuth,
        elevation,
        distance,
        (
            head[0] + distance * math.cos(rise) * math.cos(turn),
            head[1] + distance * math.cos(rise) * math.sin(turn),
            head[2] + distance * math.sin(rise),
        ),
    )


def check_sofa(path: Path) -> None:
    """Whether a file holds head-related responses that pyroomacoustics reads right.

    Raises:
        InputError: no such file, not SOFA, without what is needed, or one of those it reads wrong.
    """
    existing_file(path, "a SOFA file of head-related responses")
    import netCDF4

    try:
        with netCDF4.Dataset(path) as file:
            missing = [name for name in _SOFA_FIELDS if name not in file.variables]
            if missing:
                raise InputError(_not_sofa(path, f"lacks {', '.join(missing)}"))
            responses, delay, position = (file[name][:] for name in ("Data.IR", "Data.Delay", "SourcePosition"))
            spherical = getattr(file["SourcePosition"], "Type", "") == "spherical"
    except InputError:
        raise
    except Exception as error:  # HDF5's of damaged files are of many kinds
        raise InputError(_not_sofa(path, reason(error))) from None
    if responses.ndim != 3 or responses.shape[1] != 2:
        raise InputError(f"{path}: Data.IR is {list(responses.shape)}; give [directions, 2 ears, samples]")
    if not np.issubdtype(responses.dtype, np.floating) or position.ndim != 2 or position.shape[1] != 3:
        raise InputError(_not_sofa(path, "Data.IR or SourcePosition is of another kind or shape"))
    if not np.isfinite(responses).all() or not responses.any():
        raise InputError(f"{path}: Data.IR is zero, NaN or infinite; give another file")
    if delay.any():
        raise InputError(f"{path}: keeps the delay of the ears in Data.Delay; give a file that has it in Data.IR")
    # pyroomacoustics takes elevations for colatitudes if none is negative.
    if not spherical or position[:, 1].min() >= 0:
        raise InputError(f"{path}: give SourcePosition in spherical coordinates, some of them below the horizon")


def _not_sofa(path: Path, why: str) -> str:
    return f"{path}: not usable as head-related responses ({why}); give a SOFA file (SimpleFreeFieldHRIR)"


class Renderer:
    """Room responses as heads and microphones get them. Can be sent to another process."""

    def __init__(self, heads: Sequence[Path]) -> None:
        """Read SOFA files of two receivers (left ear, right ear) each, resampled to 16 kHz.

        Raises:
            InputError: as :func:`check_sofa`.
        """
        self._heads = {head_name(sofa): _read_ears(sofa) for sofa in heads}

    @property
    def heads(self) -> list[str]:
        """Names of the heads."""
        return list(self._heads)

    def responses(self, room: Room) -> Samples:
        """Responses ``[2 talkers, 2 ears, 4096]`` at 16 kHz, from the talker's mouth to the ear.

        They begin when the sound leaves the talker, so that a farther one comes later and is weaker, and are faded
        out over the last 512 samples. Their scale is that of the SOFA file.
        """
        import pyroomacoustics
        from pyroomacoustics.directivities import Rotation3D

        # These hold for the process. One thread, because the order of a sum must not depend on the machine's cores.
        pyroomacoustics.constants.set("num_threads", 1)
        pyroomacoustics.constants.set("frac_delay_length", _FRACTIONAL_DELAY)
        listener = room.listener
        ears = None if listener.kind in (MICROPHONES, MONO) else self._heads[listener.kind]
        for ear in ears or ():
            ear.set_orientation(Rotation3D([room.facing], "z"))
        shoebox = pyroomacoustics.ShoeBox(
            room.size, SAMPLE_RATE, materials=pyroomacoustics.Material(float(room.absorption)), max_order=room.order
        )
        # Both ears at the head's centre: the measured responses hold the time between them.
        left = math.radians(room.facing + 90)
        apart = listener.spacing / 2 * np.array([math.cos(left), math.sin(left), 0])
        places = np.array([room.head + apart, room.head - apart]).T
        shoebox.add_microphone_array(pyroomacoustics.MicrophoneArray(places, SAMPLE_RATE, directivity=ears))
        for talker in room.talkers:
            shoebox.add_source(talker.position)
        shoebox.compute_rir()
        responses = np.zeros((2, 2, RESPONSE_LENGTH), np.float32)
        for ear, row in enumerate(shoebox.rir):
            gain = 10 ** ((listener.difference if ear == 0 else -listener.difference) / 40)
            for talker_index, response in enumerate(row):
                kept = response[:RESPONSE_LENGTH]
                responses[talker_index, ear, : len(kept)] = gain * kept
        responses[..., -_FADE:] *= 0.5 + 0.5 * np.cos(np.pi * (np.arange(_FADE, dtype=np.float32) + 0.5) / _FADE)
        return responses


def head_name(sofa: Path) -> str:
    """What the head of a SOFA file is called: the file's name."""
    return sofa.stem


def _read_ears(sofa: Path) -> list[Any]:
    check_sofa(sofa)
    from pyroomacoustics.directivities import MeasuredDirectivityFile, Rotation3D

    try:
        responses = MeasuredDirectivityFile(sofa, fs=SAMPLE_RATE)
    except Exception as error:  # whatever python-sofa and pyroomacoustics say of a strange file
        raise InputError(_not_sofa(sofa, reason(error, sofa))) from None
    # Single precision halves the time, and is 139 dB below the response.
    responses.impulse_responses = responses.impulse_responses.astype(np.float32)
    # SOFA leaves it to the file which ear comes first; y points to the listener's left.
    order = np.argsort(-responses.mic_locs[1], kind="stable")
    return [responses.get_mic_directivity(int(ear), Rotation3D([0], "z")) for ear in order]


def render(speech: Samples, responses: Samples) -> Samples:
    """What two ears hear, ``[2, N]``, of speech ``[N]`` through a talker's responses ``[2, K]``; cut at N samples."""
    from scipy.signal import oaconvolve

    return np.asarray(oaconvolve(speech[None], responses, axes=-1)[:, : len(speech)], dtype=np.float32)


def level_gains(sources: Sequence[Samples], difference: float, level: float) -> tuple[float, float]:
    """Gains for two sources ``[2, N]`` that give the levels wanted.

    A level is the mean square over both ears and all samples. If the mixture or a source would then exceed 0.99 of
    full scale, both gains are lowered alike.

    Args:
        sources: of the two talkers; neither may be silent.
        difference: dB, level of the first source over the second.
        level: dBFS, level of the mixture.
    """
    power = [float(np.mean(np.square(source, dtype=np.float64))) for source in sources]
    ratio = math.sqrt(power[0] / power[1]) * 10 ** (-difference / 20)
    mixture = sources[0] + ratio * sources[1]
    loudest = max(float(np.abs(signal).max()) for signal in (sources[0], ratio * sources[1], mixture))
    gain = 10 ** (level / 20) / math.sqrt(float(np.mean(np.square(mixture, dtype=np.float64))))
    gain = min(gain, HEADROOM / loudest)
    return gain, gain * ratio


@dataclass(frozen=True)
class Bank:
    """Room responses for dynamic mixing."""

    responses: Samples  # [rooms, 2 talkers, 2 ears, K] at 16 kHz
    listeners: NDArray[np.int64]  # [rooms], a number for each kind of listener


def write_bank(path: Path, responses: Samples, listeners: Sequence[str]) -> None:
    """Write a bank of ``[rooms, 2, 2, K]`` responses as :func:`read_bank` reads it, with each room's listener."""
    from safetensors.numpy import save_file

    numbers = np.unique(np.array(listeners), return_inverse=True)[1].astype(np.int64)
    save_file({"responses": responses, "listeners": numbers}, path)


def read_bank(path: Path) -> Bank:
    """A bank of room responses that ``--responses-only`` made.

    Raises:
        InputError: no such file, or not one of these.
    """
    existing_file(path, "a bank of room responses")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        content = load_file(path)
        responses = content["responses"]
    except (SafetensorError, KeyError, OSError) as error:
        raise InputError(
            f"{path}: not a bank of room responses ({reason(error, path)}); make it with "
            "kb-make-dataset --responses-only"
        ) from None
    if responses.dtype != np.float32 or responses.ndim != 4 or responses.shape[1:3] != (2, 2):
        raise InputError(f"{path}: holds {responses.dtype} {list(responses.shape)}, not float32 [rooms, 2, 2, samples]")
    # Banks made before there were other listeners have one head.
    listeners = content.get("listeners", np.zeros(len(responses), np.int64))
    if listeners.dtype != np.int64 or listeners.shape != responses.shape[:1]:
        raise InputError(f"{path}: does not tell every room's listener; make it again")
    return Bank(responses, listeners)
