from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PcmEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PCM_ENCODING_UNSPECIFIED: _ClassVar[PcmEncoding]
    PCM_ENCODING_S16LE: _ClassVar[PcmEncoding]
    PCM_ENCODING_F32LE: _ClassVar[PcmEncoding]

class HintEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HINT_ENCODING_UNSPECIFIED: _ClassVar[HintEncoding]
    HINT_ENCODING_F32LE: _ClassVar[HintEncoding]
    HINT_ENCODING_F16LE: _ClassVar[HintEncoding]
    HINT_ENCODING_INT8: _ClassVar[HintEncoding]
PCM_ENCODING_UNSPECIFIED: PcmEncoding
PCM_ENCODING_S16LE: PcmEncoding
PCM_ENCODING_F32LE: PcmEncoding
HINT_ENCODING_UNSPECIFIED: HintEncoding
HINT_ENCODING_F32LE: HintEncoding
HINT_ENCODING_F16LE: HintEncoding
HINT_ENCODING_INT8: HintEncoding

class StreamHintsRequest(_message.Message):
    __slots__ = ("config", "audio")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    config: SessionConfig
    audio: AudioChunk
    def __init__(self, config: _Optional[_Union[SessionConfig, _Mapping]] = ..., audio: _Optional[_Union[AudioChunk, _Mapping]] = ...) -> None: ...

class StreamHintsResponse(_message.Message):
    __slots__ = ("started", "hint", "draining")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    started: SessionStarted
    hint: Hint
    draining: Draining
    def __init__(self, started: _Optional[_Union[SessionStarted, _Mapping]] = ..., hint: _Optional[_Union[Hint, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class SessionConfig(_message.Message):
    __slots__ = ("protocol_version", "bundle_name", "bundle_id", "sample_rate", "speaker_embedding", "pcm_encoding", "hint_encoding", "first_frame", "hint_deadline_ms", "reproducible")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_NAME_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    SPEAKER_EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    PCM_ENCODING_FIELD_NUMBER: _ClassVar[int]
    HINT_ENCODING_FIELD_NUMBER: _ClassVar[int]
    FIRST_FRAME_FIELD_NUMBER: _ClassVar[int]
    HINT_DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    REPRODUCIBLE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    bundle_name: str
    bundle_id: str
    sample_rate: int
    speaker_embedding: _containers.RepeatedScalarFieldContainer[float]
    pcm_encoding: PcmEncoding
    hint_encoding: HintEncoding
    first_frame: int
    hint_deadline_ms: int
    reproducible: bool
    def __init__(self, protocol_version: _Optional[int] = ..., bundle_name: _Optional[str] = ..., bundle_id: _Optional[str] = ..., sample_rate: _Optional[int] = ..., speaker_embedding: _Optional[_Iterable[float]] = ..., pcm_encoding: _Optional[_Union[PcmEncoding, str]] = ..., hint_encoding: _Optional[_Union[HintEncoding, str]] = ..., first_frame: _Optional[int] = ..., hint_deadline_ms: _Optional[int] = ..., reproducible: _Optional[bool] = ...) -> None: ...

class SessionStarted(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class AudioChunk(_message.Message):
    __slots__ = ("first_frame", "pcm")
    FIRST_FRAME_FIELD_NUMBER: _ClassVar[int]
    PCM_FIELD_NUMBER: _ClassVar[int]
    first_frame: int
    pcm: bytes
    def __init__(self, first_frame: _Optional[int] = ..., pcm: _Optional[bytes] = ...) -> None: ...

class Hint(_message.Message):
    __slots__ = ("frame", "payload", "scale", "queue_us", "compute_us")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    frame: int
    payload: bytes
    scale: float
    queue_us: int
    compute_us: int
    def __init__(self, frame: _Optional[int] = ..., payload: _Optional[bytes] = ..., scale: _Optional[float] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ...) -> None: ...

class EnrollRequest(_message.Message):
    __slots__ = ("sample_rate", "pcm_encoding", "pcm")
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    PCM_ENCODING_FIELD_NUMBER: _ClassVar[int]
    PCM_FIELD_NUMBER: _ClassVar[int]
    sample_rate: int
    pcm_encoding: PcmEncoding
    pcm: bytes
    def __init__(self, sample_rate: _Optional[int] = ..., pcm_encoding: _Optional[_Union[PcmEncoding, str]] = ..., pcm: _Optional[bytes] = ...) -> None: ...

class EnrollResponse(_message.Message):
    __slots__ = ("speaker_embedding",)
    SPEAKER_EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    speaker_embedding: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, speaker_embedding: _Optional[_Iterable[float]] = ...) -> None: ...

class DescribeModelRequest(_message.Message):
    __slots__ = ("bundle",)
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    def __init__(self, bundle: _Optional[str] = ...) -> None: ...

class DescribeModelResponse(_message.Message):
    __slots__ = ("protocol_version", "bundle_name", "bundle_id", "untrained", "task", "sample_rate", "microphones", "chunk", "lookahead", "delay", "hint_channels", "hint_bins", "max_chunks_per_message", "enrolls", "sessions", "max_sessions", "bundles", "on_arrival", "free_sessions")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_NAME_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    UNTRAINED_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    MICROPHONES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_FIELD_NUMBER: _ClassVar[int]
    DELAY_FIELD_NUMBER: _ClassVar[int]
    HINT_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HINT_BINS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNKS_PER_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ENROLLS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    ON_ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    FREE_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    bundle_name: str
    bundle_id: str
    untrained: bool
    task: str
    sample_rate: int
    microphones: int
    chunk: int
    lookahead: int
    delay: int
    hint_channels: int
    hint_bins: int
    max_chunks_per_message: int
    enrolls: bool
    sessions: int
    max_sessions: int
    bundles: _containers.RepeatedScalarFieldContainer[str]
    on_arrival: bool
    free_sessions: int
    def __init__(self, protocol_version: _Optional[int] = ..., bundle_name: _Optional[str] = ..., bundle_id: _Optional[str] = ..., untrained: _Optional[bool] = ..., task: _Optional[str] = ..., sample_rate: _Optional[int] = ..., microphones: _Optional[int] = ..., chunk: _Optional[int] = ..., lookahead: _Optional[int] = ..., delay: _Optional[int] = ..., hint_channels: _Optional[int] = ..., hint_bins: _Optional[int] = ..., max_chunks_per_message: _Optional[int] = ..., enrolls: _Optional[bool] = ..., sessions: _Optional[int] = ..., max_sessions: _Optional[int] = ..., bundles: _Optional[_Iterable[str]] = ..., on_arrival: _Optional[bool] = ..., free_sessions: _Optional[int] = ...) -> None: ...
