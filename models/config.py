"""What a model is, in numbers: task, framing, network sizes, boosting. Needs no torch."""

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
_MAX_VALUES = 2**27  # of a network's weights and state: half a gibibyte; the largest published one has 2**23


class Strict(BaseModel):
    """A frozen record that refuses unknown keys, silent conversions and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Framing(Strict):
    """How a signal is cut into frames: frame ``t`` covers samples ``[chunk t, chunk (t + 1) + lookahead)``."""

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
        """Samples in a frame's window."""
        return self.chunk + self.lookahead

    @property
    def bins(self) -> int:
        """Frequency bins F of a frame's spectrum."""
        return self.n_fft // 2 + 1

    @property
    def chunk_seconds(self) -> float:
        """Time from one frame to the next, seconds."""
        return self.chunk / self.sample_rate

    def frames(self, samples: int) -> int:
        """Frames T that cover a signal of ``samples`` samples."""
        return math.ceil(samples / self.chunk)

    def complete_at(self, frame: int) -> float:
        """Stream time in seconds at which the window of ``frame`` has been captured."""
        return (self.chunk * frame + self.n_fft) / self.sample_rate


class NetworkSize(Strict):
    """The size of one TF-GridNet: D channels, H LSTM units, attention heads."""

    channels: Annotated[int, Field(ge=1, le=4096)]
    hidden: Annotated[int, Field(ge=1, le=4096)]
    blocks: Annotated[int, Field(ge=1, le=64)] = 3
    heads: Annotated[int, Field(ge=1, le=256, description="of self-attention, and of the fusion's cross-attention")] = 4
    self_attention: bool = False
    window: Annotated[
        int, Field(ge=2, le=10_000, description="frames that attention sees, the current one included")
    ] = 50

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> Self:
        if self.self_attention and self.channels % self.heads:
            raise ValueError(f"channels ({self.channels}) must be a multiple of heads ({self.heads})")
        return self


class Boosting(Strict):
    """How the large network helps the small one."""

    delay: Annotated[int, Field(ge=0, le=10_000, description="frames that a hint may be late")]
    compression: Literal[1, 2, 4] = 1


class _Model(Strict):
    """What :class:`Alone` and :class:`Pair` have in common."""

    task: TaskName
    microphones: Annotated[int, Field(ge=1, le=64)] = 2
    framing: Framing = Framing()
    running_level: Annotated[
        bool,
        Field(description="networks that hear every signal at one level, without offset; published ones do not"),
    ] = False

    @model_serializer(mode="wrap")
    def _omit_disabled_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A bundle's id is a digest of this: what came later must not change the ids of bundles that do without it.
        document: dict[str, Any] = handler(self)
        if not self.running_level:
            del document["running_level"]
        return document

    @property
    def networks(self) -> Mapping[str, NetworkSize]:
        """The sizes of the networks, by the name of each."""
        raise NotImplementedError

    @property
    def on_device(self) -> NetworkSize:
        """The size of the network that the device runs."""
        raise NotImplementedError

    @property
    def sources(self) -> int:
        """Signals in the output: 1 for target speech extraction, 2 for separation."""
        return TASKS[self.task].sources

    @property
    def needs_speaker(self) -> bool:
        """Whether the network must be told, by a speaker embedding, whose voice is wanted."""
        return TASKS[self.task].needs_speaker

    @property
    def spectrum_channels(self) -> int:
        """Channels 2S' of a network's output spectrum: real and imaginary part of every source at every microphone."""
        return 2 * self.sources * self.microphones

    @property
    def hint_channels(self) -> int:
        """Channels of a hint; 0 for one network alone."""
        return 0

    @property
    def delay(self) -> int:
        """Frames that a hint may be late; 0 for one network alone."""
        return 0

    @model_validator(mode="after")
    def _size_is_feasible(self) -> Self:
        for name, size in self.networks.items():
            if (values := self._estimated_values(size)) > _MAX_VALUES:
                raise ValueError(f"{name} would have some {values:.0e} values, more than {_MAX_VALUES:.0e}")
        return self

    def _estimated_values(self, size: NetworkSize) -> int:
        """About as many values as the weights of a network have, or more, with the state of one stream."""
        bins, channels, hidden = self.framing.bins, size.channels, size.hidden
        lstms = 3 * 4 * hidden * (channels + hidden + 2) + 3 * hidden * channels
        keys, values = size.heads * (512 + bins), bins * channels  # of a frame; those of fusion are half as many
        attention = 4 * channels * (channels + bins) + (4 + size.window) * (keys + values) + 2 * channels * keys // bins
        between = 2 * (SPEAKER_EMBEDDING_SIZE + 1) * bins * channels if self.needs_speaker else 0
        waiting = self.delay * bins * (channels + self.hint_channels)
        framing = 4 * self.framing.n_fft * bins
        return size.blocks * (lstms + 2 * attention + between + waiting) + framing


class Alone(_Model):
    """One network, which runs on the device without hints."""

    network: NetworkSize

    @property
    def networks(self) -> Mapping[str, NetworkSize]:
        """Its one network."""
        return {"network": self.network}

    @property
    def on_device(self) -> NetworkSize:
        """Its one network."""
        return self.network


class Pair(_Model):
    """A small network on the device, and a large one on the server that sends it hints."""

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
    def networks(self) -> Mapping[str, NetworkSize]:
        """The small network and the large one."""
        return {"small": self.small, "large": self.large}

    @property
    def on_device(self) -> NetworkSize:
        """The small network."""
        return self.small

    @property
    def hint_channels(self) -> int:
        """Channels of a hint."""
        return self.spectrum_channels // self.boosting.compression

    @property
    def delay(self) -> int:
        """Frames that a hint may be late."""
        return self.boosting.delay

    def large_alone(self) -> Alone:
        """The large network by itself."""
        return Alone(
            task=self.task,
            microphones=self.microphones,
            framing=self.framing,
            running_level=self.running_level,
            network=self.large,
        )


def _upgrade_version_1(document: object) -> object:
    """A model of schema version 1, which called the one network ``small``, in today's words."""
    if not isinstance(document, dict) or "small" not in document or "network" in document:
        return document
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
# A model is one or the other; its keys tell which.
ModelConfig = Annotated[
    Annotated[Alone, Tag("alone")] | Annotated[Pair, Tag("pair")],
    Discriminator(_model_kind),
    BeforeValidator(_upgrade_version_1),
]
MODEL: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)  # reads and checks one
