"""One session with a server, which sends audio and receives hints; and the enrollment of a speaker."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import numpy as np

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.connection import call_failed, connect, off_main_thread
from knowledge_boosting.common.errors import Failure, InputError, printable
from knowledge_boosting.device_client.speakers import is_embedding
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

_CONNECT_TIMEOUT = 5.0  # seconds
_ANSWER_TIMEOUT = 60.0  # seconds until a session starts; the server loads the bundle if needed
_ENROLL_TIMEOUT = 180.0  # seconds; on a busy machine, loading the speaker encoder alone can take a minute
_NO_CREDENTIALS = Credentials()


@dataclass(frozen=True)
class ReceivedHint:
    """A hint that a server has sent."""

    frame: int
    hint: Samples | None  # [channels, F]; None: it was late at the server, which did not send its values
    payload_bytes: int
    queue_us: int  # time that the audio waited in the server, microseconds
    compute_us: int  # time that the large network took, microseconds


@dataclass(frozen=True)
class StreamEnd:
    """Why a stream of hints has ended."""

    status: str  # name of a gRPC status
    detail: str


@dataclass(frozen=True)
class Encodings:
    """The encodings of samples and hints on the wire, by their names in :mod:`protos.codec`.

    The smallest ones are the default. They cost nothing that can be heard (``benchmarks/hint_traffic.py``).
    """

    pcm: str = "s16"
    hints: str = "int8"


class HintStream:
    """A session with a server for one continuous stream of audio.

    :meth:`send` never blocks. :meth:`receive` blocks until the next hint. When the stream has ended, it returns None,
    and ``ended`` gives the reason.
    """

    def __init__(
        self,
        server: str,
        manifest: Manifest,
        *,
        encodings: Encodings,
        credentials: Credentials = _NO_CREDENTIALS,
        speaker_embedding: Samples | None = None,
        before_send: Callable[[int, int], None] | None = None,
        first_frame: Callable[[], int] = lambda: 0,
        deadline_ms: int = 0,
        reproducible: bool = False,
        timeout: float = _ANSWER_TIMEOUT,
    ) -> None:
        """Open a session.

        Args:
            server: The address of the server, ``HOST:PORT``.
            manifest: The manifest of the device's bundle. The server must run the same bundle.
            encodings: The encodings of samples and hints.
            credentials: The credentials for the server.
            speaker_embedding: ``[256]`` for TSE, otherwise None.
            before_send: Called with the frame and the size of the payload in bytes before a message is sent. It runs on
                the sending thread, and can wait.
            first_frame: Called when the server has accepted the connection. Returns the first frame of the audio.
            deadline_ms: The age at which a hint is late, so that the server omits its values. 0: no deadline.
            reproducible: Whether the same audio must give bit-identical hints. Then the server needs more time.
            timeout: Seconds until the session must have started. It also limits the time for the connection.

        Raises:
            Refused: Client and server do not accept each other.
            InputError: The server cannot be reached, or it refuses the session.
            Failure: The server cannot serve the session now.
        """
        self._manifest = manifest
        self._encodings = encodings
        self._pcm_encoding = PCM_ENCODINGS[encodings.pcm]
        self._hint_encoding = HINT_ENCODINGS[encodings.hints]
        self._before_send = before_send
        self._outbox: queue.SimpleQueue[tuple[int, Samples] | None] = queue.SimpleQueue()
        self.draining = False  # whether the server has announced that it will end the session
        self.bytes_up = 0
        self.bytes_down = 0
        self.ended: StreamEnd | None = None
        self._open(server, credentials, speaker_embedding, first_frame, deadline_ms, reproducible, timeout)

    @off_main_thread
    def _open(
        self,
        server: str,
        credentials: Credentials,
        speaker_embedding: Samples | None,
        first_frame: Callable[[], int],
        deadline_ms: int,
        reproducible: bool,
        timeout: float,
    ) -> None:
        manifest = self._manifest
        self._channel = connect(server, credentials, min(timeout, _CONNECT_TIMEOUT))
        self.first_frame = self._next_frame = self._sent = first_frame()
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
        self._call = HintServiceStub(self._channel).StreamHints(self._requests(), metadata=credentials.metadata)
        timer = threading.Timer(timeout, self._call.cancel)
        timer.start()
        try:
            first = next(self._call)
        except (grpc.RpcError, StopIteration):
            self.close()
            if not timer.is_alive():
                raise Failure(f"{server}: did not start a session within {timeout:g} s; try again") from None
            raise call_failed(server, "refused the session", self._call) from None
        finally:
            timer.cancel()
        if first.WhichOneof("response") != "started":
            self.close()
            raise InputError(f"{server}: did not follow the protocol; check that kb-server runs at this address")
        self.session_id = first.started.session_id

    def send(self, frame: int, samples: Samples) -> None:
        """Send the samples ``[M, n]`` that complete one or more frames, beginning with ``frame``.

        The first call also includes the lookahead samples before them.
        """
        framing = self._manifest.model.framing
        before = framing.lookahead if frame == self.first_frame else 0
        self._sent = frame + (samples.shape[1] - before) // framing.chunk
        self._outbox.put((frame, samples))

    def receive(self) -> ReceivedHint | None:
        """Wait for the next hint, in frame order. Return None when the stream has ended."""
        if self.ended is not None:
            return None
        model = self._manifest.model
        try:
            response = next(self._call)
            while response.WhichOneof("response") == "draining":
                if self.draining:
                    raise ValueError("the server announced its shutdown more than once")
                self.draining = True
                response = next(self._call)
            hint = response.hint
            if hint.frame != self._next_frame:
                raise ValueError(f"hint of frame {hint.frame} came instead of that of frame {self._next_frame}")
            if hint.frame >= self._sent:
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
        """End the audio. The hints of the audio that was sent can still be received."""
        self._outbox.put(None)

    def close(self) -> None:
        """End the session at once."""
        self._outbox.put(None)
        self._call.cancel()
        self._channel.close()

    def _requests(self) -> Iterator[pb.StreamHintsRequest]:
        yield pb.StreamHintsRequest(config=self._config)
        while (item := self._outbox.get()) is not None:
            frame, samples = item
            pcm = encode_pcm(samples, self._pcm_encoding)
            if self._before_send is not None:
                self._before_send(frame, len(pcm))
            self.bytes_up += len(pcm)
            yield pb.StreamHintsRequest(audio=pb.AudioChunk(first_frame=frame, pcm=pcm))


@off_main_thread
def enroll(server: str, speech: Samples, credentials: Credentials = _NO_CREDENTIALS) -> Samples:
    """Have a server compute the speaker embedding ``[256]`` of enrollment speech ``[N]`` at 16 kHz.

    Raises:
        Refused: Client and server do not accept each other.
        InputError: The server cannot be reached, has no speaker encoder, or refuses the speech.
        Failure: The server took too long, or it failed.
    """
    encoding = PCM_ENCODINGS["f32"]
    request = pb.EnrollRequest(
        sample_rate=ENROLLMENT_RATE, pcm_encoding=encoding, pcm=encode_pcm(speech[None], encoding)
    )
    with connect(server, credentials, _CONNECT_TIMEOUT) as channel:
        try:
            stub = HintServiceStub(channel)
            response = stub.Enroll(request, timeout=_ENROLL_TIMEOUT, metadata=credentials.metadata)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call):
                raise call_failed(server, "cannot enroll", error) from None
            raise Failure(f"{server}: cannot enroll ({error})") from None
    embedding = np.array(response.speaker_embedding, dtype=np.float32)
    if not is_embedding(embedding):
        raise Failure(f"{server}: cannot enroll (its answer is no speaker embedding); use another server")
    return embedding
