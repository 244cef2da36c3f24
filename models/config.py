"""The configuration of a model: task, framing, network sizes and boosting. It does not need torch."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from knowledge_boosting.models.tasks import TASKS, TaskName

SPEAKER_EMBEDDING_SIZE = 256
# The maximum number of values in the weights and the state of a network, half a gibibyte. The largest published network
# has 2**23.
_MAX_VALUES = 2**27


class Strict(BaseModel):
    """A frozen record that refuses unknown keys, silent conversions and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Framing(Strict):
    """The division of a signal into frames: frame ``t`` covers samples ``[chunk t, chunk (t + 1) + lookahead)``."""

    sample_rate: Annotated[int, Field(ge=1, le=384_000)] = 16000
    chunk: Annotated[int, Field(ge=1, le=8192)] = 128
    lookahead: Annotated[int, Field(ge=1, le=8192)] = 64

    @model_validator(mode="after")
    def _overlap_reaches_one_frame(self) -> Self:
        if self.lookahead > self.chunk:
            raise ValueError(f"lookahead ({self.lookahead}) must not exceed chunk ({self.chunk})")
        if (self.chunk + self.lookahead) % 2:
            raise ValueError("chunk + lookahead must be even")
        return self

    @property
    def n_fft(self) -> int:
        """The number of samples in the window of a frame."""
        return self.chunk + self.lookahead

    @property
    def bins(self) -> int:
        """The number of frequency bins F in the spectrum of a frame."""
        return self.n_fft // 2 + 1

    @property
    def chunk_seconds(self) -> float:
        """The time from one frame to the next, s."""
        return self.chunk / self.sample_rate

    def frames(self, samples: int) -> int:
        """Return the number of frames T that cover a signal of ``samples`` samples."""
        return math.ceil(samples / self.chunk)

    def complete_at(self, frame: int) -> float:
        """Return the stream time at which the window of ``frame`` has been captured, s."""
        return (self.chunk * frame + self.n_fft) / self.sample_rate


class NetworkSize(Strict):
    """The size of one TF-GridNet: D channels, H LSTM units, blocks and attention heads."""

    channels: Annotated[int, Field(ge=1, le=4096)]
    hidden: Annotated[int, Field(ge=1, le=4096)]
    blocks: Annotated[int, Field(ge=1, le=64)] = 3
    heads: Annotated[
        int, Field(ge=1, le=256, description="of self-attention, and of the cross-attention in fusion")
    ] = 4
    self_attention: bool = False
    window: Annotated[
        int, Field(ge=2, le=10_000, description="frames in the attention window, including the current one")
    ] = 50

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> Self:
        if self.self_attention and self.channels % self.heads:
            raise ValueError(f"channels ({self.channels}) must be a multiple of heads ({self.heads})")
        return self


class FixedDelay(Strict):
    """Hints that are used at one fixed age, as in the published method. A later hint is lost, an earlier one waits."""

    delay: Annotated[int, Field(ge=0, le=10_000, description="delay of a hint, frames")]
    compression: Literal[1, 2, 4] = 1


class OnArrival(Strict):
    """Hints that are used from the moment they arrive, at any age up to the attention window of the small network."""

    policy: Literal["arrival"]
    compression: Literal[1, 2, 4] = 1


def _policy(boosting: object) -> str:
    arrival = isinstance(boosting, OnArrival) or (isinstance(boosting, dict) and "policy" in boosting)
    return "arrival" if arrival else "fixed"


Boosting = Annotated[Annotated[FixedDelay, Tag("fixed")] | Annotated[OnArrival, Tag("arrival")], Discriminator(_policy)]


