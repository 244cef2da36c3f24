"""A call of ``kb-client replay``: its flags, and whether they fit each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.files import check_files, is_stream
from knowledge_boosting.device_client.audio.files import SampleFormat, check_output
from knowledge_boosting.device_client.engines.loading import EngineName
from knowledge_boosting.models.config import ModelConfig, Pair
from knowledge_boosting.models.manifest import Manifest


@dataclass(frozen=True)
class ReplayOptions:
    """The flags of ``kb-client replay``; its help says what each means."""

    input_file: Path
    output: Path
    bundle: str
    engine: EngineName
    server: str | None
    credentials: Credentials
    secrets: tuple[Path, ...]  # files that the credentials are from
    enrollment: Path | None
    frame_log: Path | None
    references: tuple[Path, ...]
    with_large: bool
    alone: str | None
    compare: Path | None
    real_clock: bool
    network: str | None
    delay_ms: float | None
    jitter_ms: float | None
    loss: float | None
    bandwidth_mbit: float | None
    trace: Path | None
    seed: int
    server_ms: float | None
    require_server: bool
    pcm_encoding: str
    hint_encoding: str
    output_format: SampleFormat
    report: Path | None
    plot: Path | None


def check_call(options: ReplayOptions, manifest: Manifest) -> None:
    """Whether the flags fit each other and the bundle."""
    needs_speaker, name = manifest.model.needs_speaker, options.bundle
    if needs_speaker and options.enrollment is None:
        raise InputError(f"{name}: extracts a target speaker; give --enrollment FILE with a voice or an embedding")
    if not needs_speaker and options.enrollment is not None:
        raise InputError(f"{name}: separates all speakers; leave out --enrollment")
    measuring = {"--with-large": options.with_large, "--alone": options.alone, "--compare": options.compare}
    for flag, wanted in measuring.items():
        if wanted and not options.references:
            raise InputError(f"{flag}: measures; give --reference to measure against")
    given = (options.network, options.delay_ms, options.jitter_ms, options.loss, options.bandwidth_mbit)
    simulated = options.trace is not None or any(value is not None for value in given)
    if not isinstance(manifest.model, Pair) and (
        options.server is not None or options.with_large or options.real_clock or simulated
    ):
        raise InputError(
            f"{name}: is one network alone; leave out --with-large, --clock and the flags of server and network"
        )
    if options.trace is not None and any(value is not None for value in given):
        raise InputError("--trace holds the whole network; leave out the flags of the simulated one")
    if options.server_ms is not None and options.real_clock:
        raise InputError("--server-ms is for the virtual clock; on the real one the server takes what it takes")


def check_frame_log_call(options: ReplayOptions) -> None:
    """A recorded session has its hints, its speaker and its network in it."""
    given = (
        *(options.server, options.enrollment, options.alone, options.compare, options.network, options.trace),
        *(options.delay_ms, options.jitter_ms, options.loss, options.bandwidth_mbit, options.server_ms),
        *(options.report, options.plot),
    )
    if any(value is not None for value in given) or options.references or options.with_large or options.real_clock:
        raise InputError("--frame-log runs a recorded session again: give only --output, --bundle and --engine with it")


def output_paths(options: ReplayOptions, bundle: Path, model: ModelConfig) -> list[Path]:
    """Where the estimates go, one file a source, or all into one stream; all that is to be written has been checked."""
    outputs = [options.output]
    if model.sources > 1 and not is_stream(options.output):
        stem = options.output.stem
        outputs = [options.output.with_stem(f"{stem}-speaker{number}") for number in range(1, model.sources + 1)]
    for path in outputs:
        check_output(path, options.output_format)
    made: dict[Path, Sequence[str]] = {}
    if options.plot is not None:
        from knowledge_boosting.device_client.replay.plot import check_plot

        check_plot(options.plot)
    if options.compare is not None:
        from knowledge_boosting.device_client.replay.comparison import file_names

        made[options.compare] = file_names(model.sources)
    reads = (
        *(options.input_file, *options.references, options.enrollment, options.trace, *options.secrets),
        *bundle.iterdir(),
    )
    check_files(
        [path for path in reads if path is not None],
        [path for path in (*outputs, options.report, options.plot) if path is not None],
        made,
    )
    return outputs
