"""The public interface: enhancement in a program of one's own, in whole signals or chunk by chunk."""

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
from knowledge_boosting.device_client import speakers
from knowledge_boosting.device_client.audio.files import resample
from knowledge_boosting.device_client.boosted_stream import BoostedStream, frames_of
from knowledge_boosting.device_client.engines.loading import EngineName, load_model
from knowledge_boosting.device_client.hints.reconnecting import LiveHints
from knowledge_boosting.device_client.hints.stream import Encodings
from knowledge_boosting.models.bundle import DEFAULT_BUNDLE, Bundle
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, ModelConfig, Pair

Samples = NDArray[np.float32]
Speaker = ArrayLike | str | PathLike[str]
_RATES = (1000, 384_000)  # Hz
_NONE = Credentials()


@dataclass(frozen=True)
class Statistics:
    """What has become of the hints of an :class:`Enhancer`."""

    frames: int  # that were processed
    hints_due: int  # frames that could have had a hint
    hints_used: int
    hints_late: int  # that came, but after their frame
    overflows: int  # frames at which the network gave no numbers, and the input was given in its place
    server: str | None  # that hints come from now


class Enhancer:
    """A stream that is enhanced as it comes, chunk by chunk, helped by a server's hints.

    ``process`` never waits for a server: a hint that is not there in time is left out. Connecting, and finding another
    server when one is lost, happen in the background.

    Use it from one thread; :meth:`set_server` and :attr:`statistics` may be used from others. It is a context manager,
    which closes it.
    """

    _stream: BoostedStream
    _begun: bool  # whether the first chunk is there
    _late: int  # of sessions with servers that were left

    def __init__(
        self,
        bundle: str | PathLike[str] | Bundle = DEFAULT_BUNDLE,
        *,
        server: str | Sequence[str] | None = None,
        speaker: Speaker | None = None,
        credentials: Credentials = _NONE,
        engine: EngineName = "onnx",
    ) -> None:
        """Load a bundle, and look for its server if one is given: for 3 s at most, then in the background.

        Args:
            bundle: one that was opened, the name of a shipped one, or the path of one.
            server: ``HOST:PORT``; of several, the next one is taken when one is lost. None: the small network alone.
            speaker: for target speech extraction, whom to extract: an embedding ``[256]``, the path of an ``.npy`` file
                with one, or the name of somebody who was enrolled.
            credentials: that the server wants.
            engine: what computes the small network.

        Raises:
            InputError: the bundle, the speaker or an address cannot be used, or server and device do not accept each
                other.
            Failure: the engine is not installed.
        """
        self._model = load_model(_opened(bundle), engine)
        self._config, self._manifest = self._model.manifest.model, self._model.manifest
        self._speaker = _embedding(speaker, self._config)
        self._credentials, self._servers = credentials, _servers(server)
        self._lock = threading.Lock()
        self._hints: LiveHints | None = None
        self._begin()
        if self._hints is not None:
            try:
                self._hints.settle()
            except BaseException:
                self.close()
                raise

    @property
    def sample_rate(self) -> int:
        """Hz, of what goes in and comes out."""
        return self._config.framing.sample_rate

    @property
    def chunk(self) -> int:
        """Samples that :meth:`process` takes and gives."""
        return self._config.framing.chunk

    @property
    def channels(self) -> int:
        """Microphones M."""
        return self._config.microphones

    @property
    def speakers(self) -> int:
        """Speakers S in the output: 2 for separation, 1 for target speech extraction."""
        return self._config.sources

    @property
    def latency(self) -> int:
        """Samples that the output is behind the input: one chunk, because a frame looks ahead into the next one."""
        return self._config.framing.chunk

    @property
    def statistics(self) -> Statistics:
        """What has become of the hints since the start, or since :meth:`reset`."""
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
        """The next chunk. This never waits for a server.

        Args:
            chunk: ``[M, chunk]`` samples, full scale 1; ``[chunk]`` or ``[1, chunk]`` is used for all microphones.

        Returns:
            ``[S, M, chunk]`` samples of the speakers, :attr:`latency` samples behind; the first chunk is zeros.

        Raises:
            InputError: the chunk is of another shape, or of integers.
        """
        samples, size = _floats("process", chunk), self._config.framing.chunk
        if samples.shape not in ((self.channels, size), (1, size)):
            raise InputError(
                f"process: got samples of shape {list(np.shape(chunk))}; give [{self.channels}, {size}] or [{size}]"
            )
        lookahead = self._config.framing.lookahead
        if not self._begun:
            # The first frame is complete when its lookahead is there.
            self._stream.fresh[:, :size] = samples
            self._begun = True
            return np.zeros((self.speakers, self.channels, size), np.float32)
        self._stream.fresh[:, -lookahead:] = samples[:, :lookahead]
        estimate = self._step()
        if lookahead < size:
            self._stream.fresh[:, : size - lookahead] = samples[:, lookahead:]
        return estimate

    def finish(self) -> Samples:
        """The last chunk ``[S, M, chunk]``, when no more samples come; :meth:`reset` begins again."""
        if not self._begun:
            return np.zeros((self.speakers, self.channels, self.chunk), np.float32)
        self._stream.fresh[:, -self._config.framing.lookahead :] = 0
        return self._step()

    def reset(self) -> None:
        """Begin again, as if nothing had been heard."""
        self._end_hints()
        self._begin()

    def set_server(self, server: str | Sequence[str] | None) -> None:
        """Take hints from another server, or from none, from now on. Does not wait until it answers.

        Raises:
            InputError: an address cannot be used.
        """
        servers = _servers(server)
        hints = self._connect(servers, self._stream.frames)
        with self._lock:
            self._servers = servers
            before, self._hints = self._hints, hints
            self._stream.hints = hints
            self._late += before.late if before is not None else 0
        if before is not None:
            threading.Thread(target=before.close, name="kb-close", daemon=True).start()

    def close(self) -> None:
        """End the session with the server. The stream may go on without."""
        self._end_hints()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> None:
        self._hints = self._connect(self._servers, 0)
        self._stream = BoostedStream(self._model.session(self._speaker), self._config, self._hints, ramp=True)
        self._begun = False
        self._late = 0

    def _connect(self, servers: Sequence[str], first_frame: int) -> LiveHints | None:
        if not servers:
            return None
        if not isinstance(self._config, Pair):
            raise InputError(f"{self._manifest.name}: is one network alone; leave out the server")
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
    engine: EngineName = "onnx",
) -> Samples:
    """A whole signal through the small network of a bundle, without a server.

    Args:
        samples: ``[M, N]``, full scale 1; ``[N]`` or ``[1, N]`` is used for all microphones.
        rate: their rate, Hz. The output has it too, and holds what is below half of the bundle's rate.
        bundle: one that was opened, the name of a shipped one, or the path of one.
        speaker: for target speech extraction, whom to extract; see :class:`Enhancer`.
        engine: what computes the small network.

    Returns:
        ``[S, M, N]`` samples of the S speakers.

    Raises:
        InputError: samples, rate, bundle or speaker cannot be used.
        Failure: the engine is not installed.
    """
    model = load_model(_opened(bundle), engine)
    config = model.manifest.model
    embedding = _embedding(speaker, config)
    heard, microphones = _floats("enhance", samples), config.microphones
    if heard.ndim != 2 or heard.shape[0] not in (1, microphones) or not heard.shape[1]:
        raise InputError(
            f"enhance: got samples of shape {list(np.shape(samples))}; give [{microphones}, N] or [N], N at least 1"
        )
    if not _RATES[0] <= rate <= _RATES[1]:
        raise InputError(f"enhance: the rate is {rate} Hz; it must be from {_RATES[0]} to {_RATES[1]}")
    if not np.isfinite(heard).all():
        raise InputError("enhance: some samples are not finite")
    length, framing = heard.shape[1], config.framing
    at_rate = resample(np.broadcast_to(heard, (microphones, length)), rate, framing.sample_rate)
    stream, parts = BoostedStream(model.session(embedding), config), list[Samples]()
    for fresh, count in frames_of([at_rate], framing):
        stream.fresh[:] = fresh
        parts.append(stream.step(0).estimate[..., :count])
    estimate = np.concatenate(parts, axis=-1) if parts else np.zeros((config.sources, microphones, 0), np.float32)
    back = resample(estimate, framing.sample_rate, rate)[..., :length]
    return np.pad(back, ((0, 0), (0, 0), (0, length - back.shape[-1])))


def _opened(bundle: str | PathLike[str] | Bundle) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle(Path(bundle))


def _floats(where: str, values: ArrayLike) -> Samples:
    """Samples as float32, with an axis of channels."""
    array = _array(where, values)
    if array.dtype.kind != "f":
        raise InputError(f"{where}: the samples are of {array.dtype}; give floating-point numbers, full scale 1")
    return np.atleast_2d(array.astype(np.float32))


def _array(where: str, values: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError(f"{where}: got no array ({reason(error)})") from None


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
        raise InputError("this bundle extracts one speaker; say whom: an embedding, an .npy file, or a name")
    if isinstance(speaker, PathLike):
        return speakers.read_embedding(Path(speaker))
    if isinstance(speaker, str):
        return speakers.load(speaker)
    given = _array("speaker", speaker)
    embedding = given.astype(np.float32) if given.dtype.kind in "fiu" else np.zeros(0, np.float32)
    if embedding.shape != (SPEAKER_EMBEDDING_SIZE,) or not np.isfinite(embedding).all() or not embedding.any():
        raise InputError(f"speaker: an embedding has {SPEAKER_EMBEDDING_SIZE} finite numbers, not all of them zero")
    return embedding
