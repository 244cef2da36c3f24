"""Draws random rooms with a listener and two speakers.

The listener is a head, a pair of microphones a few centimetres apart, as in laptops and tablets, or one microphone,
whose signal is used for both channels. Angles are in degrees. Azimuth is counterclockwise from the direction that the
head faces, so 90 is left; elevation is measured from the horizontal. Ear 0 is the left one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from knowledge_boosting.common.errors import InputError

_MAX_ORDER = 15  # order 15 has 4991 images and takes about 0.1 s
_HEAD_HEIGHT = (1.2, 1.8)  # m, the ears of a person who sits or stands
_HEAD_MARGIN = 0.5  # m to the walls
_SPEAKER_MARGIN = 0.3  # m to walls, floor and ceiling
_TRIES = 10_000

Range = tuple[float, float]


@dataclass(frozen=True)
class RoomRanges:
    """The ranges that the values of rooms are drawn from, with a uniform distribution."""

    side: Range = (3.0, 8.0)  # m, length and width
    height: Range = (2.4, 3.5)  # m
    absorption: Range = (0.2, 0.7)  # share of the energy that a surface absorbs
    anechoic: float = 0.0  # share of rooms without reflections
    distance: Range = (0.5, 2.0)  # m from the head's centre to a speaker
    azimuth: Range = (-180.0, 180.0)
    elevation: Range = (-15.0, 15.0)
    separation: float = 15.0  # minimum difference between the azimuths of the speakers
    microphones: float = 0.0  # share of rooms with two microphones and no head
    mono: float = 0.0  # share of rooms with one microphone
    unequal: float = 0.0  # share of the other rooms with one ear or microphone that is 20 dB less sensitive

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
            raise InputError("--microphones, --mono: are shares of the rooms; give values whose sum is at most 1")
        if self.distance[0] > self.side[0] / 2 - _SPEAKER_MARGIN:
            raise InputError(
                f"--distance {self.distance[0]:g} …: too far for a room with --side {self.side[0]:g}; "
                f"give at most {self.side[0] / 2 - _SPEAKER_MARGIN:g} m as LOW, or make rooms larger"
            )


def check_range(flag: str, values: Range, lowest: float, highest: float) -> None:
    """Check that the two values of a flag are a range within the bounds ``lowest`` and ``highest``.

    Raises:
        InputError: they are no such range, or one of them is NaN.
    """
    if not lowest <= values[0] <= values[1] <= highest:
        raise InputError(f"{flag} {values[0]:g} {values[1]:g}: give LOW HIGH, {lowest:g} <= LOW <= HIGH <= {highest:g}")


MICROPHONES, MONO = "microphones", "mono"
_SPACING = (0.03, 0.2)  # m, between two microphones
_MAX_SENSITIVITY_DIFFERENCE_DB = 6.0  # between two microphones of the same device
_COVERED_MICROPHONE_DB = 20.0  # by which a covered microphone is less sensitive


@dataclass(frozen=True)
class Listener:
    """The listener in a room: a head, two microphones or one."""

    kind: str  # the name of a head, or MICROPHONES or MONO
    spacing: float = 0.0  # m, between two microphones
    difference: float = 0.0  # dB, sensitivity of the left ear or microphone over the right one


def _draw_listener(rng: np.random.Generator, ranges: RoomRanges, heads: Sequence[str]) -> Listener:
    listener = _draw_listener_kind(rng, ranges, heads)
    if ranges.unequal and rng.uniform() < ranges.unequal and listener.kind != MONO:
        return replace(listener, difference=_COVERED_MICROPHONE_DB * float(rng.choice((-1, 1))))
    return listener


def _draw_listener_kind(rng: np.random.Generator, ranges: RoomRanges, heads: Sequence[str]) -> Listener:
    # If only one head is possible, no random number is drawn.
    if ranges.microphones or ranges.mono:
        share = rng.uniform()
        if share < ranges.mono:
            return Listener(MONO)
        if share < ranges.mono + ranges.microphones:
            return Listener(
                MICROPHONES,
                rng.uniform(*_SPACING),
                rng.uniform(-_MAX_SENSITIVITY_DIFFERENCE_DB, _MAX_SENSITIVITY_DIFFERENCE_DB),
            )
    return Listener(heads[int(rng.integers(len(heads)))] if len(heads) > 1 else heads[0])


class SpeakerPosition(NamedTuple):
    """The position of a speaker, relative to the centre of the head (degrees, m) and in the room (m)."""

    azimuth: float
    elevation: float
    distance: float
    position: tuple[float, float, float]  # m


@dataclass(frozen=True)
class Room:
    """A shoebox room with its origin in a corner, and the positions of listener and speakers."""

    size: tuple[float, float, float]  # m
    absorption: float  # of every surface; 1 means an anechoic room
    head: tuple[float, float, float]  # m, the point between the ears
    facing: float  # degrees, counterclockwise from the room's x axis
    speakers: tuple[SpeakerPosition, SpeakerPosition]
    listener: Listener

    @property
    def order(self) -> int:
        """The maximum number of reflections of a path: as many as the walls need to absorb 30 dB, at most 15."""
        if self.absorption >= 1:
            return 0
        return min(_MAX_ORDER, math.ceil(-3 / math.log10(1 - self.absorption)))

    @property
    def rt60(self) -> float:
        """The reverberation time by Eyring's formula, s.

        The rendered reverberation is shorter if the order or the length of the responses limits it.
        """
        if self.absorption >= 1:
            return 0.0
        length, width, height = self.size
        surface = 2 * (length * width + length * height + width * height)
        return 0.161 * length * width * height / (-surface * math.log(1 - self.absorption))

    def record(self) -> dict[str, str | float]:
        """Return all values as the columns of ``metadata.csv``, whose names give the units."""
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
        for number, speaker in enumerate(self.speakers):
            record |= {
                f"azimuth{number:02d}_deg": speaker.azimuth,
                f"elevation{number:02d}_deg": speaker.elevation,
                f"distance{number:02d}_m": speaker.distance,
            }
            for axis, value in zip("xyz", speaker.position, strict=True):
                record[f"{axis}{number:02d}_m"] = value
        return record


def draw_room(rng: np.random.Generator, ranges: RoomRanges, heads: Sequence[str]) -> Room:
    """Draw a room, its listener and the positions of two speakers.

    Positions outside the room or too close together are drawn again. So distant speakers are less frequent in small
    rooms.

    Args:
        rng: the generator of all random values.
        ranges: the ranges of the values.
        heads: the names of the heads that the listener is drawn from.

    Raises:
        InputError: the ranges leave no position for two speakers.
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
        speakers = (_draw_position(rng, ranges, head, facing), _draw_position(rng, ranges, head, facing))
        inside = all(
            _SPEAKER_MARGIN <= x <= side - _SPEAKER_MARGIN
            for speaker in speakers
            for x, side in zip(speaker.position, size, strict=True)
        )
        separation = abs((speakers[0].azimuth - speakers[1].azimuth + 180) % 360 - 180)
        if inside and separation >= ranges.separation:
            return Room(size, absorption, head, facing, speakers, _draw_listener(rng, ranges, heads))
    raise InputError(
        f"--distance, --azimuth, --elevation: no place for two speakers in a room of "
        f"{size[0]:.1f} x {size[1]:.1f} x {size[2]:.1f} m; widen these ranges or make rooms larger"
    )


def _draw_position(
    rng: np.random.Generator, ranges: RoomRanges, head: tuple[float, float, float], facing: float
) -> SpeakerPosition:
    azimuth, elevation = rng.uniform(*ranges.azimuth), rng.uniform(*ranges.elevation)
    distance = rng.uniform(*ranges.distance)
    turn, rise = math.radians(facing + azimuth), math.radians(elevation)
    return SpeakerPosition(
        azimuth,
        elevation,
        distance,
        (
            head[0] + distance * math.cos(rise) * math.cos(turn),
            head[1] + distance * math.cos(rise) * math.sin(turn),
            head[2] + distance * math.sin(rise),
        ),
    )
