"""What a session's messages must be: the checks between the wire and the network."""

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

MAX_FIRST_FRAME = 2**62  # leaves every later index within an int64


def read_config(request: pb.StreamHintsRequest) -> pb.SessionConfig:
    """The session configuration that a stream must begin with.

    Raises:
        Refused: the message is another one, or of another version of the protocol.
    """
    kind = request.WhichOneof("request")
    if kind != "config":
        raise Refused(f"request: the first message must be config, not {kind or 'an empty one'}")
    config = request.config
    if config.protocol_version != PROTOCOL_VERSION:
        raise Refused(
            f"config.protocol_version: is {config.protocol_version}, this server speaks {PROTOCOL_VERSION}; "
            "install the same release on both machines",
            Status.FAILED_PRECONDITION,
        )
    return config


def unknown_bundle(config: pb.SessionConfig, served: Sequence[Manifest]) -> Refused:
    """What to tell a device whose bundle is none of those served."""
    there = " and ".join(f"{manifest.label} ({manifest.id})" for manifest in served) or "none for this token"
    return Refused(
        f"config.bundle_id: the device has {config.bundle_name[:80]!r} ({config.bundle_id[:64]!r}), "
        f"this server runs {there}; use the same bundle on both",
        Status.FAILED_PRECONDITION,
    )


def check_config(config: pb.SessionConfig, model: ModelConfig) -> None:
    """Whether a session configuration fits a bundle's model.

    Raises:
        Refused: it does not; the text names the field.
    """
    if config.sample_rate != model.framing.sample_rate:
        raise Refused(f"config.sample_rate: is {config.sample_rate}, must be {model.framing.sample_rate}")
    size = SPEAKER_EMBEDDING_SIZE if model.needs_speaker else 0
    if len(config.speaker_embedding) != size:
        raise Refused(f"config.speaker_embedding: has {len(config.speaker_embedding)} values, must have {size}")
    if not np.isfinite(config.speaker_embedding).all():
        raise Refused("config.speaker_embedding: has values that are NaN or infinite")
    if not 0 <= config.first_frame <= MAX_FIRST_FRAME:
        raise Refused(f"config.first_frame: is {config.first_frame}, must be 0 to {MAX_FIRST_FRAME}")
    try:
        pcm_sample_size(config.pcm_encoding)
        hint_type(config.hint_encoding)
    except ValueError as error:
        raise Refused(f"config.{error}") from None


class AudioReader:
    """Checks a session's audio messages and unpacks their samples."""

    def __init__(self, config: pb.SessionConfig, model: ModelConfig, most_chunks: int) -> None:
        self.next_frame = config.first_frame
        self._most_chunks = most_chunks
        self._encoding = config.pcm_encoding
        self._channels = model.microphones
        self._chunk = model.framing.chunk
        self._lead = model.framing.lookahead

    def read(self, request: pb.StreamHintsRequest) -> tuple[int, Samples]:
        """The first frame and the samples ``[M, chunk n]`` of a message, ``lookahead`` more in the first.

        Raises:
            Refused: the message is not the audio that must come next; the text names the field.
        """
        kind = request.WhichOneof("request")
        if kind != "audio":
            raise Refused(f"request: only audio may follow the first message, not {kind or 'an empty one'}")
        audio = request.audio
        if audio.first_frame != self.next_frame:
            raise Refused(
                f"audio.first_frame: is {audio.first_frame}, must be {self.next_frame}; open a new session after a gap"
            )
        try:
            samples = decode_pcm(audio.pcm, self._encoding, self._channels)
        except ValueError as error:
            raise Refused(f"audio.{error}") from None
        length = samples.shape[1] - self._lead
        if length <= 0 or length % self._chunk:
            also = f" and {self._lead} samples before them" if self._lead else ""
            raise Refused(
                f"audio.pcm: has {samples.shape[1]} samples a channel, must have a multiple of {self._chunk}{also}"
            )
        if length > self._most_chunks * self._chunk:
            raise Refused(f"audio.pcm: has {length // self._chunk} chunks, a message may hold {self._most_chunks}")
        first = self.next_frame
        self.next_frame += length // self._chunk
        self._lead = 0
        return first, samples


def check_enrollment(request: pb.EnrollRequest, longest: float) -> Samples:
    """The enrollment speech ``[N]`` of a request, of at most ``longest`` seconds.

    Raises:
        Refused: the rate, the length or a sample cannot be accepted; the message names the field.
    """
    if request.sample_rate != ENROLLMENT_RATE:
        raise Refused(f"sample_rate: is {request.sample_rate}, must be {ENROLLMENT_RATE}")
    try:
        speech: Samples = decode_pcm(request.pcm, request.pcm_encoding, 1)[0]
    except ValueError as error:
        raise Refused(str(error)) from None
    shortest = ENROLLMENT_SECONDS[0]
    seconds = len(speech) / ENROLLMENT_RATE
    if not shortest <= seconds <= longest:
        raise Refused(f"pcm: has {seconds:.2f} s of speech, must have {shortest:g} to {longest:g} s")
    return speech
