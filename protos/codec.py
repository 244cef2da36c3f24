"""The encodings of what ``bytes`` fields carry: PCM audio and hints. Both ends use these."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.protos import hints_pb2 as pb

PROTOCOL_VERSION = 1
SERVICE_NAME = "knowledge_boosting.v1.HintService"
MAX_CHUNKS_PER_MESSAGE = 125  # one second of 8 ms chunks
MAX_HINT = 65504.0  # magnitude of a hint's values that a device takes, the largest of float16
ENROLLMENT_RATE = 16000  # hertz
ENROLLMENT_SECONDS = (1.0, 30.0)

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
    """Samples ``[M, N]`` of full scale 1 as interleaved PCM; s16 clips what exceeds full scale."""
    interleaved = samples.T
    if encoding == pb.PCM_ENCODING_S16LE:
        interleaved = np.clip(np.rint(interleaved * 32768), -32768, 32767)
    return interleaved.astype(_PCM_TYPES[encoding]).tobytes()


def pcm_sample_size(encoding: int) -> int:
    """Bytes of one sample of one channel.

    Raises:
        ValueError: no such encoding.
    """
    return _known(_PCM_TYPES, encoding, "pcm_encoding").itemsize


def decode_pcm(pcm: bytes, encoding: int, channels: int) -> Samples:
    """Interleaved PCM as samples ``[M, N]`` of full scale 1.

    Raises:
        ValueError: no such encoding, a length that is no whole number of samples, or a value that is not finite.
    """
    size = pcm_sample_size(encoding) * channels
    if len(pcm) % size:
        raise ValueError(f"pcm has {len(pcm)} bytes, not a multiple of the {size} of one sample of {channels} channels")
    samples = np.frombuffer(pcm, _PCM_TYPES[encoding]).reshape(-1, channels).T.astype(np.float32)
    if encoding == pb.PCM_ENCODING_S16LE:
        samples /= 32768
    elif not np.logical_and.reduce(np.isfinite(samples), axis=None):  # what all() does, by way of Python
        raise ValueError("pcm has samples that are NaN or infinite")
    return samples


def hint_type(encoding: int) -> np.dtype[Any]:
    """The type of a hint's values in its payload.

    Raises:
        ValueError: no such encoding.
    """
    return _known(_HINT_TYPES, encoding, "hint_encoding")


def encode_hints(hints: Samples, encoding: int) -> tuple[NDArray[Any], Samples]:
    """Hints ``[..., channels, F]``, many at once, as an array of what their payloads hold, and their scales ``[...]``.

    Raises:
        ValueError: no such encoding.
    """
    kind = hint_type(encoding)
    scales = np.ones(hints.shape[:-2], np.float32)
    if encoding == pb.HINT_ENCODING_INT8:
        largest = np.abs(hints).max((-2, -1))
        scales = np.where(largest > 0, np.maximum(largest / 127, np.finfo(np.float32).tiny), scales)
        with np.errstate(invalid="ignore"):
            hints = np.rint(hints / scales[..., None, None])
    elif encoding == pb.HINT_ENCODING_F16LE:
        hints = np.clip(hints, -MAX_HINT, MAX_HINT)
    with np.errstate(invalid="ignore"):  # the values of one that overflows may be anything
        return hints.astype(kind), scales


def decode_hint(hint: pb.Hint, encoding: int, channels: int, bins: int) -> Samples:
    """A hint message's payload as ``[channels, F]``.

    Raises:
        ValueError: the payload has another size, or a value that is not finite.
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


def _known(types: _Types, encoding: int, field: str) -> np.dtype[Any]:
    if encoding not in types:
        raise ValueError(f"{field} {encoding} is none of {sorted(types)}")
    return types[encoding]
