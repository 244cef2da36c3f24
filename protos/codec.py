"""Encode and decode the ``bytes`` fields of the messages: PCM audio and hints. Both client and server use it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.protos import hints_pb2 as pb

PROTOCOL_VERSION = 1
SERVICE_NAME = "knowledge_boosting.v1.HintService"
MAX_CHUNKS_PER_MESSAGE = 125  # one second of 8 ms chunks
MAX_HINT = 65504.0  # maximum magnitude of a hint's values that a device accepts; the maximum of float16
ENROLLMENT_RATE = 16000  # Hz
ENROLLMENT_SECONDS = (1.0, 30.0)  # minimum and maximum

PCM_ENCODINGS = {"s16": pb.PCM_ENCODING_S16LE, "f32": pb.PCM_ENCODING_F32LE}
HINT_ENCODINGS = {"f32": pb.HINT_ENCODING_F32LE, "f16": pb.HINT_ENCODING_F16LE, "int8": pb.HINT_ENCODING_INT8}

_Types = dict[int, np.dtype[Any]]
_PCM_TYPES: _Types = {pb.PCM_ENCODING_S16LE: np.dtype("<i2"), pb.PCM_ENCODING_F32LE: np.dtype("<f4")}
_HINT_TYPES: _Types = {
    pb.HINT_ENCODING_F32LE: np.dtype("<f4"),
    pb.HINT_ENCODING_F16LE: np.dtype("<f2"),
    pb.HINT_ENCODING_INT8: np.dtype("i1"),
}

Samples = NDArray[np.float32]


def encode_pcm(samples: Samples, encoding: int) -> bytes:
    """Encode samples ``[M, N]`` with full scale 1 as interleaved PCM. s16 clips samples beyond full scale."""
    interleaved = samples.T
    if encoding == pb.PCM_ENCODING_S16LE:
        interleaved = np.clip(np.rint(interleaved * 32768), -32768, 32767)
    return interleaved.astype(_PCM_TYPES[encoding]).tobytes()


def pcm_sample_size(encoding: int) -> int:
    """Return the size of one sample of one channel in bytes.

    Raises:
        ValueError: There is no such encoding.
    """
    return _type_of(_PCM_TYPES, encoding, "pcm_encoding").itemsize


def decode_pcm(pcm: bytes, encoding: int, channels: int) -> Samples:
    """Decode interleaved PCM to samples ``[M, N]`` with full scale 1.

    Raises:
        ValueError: There is no such encoding, the length is not a whole number of samples, or a value is not finite.
    """
    size = pcm_sample_size(encoding) * channels
    if len(pcm) % size:
        raise ValueError(f"pcm has {len(pcm)} bytes, not a multiple of the {size} of one sample of {channels} channels")
    samples = np.frombuffer(pcm, _PCM_TYPES[encoding]).reshape(-1, channels).T.astype(np.float32)
    if encoding == pb.PCM_ENCODING_S16LE:
        samples /= 32768
    elif not np.logical_and.reduce(np.isfinite(samples), axis=None):  # faster than all(), which calls this in Python
        raise ValueError("pcm has samples that are NaN or infinite")
    return samples


def hint_type(encoding: int) -> np.dtype[Any]:
    """Return the type of a hint's values in its payload.

    Raises:
        ValueError: There is no such encoding.
    """
    return _type_of(_HINT_TYPES, encoding, "hint_encoding")


def encode_hints(hints: Samples, encoding: int) -> tuple[NDArray[Any], Samples]:
    """Encode a batch of hints ``[..., channels, F]``.

    Returns:
        The values of the payloads, ``[..., channels, F]``, and the scale of each hint, ``[...]``.

    Raises:
        ValueError: There is no such encoding.
    """
    kind = hint_type(encoding)
    scales = np.ones(hints.shape[:-2], np.float32)
    if encoding == pb.HINT_ENCODING_INT8:
        peaks = np.abs(hints).max((-2, -1))
        scales = np.where(peaks > 0, np.maximum(peaks / 127, np.finfo(np.float32).tiny), scales)
        with np.errstate(invalid="ignore"):
            hints = np.rint(hints / scales[..., None, None])
    elif encoding == pb.HINT_ENCODING_F16LE:
        hints = np.clip(hints, -MAX_HINT, MAX_HINT)
    with np.errstate(invalid="ignore"):  # a hint that is not finite is never sent, so its encoding does not matter
        return hints.astype(kind), scales


def decode_hint(hint: pb.Hint, encoding: int, channels: int, bins: int) -> Samples:
    """Decode the payload of a hint message to ``[channels, F]``.

    Raises:
        ValueError: The payload has another size, or it has a value that is not finite.
    """
    kind = _HINT_TYPES[encoding]
    size = channels * bins * kind.itemsize
    if len(hint.payload) != size:
        raise ValueError(f"hint of frame {hint.frame} has {len(hint.payload)} bytes, expected {size}")
    values: NDArray[Any] = np.frombuffer(hint.payload, kind)
    decoded = values.reshape(channels, bins).astype(np.float32)
    if encoding == pb.HINT_ENCODING_INT8:
        decoded *= np.float32(hint.scale)
    if not np.isfinite(decoded).all():
        raise ValueError(f"hint of frame {hint.frame} has values that are not finite")
    return decoded


def _type_of(types: _Types, encoding: int, field: str) -> np.dtype[Any]:
    if encoding not in types:
        raise ValueError(f"{field} {encoding} is unknown; give one of {sorted(types)}")
    return types[encoding]
