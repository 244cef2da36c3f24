"""One session with a server: audio out, hints in."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import numpy as np

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.connection import call_failed, connect
from knowledge_boosting.common.errors import Failure, InputError, printable
from knowledge_boosting.models.manifest import Manifest
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import (
    ENROLLMENT_RATE,
    HINT_ENCODINGS,
    MAX_HINT,
    PCM_ENCODINGS,
    PROTOCOL_VERSION,
    Samples,
    decode_hint,
    encode_pcm,
)
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub

# Seconds.
_CONNECT_TIMEOUT = 5.0  # for a server that is there to accept a connection
_ANSWER_TIMEOUT = 60.0  # for a session, or an embedding; the server may have to load what that needs
_NONE = Credentials()


@dataclass(frozen=True)
class ReceivedHint:
    """A hint as it came off the wire."""

    frame: int
    hint: Samples | None  # [channels, F]; None: ready after the deadline, and not sent
    payload_bytes: int
    queue_us: int
    compute_us: int


@dataclass(frozen=True)
class StreamEnd:
    """Why no more hints come."""

    status: str
    detail: str


@dataclass(frozen=True)
class Encodings:
    """How samples and hints travel: names from the protocol's tables."""

    pcm: str = "f32"
    hints: str = "f32"


class HintStream:
    """A session of hints for one stretch of audio.

    ``send`` never blocks. ``receive`` blocks until the next hint, and returns None once the stream has ended; ``ended``
    then says why.
    """

    def __init__(
        self,
        server: str,
        manifest: Manifest,
        *,
        encodings: Encodings,
        credentials: Credentials = _NONE,
        speaker_embedding: Samples | None = None,
        hold: Callable[[int, int], None] | None = None,
        first_frame: Callable[[], int] = lambda: 0,
        deadline_ms: int = 0,
        reproducible: bool = False,
        patience: float = _ANSWER_TIMEOUT,
    ) -> None:
        """Open a session.

        Args:
            server: ``HOST:PORT``.
            manifest: of the device's bundle; the server must run the same.
            credentials: that the server wants.
            speaker_embedding: ``[256]``, for TSE.
            hold: called with (frame, payload bytes) on the sending thread before a message goes out; may wait.
            first_frame: asked, once the server has answered, for the frame at which the audio begins.
            deadline_ms: age at which a hint is of no use any more, and its values need not come; 0: all are wanted.
            reproducible: whether the same audio must give the same hints to the last bit; the server takes longer then.
            patience: seconds that the server has for the session, and at most to accept a connection.

        Raises:
            Refused: the two ends do not accept each other.
            InputError: the server cannot be reached or refuses the session.
            Failure: the server cannot serve it now.
        """
        self._manifest = manifest
        self._encodings = encodings
        self._pcm_encoding = PCM_ENCODINGS[encodings.pcm]
        self._hint_encoding = HINT_ENCODINGS[encodings.hints]
        self._hold = hold
        self._outbox: queue.SimpleQueue[tuple[int, Samples] | None] = queue.SimpleQueue()
        self._channel = connect(server, credentials, min(patience, _CONNECT_TIMEOUT))
        self.first_frame = self._next_frame = self._end_sent = first_frame()
        self._config = pb.SessionConfig(
            protocol_version=PROTOCOL_VERSION,
            bundle_name=manifest.name,
            bundle_id=manifest.id,
            sample_rate=manifest.model.framing.sample_rate,
            speaker_embedding=speaker_embedding.tolist() if speaker_embedding is not None else [],
            pcm_encoding=self._pcm_encoding,
            hint_encoding=self._hint_encoding,
            first_frame=self.first_frame,
            hint_deadline_ms=deadline_ms,
            reproducible=reproducible,
        )
        self.draining = False  # whether the server has said that it will end the session
        self.bytes_up = 0
        self.bytes_down = 0
        self.ended: StreamEnd | None = None
        self._call = HintServiceStub(self._channel).StreamHints(self._requests(), metadata=credentials.metadata)
        timer = threading.Timer(patience, self._call.cancel)
        timer.start()
        try:
            first = next(self._call)
        except (grpc.RpcError, StopIteration):
            self.close()
            if not timer.is_alive():
                raise Failure(f"{server}: gave no session within {patience:g} s; try again") from None
            raise call_failed(server, "refused the session", self._call) from None
        finally:
            timer.cancel()
        if first.WhichOneof("response") != "started":
            self.close()
            raise InputError(f"{server}: answered a session's configuration with no start; is kb-server running there?")
        self.session_id = first.started.session_id

    def send(self, frame: int, samples: Samples) -> None:
        """Send the samples ``[M, n]`` that complete a frame; the first ones with the lookahead before them."""
        framing = self._manifest.model.framing
        before = framing.lookahead if frame == self.first_frame else 0
        self._end_sent = frame + (samples.shape[1] - before) // framing.chunk
        self._outbox.put((frame, samples))

    def receive(self) -> ReceivedHint | None:
        """The next hint, in frame order; None when the stream has ended."""
        if self.ended is not None:
            return None
        model = self._manifest.model
        try:
            response = next(self._call)
            while response.WhichOneof("response") == "draining":
                if self.draining:
                    raise ValueError("the server said more than once that it shuts down")
                self.draining = True
                response = next(self._call)
            hint = response.hint
            if hint.frame != self._next_frame:
                raise ValueError(f"hint of frame {hint.frame} came where that of {self._next_frame} was due")
            if hint.frame >= self._end_sent:
                raise ValueError(f"hint of frame {hint.frame} came before its audio was sent")
            late = self._config.hint_deadline_ms and not hint.payload
            values = None if late else decode_hint(hint, self._hint_encoding, model.hint_channels, model.framing.bins)
            if values is not None and np.abs(values).max() > MAX_HINT:
                raise ValueError(f"hint of frame {hint.frame} has values above {MAX_HINT:g}")
        except StopIteration:
            self.ended = StreamEnd("OK", "the server ended the session")
            return None
        except grpc.RpcError:
            self.ended = StreamEnd(self._call.code().name, printable(str(self._call.details())[:1000]))
            return None
        except ValueError as error:
            self.ended = StreamEnd("DATA_LOSS", str(error))
            self._call.cancel()
            return None
        self._next_frame += 1
        self.bytes_down += len(hint.payload)
        return ReceivedHint(hint.frame, values, len(hint.payload), hint.queue_us, hint.compute_us)

    def finish(self) -> None:
        """Tell the server that no more audio comes; hints still under way can be received."""
        self._outbox.put(None)

    def close(self) -> None:
        """End the session now."""
        self._outbox.put(None)
        self._call.cancel()
        self._channel.close()

    def _requests(self) -> Iterator[pb.StreamHintsRequest]:
        yield pb.StreamHintsRequest(config=self._config)
        while (item := self._outbox.get()) is not None:
            frame, samples = item
            pcm = encode_pcm(samples, self._pcm_encoding)
            if self._hold is not None:
                self._hold(frame, len(pcm))
            self.bytes_up += len(pcm)
            yield pb.StreamHintsRequest(audio=pb.AudioChunk(first_frame=frame, pcm=pcm))


def enroll(server: str, speech: Samples, credentials: Credentials = _NONE) -> Samples:
    """The speaker embedding ``[256]`` that a server makes of enrollment speech ``[N]`` at 16 kHz.

    Raises:
        Refused: the two ends do not accept each other.
        InputError: the server cannot be reached, has no speaker encoder, or refuses the speech.
        Failure: it took too long, or failed.
    """
    encoding = PCM_ENCODINGS["f32"]
    request = pb.EnrollRequest(
        sample_rate=ENROLLMENT_RATE, pcm_encoding=encoding, pcm=encode_pcm(speech[None], encoding)
    )
    with connect(server, credentials, _CONNECT_TIMEOUT) as channel:
        try:
            stub = HintServiceStub(channel)
            response = stub.Enroll(request, timeout=_ANSWER_TIMEOUT, metadata=credentials.metadata)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call):
                raise call_failed(server, "cannot enroll", error) from None
            raise Failure(f"{server}: cannot enroll ({error})") from None
    return np.array(response.speaker_embedding, dtype=np.float32)