class _Model(Strict):
    """The common part of :class:`Alone` and :class:`Pair`."""

    task: TaskName
    microphones: Annotated[int, Field(ge=1, le=64)] = 2
    framing: Framing = Framing()
    running_level: Annotated[
        bool,
        Field(description="networks receive every signal at one level without DC offset; not for published weights"),
    ] = False

    @model_serializer(mode="wrap")
    def _omit_disabled_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The id of a bundle is a digest of this document. An option that was added later must not change the ids of
        # bundles that do not use it.
        document: dict[str, Any] = handler(self)
        if not self.running_level:
            del document["running_level"]
        return document

    @property
    def networks(self) -> Mapping[str, NetworkSize]:
        """The sizes of the networks by name."""
        return {name: value for name, value in self if isinstance(value, NetworkSize)}

    @property
    def sources(self) -> int:
        """The number of sources in the output: 1 for target speech extraction, 2 for separation."""
        return TASKS[self.task].sources

    @property
    def needs_speaker(self) -> bool:
        """Whether the network needs a speaker embedding of the target speaker."""
        return TASKS[self.task].needs_speaker

    @property
    def spectrum_channels(self) -> int:
        """The number of channels 2S' of an output spectrum: real and imaginary part for each source and microphone."""
        return 2 * self.sources * self.microphones

    @property
    def hint_channels(self) -> int:
        """The number of channels of a hint; 0 for one network alone."""
        return 0

    @property
    def on_arrival(self) -> bool:
        """Whether hints are used from the moment they arrive, and not at a fixed age."""
        return False

    @property
    def delay(self) -> int:
        """The age at which a hint can first be used, frames; 0 for one network alone."""
        return 0

    @property
    def max_age(self) -> int:
        """The age at which a hint can last be used, frames; 0 for one network alone."""
        return self.delay

    @property
    def max_age_ms(self) -> float:
        """The age at which a hint can last be used, ms; 0 for one network alone."""
        return 1000 * self.max_age * self.framing.chunk_seconds

    @model_validator(mode="after")
    def _size_is_feasible(self) -> Self:
        for name, size in self.networks.items():
            if (values := self._estimated_values(size)) > _MAX_VALUES:
                raise ValueError(
                    f"{name} would have about {values:.0e} values, more than {_MAX_VALUES:.0e}; give smaller sizes"
                )
        return self

    def _estimated_values(self, size: NetworkSize) -> int:
        """Estimate the number of values in the weights of a network and the state of one stream, from above."""
        bins, channels, hidden = self.framing.bins, size.channels, size.hidden
        lstms = 3 * 4 * hidden * (channels + hidden + 2) + 3 * hidden * channels
        keys, values = size.heads * (512 + bins), bins * channels  # of one frame; fusion has half as many
        attention = 4 * channels * (channels + bins) + (4 + size.window) * (keys + values) + 2 * channels * keys // bins
        between = 2 * (SPEAKER_EMBEDDING_SIZE + 1) * bins * channels if self.needs_speaker else 0
        waiting = self.max_age * bins * (channels + self.hint_channels)
        framing = 4 * self.framing.n_fft * bins
        return size.blocks * (lstms + 2 * attention + between + waiting) + framing


class Alone(_Model):
    """One network alone, which runs on the device without hints."""

    network: NetworkSize

    @property
    def on_device(self) -> NetworkSize:
        """The size of the network that the device runs."""
        return self.network


class Pair(_Model):
    """A small network on the device, and a large one on the server, which sends hints to it."""

    small: NetworkSize
    large: NetworkSize
    boosting: Boosting

    @model_validator(mode="after")
    def _sizes_fit_hints(self) -> Self:
        if self.small.channels % self.small.heads:
            raise ValueError(
                f"small.channels ({self.small.channels}) must be a multiple of small.heads ({self.small.heads})"
            )
        if self.spectrum_channels % self.boosting.compression:
            raise ValueError(f"compression must divide the {self.spectrum_channels} channels of the large embedding")
        return self

    @property
    def on_device(self) -> NetworkSize:
        """The size of the network that the device runs, the small one."""
        return self.small

    @property
    def hint_channels(self) -> int:
        """The number of channels of a hint."""
        return self.spectrum_channels // self.boosting.compression

    @property
    def on_arrival(self) -> bool:
        """Whether hints are used from the moment they arrive, and not at a fixed age."""
        return isinstance(self.boosting, OnArrival)

    @property
    def delay(self) -> int:
        """The age at which a hint can first be used, frames."""
        return 1 if isinstance(self.boosting, OnArrival) else self.boosting.delay

    @property
    def max_age(self) -> int:
        """The age at which a hint can last be used, frames."""
        return self.small.window if isinstance(self.boosting, OnArrival) else self.boosting.delay

    def large_alone(self) -> Alone:
        """Return the configuration of the large network alone."""
        return Alone(
            task=self.task,
            microphones=self.microphones,
            framing=self.framing,
            running_level=self.running_level,
            network=self.large,
        )


def _upgrade_version_1(document: object) -> object:
    """Convert a model of schema version 1, in which one network alone was called ``small``, to the current version."""
    if not isinstance(document, dict) or "small" not in document:
        return document
    if "network" in document:
        raise ValueError("network is for one network alone, and small is for a pair; give one of them")
    rest = {key: value for key, value in document.items() if key not in ("small", "large", "boosting")}
    parts = [document.get("large"), document.get("boosting")]
    if parts == [None, None]:
        return {**rest, "network": document["small"]}
    if None in parts:
        raise ValueError("large and boosting must be given both (a pair) or neither (one network alone)")
    return document


def _model_kind(model: object) -> str:
    pair = isinstance(model, Pair) or (isinstance(model, dict) and not _PAIR_KEYS.isdisjoint(model))
    return "pair" if pair else "alone"


_PAIR_KEYS = frozenset({"small", "large", "boosting"})
# The keys of a document decide which of the two it is.
ModelConfig = Annotated[
    Annotated[Alone, Tag("alone")] | Annotated[Pair, Tag("pair")],
    Discriminator(_model_kind),
    BeforeValidator(_upgrade_version_1),
]
MODEL: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)  # validates a document
