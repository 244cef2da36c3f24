"""Check the messages of devices before their content reaches the network."""

from collections.abc import Sequence

import numpy as np

from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, ModelConfig
from knowledge_boosting.models.manifest import Manifest
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import (
    ENROLLMENT_RATE,
    ENROLLMENT_SECONDS,
    PROTOCOL_VERSION,
    Samples,
    decode_pcm,
    hint_type,
    pcm_sample_size,
)
from knowledge_boosting.remote_server.core.refusals import Refused, Status

_LARGEST_EMBEDDING = 10_000  # values of d-vectors are at most 1; far larger ones let networks overflow
MAX_FIRST_FRAME = 2**62  # so that all later indexes are within an int64


def read_config(request: pb.StreamHintsRequest) -> pb.SessionConfig:
    """Return the configuration of a session, which must be its first message.

    Raises:
        Refused: The message is another one, or it has another version of the protocol.
    """
    kind = request.WhichOneof("request")
    if kind != "config":
        raise Refused(f"request: the first message must be config, not {kind or 'an empty one'}")
    config = request.config
    if config.protocol_version != PROTOCOL_VERSION:
        raise Refused(
            f"config.protocol_version: is {config.protocol_version}, but this server uses {PROTOCOL_VERSION}; "
            "install the same release on both machines",
            Status.FAILED_PRECONDITION,
        )
    return config


def unknown_bundle(config: pb.SessionConfig, served: Sequence[Manifest]) -> Refused:
    """Create the refusal of a session whose bundle is not served."""
    names = " and ".join(f"{manifest.label} ({manifest.id})" for manifest in served) or "none for this token"
    return Refused(
        f"config.bundle_id: the device has {config.bundle_name[:80]!r} ({config.bundle_id[:64]!r}), "
        f"but this server has {names}; use the same bundle on both",
        Status.FAILED_PRECONDITION,
    )


def check_config(config: pb.SessionConfig, model: ModelConfig) -> None:
    """Check that the configuration of a session matches the model of its bundle.

    Raises:
        Refused: It does not. The message names the field.
    """
    if config.sample_rate != model.framing.sample_rate:
        raise Refused(f"config.sample_rate: is {config.sample_rate}, must be {model.framing.sample_rate}")
    size = SPEAKER_EMBEDDING_SIZE if model.needs_speaker else 0
    if len(config.speaker_embedding) != size:
        raise Refused(f"config.speaker_embedding: has {len(config.speaker_embedding)} values, must have {size}")
    if not np.isfinite(config.speaker_embedding).all():
        raise Refused("config.speaker_embedding: has values that are NaN or infinite")
    if np.abs(config.speaker_embedding).max(initial=0) > _LARGEST_EMBEDDING:
        raise Refused(f"config.speaker_embedding: has values above {_LARGEST_EMBEDDING}; scale its norm to 1")
    if not 0 <= config.first_frame <= MAX_FIRST_FRAME:
        raise Refused(f"config.first_frame: is {config.first_frame}, must be 0 to {MAX_FIRST_FRAME}")
    try:
        pcm_sample_size(config.pcm_encoding)
        hint_type(config.hint_encoding)
    except ValueError as error:
        raise Refused(f"config.{error}") from None


class AudioReader:
    """Checks and decodes the audio messages of a session."""

    def __init__(self, config: pb.SessionConfig, model: ModelConfig, max_chunks: int) -> None:
        """Create a reader for a session. ``max_chunks`` is the limit for the chunks in one message."""
        self.next_frame = config.first_frame
        self._max_chunks = max_chunks
        self._encoding = config.pcm_encoding
        self._channels = model.microphones
        self._chunk = model.framing.chunk
        self._lead = model.framing.lookahead

    def read(self, request: pb.StreamHintsRequest) -> tuple[int, Samples]:
        """Decode a message.

        Returns:
            The index of its first frame and its samples ``[M, chunk n]``. The first message also has the lookahead.

        Raises:
            Refused: The message is not the audio that must come next. The text names the field.
        """
        kind = request.WhichOneof("request")
        if kind != "audio":
            raise Refused(f"request: after the first message, all must be audio, not {kind or 'an empty one'}")
        audio = request.audio
        if audio.first_frame != self.next_frame:
            raise Refused(
                f"audio.first_frame: is {audio.first_frame}, must be {self.next_frame}; open a new session after a gap"
            )
        # Decoding takes time and memory, so it comes after this check.
        samples_per_channel = len(audio.pcm) // (self._channels * pcm_sample_size(self._encoding))
        chunks = (samples_per_channel - self._lead) // self._chunk
        if chunks > self._max_chunks:
            raise Refused(f"audio.pcm: has {chunks} chunks, must have at most {self._max_chunks}")
        try:
            samples = decode_pcm(audio.pcm, self._encoding, self._channels)
        except ValueError as error:
            raise Refused(f"audio.{error}") from None
        length = samples.shape[1] - self._lead
        if length <= 0 or length % self._chunk:
            extra = f" plus {self._lead}" if self._lead else ""
            raise Refused(
                f"audio.pcm: has {samples.shape[1]} samples per channel, must have a multiple of {self._chunk}{extra}"
            )
        first = self.next_frame
        self.next_frame += length // self._chunk
        self._lead = 0
        return first, samples


def check_enrollment(request: pb.EnrollRequest, max_seconds: float) -> Samples:
    """Decode the enrollment speech ``[N]`` of a request.

    Args:
        request: The request.
        max_seconds: The maximum duration of the speech.

    Raises:
        Refused: The rate, the duration or a sample is not valid. The message names the field.
    """
    if request.sample_rate != ENROLLMENT_RATE:
        raise Refused(f"sample_rate: is {request.sample_rate}, must be {ENROLLMENT_RATE}")
    try:
        speech: Samples = decode_pcm(request.pcm, request.pcm_encoding, 1)[0]
    except ValueError as error:
        raise Refused(str(error)) from None
    min_seconds = ENROLLMENT_SECONDS[0]
    seconds = len(speech) / ENROLLMENT_RATE
    if not min_seconds <= seconds <= max_seconds:
        raise Refused(f"pcm: has {seconds:.2f} s of speech, must have {min_seconds:g} to {max_seconds:g} s")
    return speech
