"""The flags of ``kb-client replay``, and the check that they are consistent."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.files import check_files, is_stream
from knowledge_boosting.device_client.audio.files import SampleFormat, check_output
from knowledge_boosting.device_client.engines.loading import EngineName
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import Pair
from knowledge_boosting.models.manifest import Manifest


@dataclass(frozen=True)
class ReplayOptions:
    """The flags of ``kb-client replay``. Its help explains them."""

    input_file: Path
    output: Path
    bundle: str
    engine: EngineName
    server: str | None
    credentials: Credentials
    credential_files: tuple[Path, ...]  # the files from which the credentials were read
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
    page: Path | None


def check_call(options: ReplayOptions, manifest: Manifest) -> None:
    """Check that the flags are consistent with each other and with the bundle.

    Raises:
        InputError: They are not.
    """
    needs_speaker, name = manifest.model.needs_speaker, options.bundle
    if needs_speaker and options.enrollment is None:
        raise InputError(f"{name}: extracts a target speaker; give --enrollment FILE with speech or an embedding")
    if not needs_speaker and options.enrollment is not None:
        raise InputError(f"{name}: separates all speakers; leave out --enrollment")
    others = {"--with-large": options.with_large, "--alone": options.alone} if options.page is None else {}
    for flag, value in {**others, "--compare": options.compare}.items():
        if value and not options.references:
            raise InputError(f"{flag}: needs the true sources; give --reference too")
    conditions = (options.network, options.delay_ms, options.jitter_ms, options.loss, options.bandwidth_mbit)
    simulated = options.trace is not None or any(condition is not None for condition in conditions)
    if not isinstance(manifest.model, Pair) and (
        options.server is not None or options.with_large or options.real_clock or simulated
    ):
        raise InputError(
            f"{name}: is one network alone and uses no hints; leave out --with-large, --clock and the flags for server "
            "and network conditions"
        )
    if options.trace is not None and any(condition is not None for condition in conditions):
        raise InputError("--trace defines all network conditions; leave out the other flags for network conditions")
    if options.server_ms is not None and options.real_clock:
        raise InputError("--server-ms applies only to the virtual clock; leave it out, or leave out --clock real")


def check_frame_log_call(options: ReplayOptions) -> None:
    """Check the flags of a call that repeats a recorded session, which defines hints, speaker and network conditions.

    Raises:
        InputError: A flag contradicts the recorded session.
    """
    conflicting = (
        *(options.server, options.enrollment, options.alone, options.compare, options.network, options.trace),
        *(options.delay_ms, options.jitter_ms, options.loss, options.bandwidth_mbit, options.server_ms),
        *(options.report, options.plot, options.page),
    )
    has_conflict = any(value is not None for value in conflicting)
    if has_conflict or options.references or options.with_large or options.real_clock:
        raise InputError("--frame-log repeats a recorded session; give only --output, --bundle and --engine with it")


def output_paths(options: ReplayOptions, bundle: Bundle) -> list[Path]:
    """Return the paths of the estimates, and check that all files can be written.

    There is one file for each speaker. If the output is a pipe or a device, there is one path for all speakers.

    Raises:
        InputError: A file cannot be written, or it would overwrite another one.
    """
    model, outputs = bundle.model, [options.output]
    if model.sources > 1 and not is_stream(options.output):
        stem = options.output.stem
        outputs = [options.output.with_stem(f"{stem}-speaker{number}") for number in range(1, model.sources + 1)]
    for path in outputs:
        check_output(path, options.output_format)
    folders: dict[Path, Sequence[str]] = {}
    if options.plot is not None:
        from knowledge_boosting.device_client.replay.plot import check_plot

        check_plot(options.plot)
    if options.compare is not None:
        from knowledge_boosting.device_client.replay.comparison import file_names

        folders[options.compare] = file_names(model.sources)
    reads = (
        *(options.input_file, *options.references, options.enrollment, options.trace, *options.credential_files),
        *bundle.directory.iterdir(),
        *(Bundle(options.alone).directory.iterdir() if options.alone is not None else ()),
    )
    check_files(
        [path for path in reads if path is not None],
        [path for path in (*outputs, options.report, options.plot, options.page) if path is not None],
        folders,
    )
    return outputs
