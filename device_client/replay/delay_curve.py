"""Quality by delay: one recording again, with the same hints at other delays.

Only a network that uses hints on arrival has a curve. A network with a fixed delay does not improve with faster hints,
and it uses no slower ones.
"""

from collections.abc import Mapping, Sequence

from knowledge_boosting.device_client.hints.buffer import hint_buffer
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.protos.codec import Samples

DELAYS_MS = (8, 16, 24, 48, 96, 200)


class KeptHints:
    """The hints of an earlier run, each of which arrives a constant time after the capture of its frame."""

    def __init__(self, model: ModelConfig, hints: Mapping[int, Samples], delay_ms: float) -> None:
        """Create a source of hints ``[channels, F]``, by frame. Frames without a hint get none."""
        self._hints, self._delay_ns = hints, round(1e6 * delay_ms)
        self._buffer = hint_buffer(model)

    def wait_until(self, time_ns: int) -> int:
        return time_ns

    def send(self, frame: int, samples: Samples, now: int) -> None:
        if frame in self._hints:
            self._buffer.put(frame, self._hints[frame], now + self._delay_ns)

    def take(self, frame: int, now: int) -> Sequence[Hint]:
        return self._buffer.take(frame, now)

    def finish(self) -> None:
        pass
