"""Room responses: the impulse responses from each speaker in a room to a listener's ears or microphones.

Rooms are shoeboxes, simulated by the image-source method of pyroomacoustics. A head is represented by its measured
head-related responses, which come from a SOFA file. A bank is a file with the responses of many rooms.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.training.data import sofa_check
from knowledge_boosting.training.data.corpus import SAMPLE_RATE, Samples
from knowledge_boosting.training.data.rooms import MICROPHONES, MONO, Room

RESPONSE_LENGTH = 4096  # samples; 256 ms
BANK_FILE = "responses.safetensors"
_FADE = 512
HEADROOM = 0.99  # of full scale
# With the 186 samples of a KEMAR response at 16 kHz, this length fills an FFT of 256. pyroomacoustics rounds up to a
# power of two, so the default of 81 takes twice the time. The difference is 57 dB below the response.
_FRACTIONAL_DELAY = 71


def check_sofa(path: Path) -> None:
    """Check that a file has head-related responses that pyroomacoustics reads correctly.

    Raises:
        InputError: the file does not exist, is no SOFA file, lacks a field, or is of a kind that is read incorrectly.
    """
    existing_file(path, "a SOFA file of head-related responses")
    call = [sys.executable, "-m", sofa_check.__name__, str(path)]
    result = subprocess.run(call, capture_output=True, text=True, check=False)
    try:
        fault: str = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        fault = sofa_check.unusable_message("it is damaged: reading it crashes, or does not end")
    if fault:
        raise InputError(f"{path}: {fault}")


class Renderer:
    """Computes room responses at heads and microphones. Its objects can be pickled for another process."""

    def __init__(self, heads: Sequence[Path]) -> None:
        """Read SOFA files with two receivers each, the ears, and resample them to 16 kHz.

        Raises:
            InputError: see :func:`check_sofa`.
        """
        self._heads = {head_name(sofa): _read_ears(sofa) for sofa in heads}

    @property
    def heads(self) -> list[str]:
        """The names of the heads."""
        return list(self._heads)

    def responses(self, room: Room) -> Samples:
        """Return the responses ``[2 speakers, 2 ears, 4096]`` of a room at 16 kHz, from each mouth to each ear.

        They begin when the sound leaves the speaker, so the response of a distant speaker is later and weaker. They are
        faded out over the last 512 samples. Their scale is that of the SOFA file.
        """
        import pyroomacoustics
        from pyroomacoustics.directivities import Rotation3D

        # These settings are global to the process. With one thread, the order of a sum does not depend on the number of
        # cores.
        pyroomacoustics.constants.set("num_threads", 1)
        pyroomacoustics.constants.set("frac_delay_length", _FRACTIONAL_DELAY)
        listener = room.listener
        ears = None if listener.kind in (MICROPHONES, MONO) else self._heads[listener.kind]
        for ear in ears or ():
            ear.set_orientation(Rotation3D([room.facing], "z"))
        shoebox = pyroomacoustics.ShoeBox(
            room.size, SAMPLE_RATE, materials=pyroomacoustics.Material(float(room.absorption)), max_order=room.order
        )
        # Both ears of a head are placed at its centre, because the measured responses include the time between them.
        left = math.radians(room.facing + 90)
        offset = listener.spacing / 2 * np.array([math.cos(left), math.sin(left), 0])
        places = np.array([room.head + offset, room.head - offset]).T
        shoebox.add_microphone_array(pyroomacoustics.MicrophoneArray(places, SAMPLE_RATE, directivity=ears))
        for speaker in room.speakers:
            shoebox.add_source(speaker.position)
        shoebox.compute_rir()
        responses = np.zeros((2, 2, RESPONSE_LENGTH), np.float32)
        for ear, row in enumerate(shoebox.rir):
            gain = 10 ** ((listener.difference if ear == 0 else -listener.difference) / 40)
            for speaker_index, response in enumerate(row):
                kept = response[:RESPONSE_LENGTH]
                responses[speaker_index, ear, : len(kept)] = gain * kept
        responses[..., -_FADE:] *= 0.5 + 0.5 * np.cos(np.pi * (np.arange(_FADE, dtype=np.float32) + 0.5) / _FADE)
        return responses


def head_name(sofa: Path) -> str:
    """Return the name of the head in a SOFA file, which is the name of the file."""
    return sofa.stem


def _read_ears(sofa: Path) -> list[Any]:
    check_sofa(sofa)
    from pyroomacoustics.directivities import MeasuredDirectivityFile, Rotation3D

    try:
        responses = MeasuredDirectivityFile(sofa, fs=SAMPLE_RATE)
    except Exception as error:  # python-sofa and pyroomacoustics raise exceptions of many types
        raise InputError(f"{sofa}: {sofa_check.unusable_message(reason(error, sofa))}") from None
    # Single precision halves the time. Its error is 139 dB below the response.
    responses.impulse_responses = responses.impulse_responses.astype(np.float32)
    # SOFA does not define the order of the ears. The y axis points to the left of the listener.
    order = np.argsort(-responses.mic_locs[1], kind="stable")
    return [responses.get_mic_directivity(int(ear), Rotation3D([0], "z")) for ear in order]


def render(speech: Samples, responses: Samples) -> Samples:
    """Convolve speech ``[N]`` with the responses ``[2, K]`` of its speaker. Returns the first N samples, ``[2, N]``."""
    from scipy.signal import oaconvolve

    return np.asarray(oaconvolve(speech[None], responses, axes=-1)[:, : len(speech)], dtype=np.float32)


def level_gains(sources: Sequence[Samples], difference: float, level: float) -> tuple[float, float]:
    """Return the gains that bring two sources ``[2, N]`` to the given levels.

    A level is the mean square over both ears and all samples. If the mixture or a source would exceed 0.99 of full
    scale, both gains are reduced by the same factor.

    Args:
        sources: the signals of the two speakers; neither is silent.
        difference: the level of the first source over the second, dB.
        level: the level of the mixture, dBFS.
    """
    power = [float(np.mean(np.square(source, dtype=np.float64))) for source in sources]
    ratio = math.sqrt(power[0] / power[1]) * 10 ** (-difference / 20)
    mixture = sources[0] + ratio * sources[1]
    loudest = max(float(np.abs(signal).max()) for signal in (sources[0], ratio * sources[1], mixture))
    gain = 10 ** (level / 20) / math.sqrt(float(np.mean(np.square(mixture, dtype=np.float64))))
    gain = min(gain, HEADROOM / loudest)
    return gain, gain * ratio


@dataclass(frozen=True)
class ResponseBank:
    """The room responses for dynamic mixing."""

    responses: Samples  # [rooms, 2 speakers, 2 ears, K] at 16 kHz
    listeners: NDArray[np.int64]  # [rooms], the number of the kind of listener


def write_bank(path: Path, responses: Samples, listeners: Sequence[str]) -> None:
    """Write a bank of responses ``[rooms, 2, 2, K]`` for :func:`read_bank`, with the kind of listener of each room."""
    from safetensors.numpy import save_file

    numbers = np.unique(np.array(listeners), return_inverse=True)[1].astype(np.int64)
    save_file({"responses": responses, "listeners": numbers}, path)


def read_bank(path: Path) -> ResponseBank:
    """Read a bank of room responses, which ``kb-make-dataset --responses-only`` makes.

    Raises:
        InputError: the file does not exist or is no such bank.
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
        raise InputError(
            f"{path}: holds {responses.dtype} {list(responses.shape)}, not float32 [rooms, 2, 2, samples]; "
            "make it again"
        )
    # Older banks have no list of listeners, because all of their rooms have the same head.
    listeners = content.get("listeners", np.zeros(len(responses), np.int64))
    if listeners.dtype != np.int64 or listeners.shape != responses.shape[:1]:
        raise InputError(f"{path}: does not name the listener of every room; make it again")
    return ResponseBank(responses, listeners)
