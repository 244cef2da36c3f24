"""The public Python interface: enhance whole signals, or a stream chunk by chunk."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.sound_files import RATES
from knowledge_boosting.device_client import speakers
from knowledge_boosting.device_client.audio.files import resample
from knowledge_boosting.device_client.boosted_stream import BoostedStream, split_frames
from knowledge_boosting.device_client.engines.loading import EngineName, load_model
from knowledge_boosting.device_client.hints.reconnecting import LiveHints
from knowledge_boosting.device_client.hints.stream import Encodings
from knowledge_boosting.models.bundle import DEFAULT_BUNDLE, Bundle
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, ModelConfig, Pair

Samples = NDArray[np.float32]
Speaker = ArrayLike | str | PathLike[str]
_NO_CREDENTIALS = Credentials()


@dataclass(frozen=True)
class Statistics:
    """Counts of frames and hints of an :class:`Enhancer`."""

    frames: int  # frames that were processed
    hints_due: int  # frames that could have had a hint
    hints_used: int  # hints that were fused
    hints_late: int  # hints that missed their deadline
    overflows: int  # frames whose estimate was not finite, so that the output is the input
    server: str | None  # address of the server from which hints come now


class Enhancer:
    """Enhances a stream chunk by chunk, with hints from a server if one is given.

    :meth:`process` never waits for a server. A hint that is late is not used. A background thread connects to the
    server, and to another one if the server is lost.

    Use an object from one thread only. :meth:`set_server` and :attr:`statistics` can be used from any thread. An object
    is also a context manager, which closes it at the end of the block.
    """

    _stream: BoostedStream
    _has_first_chunk: bool
    _late: int  # late hints of servers that were replaced

    def __init__(
        self,
        bundle: str | PathLike[str] | Bundle = DEFAULT_BUNDLE,
        *,
        server: str | Sequence[str] | None = None,
        speaker: Speaker | None = None,
        credentials: Credentials = _NO_CREDENTIALS,
        engine: EngineName = "auto",
    ) -> None:
        """Load a bundle and connect to its server, if one is given.

        The call waits up to 3 seconds for the server. After that, the connection is made in the background.

        Args:
            bundle: An opened bundle, the name of a shipped bundle, or the path of a bundle.
            server: The address ``HOST:PORT``, or several addresses. If a server is lost, the next one is tried. None:
                no hints.
            speaker: For target speech extraction, the speaker to extract: an embedding ``[256]``, the path of an
                ``.npy`` file with an embedding, or the name of an enrolled speaker.
            credentials: The credentials for the server.
            engine: The engine that runs the small network: ``auto``, ``compiled``, ``onnx`` or ``torch``.

        Raises:
            InputError: The bundle, the speaker or an address cannot be used, or server and device do not accept each
                other.
            Failure: The engine is not installed.
        """
        self._model = load_model(_open_bundle(bundle), engine)
        self._config, self._manifest = self._model.manifest.model, self._model.manifest
        self._speaker = _embedding(speaker, self._config)
        self._credentials, self._servers = credentials, _servers(server)
        self._lock = threading.Lock()
        self._hints: LiveHints | None = None
        self._begin()
        if self._hints is not None:
            try:
                self._hints.wait_for_server()
            except BaseException:
                self.close()
                raise

    @property
    def sample_rate(self) -> int:
        """The sample rate of input and output, Hz."""
        return self._config.framing.sample_rate

    @property
    def chunk(self) -> int:
        """The number of samples in each chunk of :meth:`process`."""
        return self._config.framing.chunk

    @property
    def channels(self) -> int:
        """The number of microphones M."""
        return self._config.microphones

    @property
    def speakers(self) -> int:
        """The number of speakers S in the output: 2 for separation, 1 for target speech extraction."""
        return self._config.sources

    @property
    def latency(self) -> int:
        """The delay of the output in samples. It is one chunk, because each frame looks ahead into the next one."""
        return self._config.framing.chunk

    @property
    def statistics(self) -> Statistics:
        """The counts since the start or the last call of :meth:`reset`."""
        with self._lock:
            hints, late = self._hints, self._late
        return Statistics(
            self._stream.frames,
            self._stream.hints_due,
            self._stream.hints_used,
            late + (hints.late if hints is not None else 0),
            self._stream.engine.overflows,
            hints.server if hints is not None else None,
        )

    def process(self, chunk: ArrayLike) -> Samples:
        """Process the next chunk. This never waits for a server.

        Args:
            chunk: Samples ``[M, chunk]`` in floating point, where full scale is 1. Samples ``[chunk]`` or
                ``[1, chunk]`` are used for all microphones.

        Returns:
            Samples ``[S, M, chunk]`` of the speakers, delayed by :attr:`latency` samples. The first chunk is zeros.

        Raises:
            InputError: The chunk has another shape, or it has integers.
        """
        samples, size = _floats("process", chunk), self._config.framing.chunk
        if samples.shape not in ((self.channels, size), (1, size)):
            raise InputError(
                f"process: got samples of shape {list(np.shape(chunk))}; give [{self.channels}, {size}] or [{size}]"
            )
        lookahead = self._config.framing.lookahead
        if not self._has_first_chunk:
            # The first frame needs the lookahead samples of the second chunk too.
            self._stream.fresh[:, :size] = samples
            self._has_first_chunk = True
            return np.zeros((self.speakers, self.channels, size), np.float32)
        self._stream.fresh[:, -lookahead:] = samples[:, :lookahead]
        estimate = self._step()
        if lookahead < size:
            self._stream.fresh[:, : size - lookahead] = samples[:, lookahead:]
        return estimate

    def finish(self) -> Samples:
        """End the stream and return its last chunk ``[S, M, chunk]``. Call :meth:`reset` to start a new stream."""
        if not self._has_first_chunk:
            return np.zeros((self.speakers, self.channels, self.chunk), np.float32)
        self._stream.fresh[:, -self._config.framing.lookahead :] = 0
        return self._step()

    def reset(self) -> None:
        """Start a new stream with an empty state."""
        self._end_hints()
        self._begin()

    def set_server(self, server: str | Sequence[str] | None) -> None:
        """Use hints from another server, or from no server. The call does not wait for an answer.

        Args:
            server: As for :class:`Enhancer`.

        Raises:
            InputError: An address cannot be used.
        """
        servers = _servers(server)
        with self._lock:
            hints = self._connect(servers, self._stream.frames)
            self._servers = servers
            previous, self._hints = self._hints, hints
            self._stream.hints = hints
            self._late += previous.late if previous is not None else 0
        if previous is not None:
            threading.Thread(target=previous.close, name="kb-close", daemon=True).start()

    def close(self) -> None:
        """End the session with the server. The stream can continue without hints."""
        self._end_hints()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> None:
        engine = self._model.session(self._speaker)
        with self._lock:
            self._hints = self._connect(self._servers, 0)
            self._stream = BoostedStream(engine, self._config, self._hints, ramp=True)
            self._has_first_chunk = False
            self._late = 0

    def _connect(self, servers: Sequence[str], first_frame: int) -> LiveHints | None:
        if not servers:
            return None
        if not isinstance(self._config, Pair):
            raise InputError(f"{self._manifest.name}: is one network alone and uses no hints; leave out the server")
        hints = LiveHints(
            servers,
            self._manifest,
            encodings=Encodings(),
            credentials=self._credentials,
            speaker_embedding=self._speaker,
            first_frame=first_frame,
        )
        hints.start()
        return hints

    def _end_hints(self) -> None:
        with self._lock:
            hints, self._hints = self._hints, None
            self._stream.hints = None
            self._late += hints.late if hints is not None else 0
        if hints is not None:
            hints.close()

    def _step(self) -> Samples:
        return self._stream.step(time.perf_counter_ns()).estimate


def enhance(
    samples: ArrayLike,
    rate: int,
    bundle: str | PathLike[str] | Bundle = DEFAULT_BUNDLE,
    *,
    speaker: Speaker | None = None,
    engine: EngineName = "auto",
) -> Samples:
    """Enhance a whole signal with the small network of a bundle, without a server.

    Args:
        samples: Samples ``[M, N]`` in floating point, where full scale is 1. Samples ``[N]`` or ``[1, N]`` are used for
            all microphones.
        rate: The rate of the samples and of the output, Hz. The output contains only frequencies below half the
            bundle's rate.
        bundle: An opened bundle, the name of a shipped bundle, or the path of a bundle.
        speaker: For target speech extraction, the speaker to extract, as for :class:`Enhancer`.
        engine: The engine that runs the small network: ``auto``, ``compiled``, ``onnx`` or ``torch``.

    Returns:
        Samples ``[S, M, N]`` of the S speakers.

    Raises:
        InputError: The samples, the rate, the bundle or the speaker cannot be used.
        Failure: The engine is not installed.
    """
    model = load_model(_open_bundle(bundle), engine)
    config = model.manifest.model
    embedding = _embedding(speaker, config)
    signal, microphones = _floats("enhance", samples), config.microphones
    if signal.ndim != 2 or signal.shape[0] not in (1, microphones) or not signal.shape[1]:
        raise InputError(
            f"enhance: got samples of shape {list(np.shape(samples))}; give [{microphones}, N] or [N] with N at least 1"
        )
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"enhance: the rate is {rate} Hz; it must be from {RATES[0]} to {RATES[1]} Hz")
    if not np.isfinite(signal).all():
        raise InputError("enhance: some samples are not finite; replace NaN and infinity")
    length, framing = signal.shape[1], config.framing
    resampled = resample(np.broadcast_to(signal, (microphones, length)), rate, framing.sample_rate)
    stream, parts = BoostedStream(model.session(embedding), config), list[Samples]()
    for fresh, count in split_frames([resampled], framing):
        stream.fresh[:] = fresh
        parts.append(stream.step(0).estimate[..., :count])
    estimate = np.concatenate(parts, axis=-1) if parts else np.zeros((config.sources, microphones, 0), np.float32)
    output = resample(estimate, framing.sample_rate, rate)[..., :length]
    return np.pad(output, ((0, 0), (0, 0), (0, length - output.shape[-1])))


def _open_bundle(bundle: str | PathLike[str] | Bundle) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle(Path(bundle))


def _floats(argument: str, values: ArrayLike) -> Samples:
    """Convert samples to float32, with an axis of channels."""
    array = _array(argument, values)
    if array.dtype.kind != "f":
        text = f"{argument}: the samples are of type {array.dtype}; give floating-point numbers with full scale 1"
        raise InputError(text)
    return np.atleast_2d(array.astype(np.float32))


def _array(argument: str, values: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError(f"{argument}: cannot be converted to an array ({reason(error)})") from None


def _servers(server: str | Sequence[str] | None) -> tuple[str, ...]:
    if server is None:
        return ()
    return (server,) if isinstance(server, str) else tuple(server)


def _embedding(speaker: Speaker | None, config: ModelConfig) -> Samples | None:
    if not config.needs_speaker:
        if speaker is not None:
            raise InputError("this bundle separates all speakers; leave out the speaker")
        return None
    if speaker is None:
        raise InputError("this bundle extracts one speaker; give the speaker as an embedding, an .npy file or a name")
    if isinstance(speaker, PathLike):
        return speakers.read_embedding(Path(speaker))
    if isinstance(speaker, str):
        return speakers.load(speaker)
    array = _array("speaker", speaker)
    embedding = array.astype(np.float32) if array.dtype.kind in "fiu" else np.zeros(0, np.float32)
    if not speakers.is_embedding(embedding):
        raise InputError(f"speaker: an embedding has {SPEAKER_EMBEDDING_SIZE} finite numbers, not all of them zero")
    return embedding
