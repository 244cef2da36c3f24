"""``kb-client replay``: from files to files."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from common.call_credentials import Credentials
from common.cli import warn
from common.errors import Failure, InputError
from device_client import audio, simulated_network
from device_client import report as reporting
from device_client.engine import EngineName, Model, load_model, needs_torch
from device_client.hint_buffer import HintLog
from device_client.hint_stream import Encodings, HintStream, enroll
from device_client.local_server import local_server
from device_client.quality import match_sources, si_sdr, snr
from device_client.recording import replay_recording
from device_client.replay import Hints, RealHints, Run, VirtualHints, run_frames
from device_client.speakers import read_embedding
from models.config import SPEAKER_EMBEDDING_SIZE, ModelConfig
from models.manifest import Manifest, find_bundle, read_manifest
from protos.codec import Samples


@dataclass(frozen=True)
class ReplayOptions:
    """The flags of ``kb-client replay``; its help says what each means."""

    input_file: Path
    output: Path
    bundle: str
    engine: EngineName
    server: str | None
    credentials: Credentials
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
    output_format: audio.SampleFormat
    report: Path | None
    plot: Path | None


@dataclass(frozen=True)
class _Inputs:
    """What the files hold, checked."""

    samples: Samples  # [M, N] at the file's rate
    rate: int
    mixture: Samples  # [M, N] at the bundle's rate
    references: Samples | None  # [S, M, N] at the file's rate
    enrollment: Samples | None  # speech [N] at ENROLLMENT_RATE, or an embedding [256]


def replay_file(options: ReplayOptions) -> None:
    """Run a recording and write what came of it.

    Raises:
        InputError: a flag or a file is at fault. Nothing has been written.
        Failure: the server does not start, or was lost and is required.
    """
    began = time.perf_counter()
    directory = find_bundle(options.bundle)
    if options.frame_log is not None:
        _check_frame_log_call(options)
        replay_recording(options.frame_log, options.input_file, options.output, load_model(directory, options.engine))
        return
    manifest = read_manifest(directory)
    _check_call(options, manifest)
    conditions = simulated_network.conditions_of(
        options.network,
        delay_ms=options.delay_ms,
        jitter_ms=options.jitter_ms,
        loss=options.loss,
        bandwidth_mbit=options.bandwidth_mbit,
    )
    trace = simulated_network.read_trace(options.trace) if options.trace is not None else None
    outputs = _output_paths(options, manifest.model)
    inputs = _read_inputs(options, manifest.model)
    model = load_model(directory, options.engine)
    baseline = None
    if options.alone is not None:
        baseline = _load_baseline(options.alone, options.engine, manifest.model)

    with ExitStack() as stack:
        server = None
        if manifest.model.boosting is not None:
            server = options.server or stack.enter_context(local_server(directory))
        embedding = _speaker_embedding(inputs.enrollment, server, options.credentials)
        log = _new_log(inputs.mixture, manifest.model)
        hints = None
        if server is not None:
            hints = _open_hints(options, manifest, server, embedding, log, conditions, trace, stack)
        run = _run_frames("replay", model, inputs.mixture, embedding, hints, log)
    if run.lost is not None:
        what = f"the server was lost after {run.hints_received} hints ({run.lost.status}: {run.lost.detail})"
        if options.require_server:
            raise Failure(f"{what}; nothing was written")
        warn(f"{what}; the rest ran on the small network alone")

    estimates = {"boosted" if hints is not None else "small_without_hints": run.output}
    if inputs.references is not None and hints is not None:
        alone_log = _new_log(inputs.mixture, manifest.model)
        alone = _run_frames("without hints", model, inputs.mixture, embedding, None, alone_log)
        estimates["small_without_hints"] = alone.output
    if baseline is not None:
        estimates["alone"] = _run_frames(
            "alone", baseline, inputs.mixture, embedding, None, _new_log(inputs.mixture, baseline.manifest.model)
        ).output
    if options.with_large:
        estimates["large"] = _large_estimate(options.bundle, inputs.mixture, embedding)
    length = inputs.samples.shape[1]
    at_file_rate = {
        name: audio.fit_length(audio.resample(estimate, manifest.model.framing.sample_rate, inputs.rate), length)
        for name, estimate in estimates.items()
    }
    sources = at_file_rate["boosted" if hints is not None else "small_without_hints"]

    comment = f"bundle {manifest.label}" if manifest.untrained else None
    clipped = sum(
        audio.write_audio(path, source, inputs.rate, options.output_format, comment)
        for path, source in zip(outputs, sources, strict=True)
    )
    if clipped:
        warn(f"{clipped} samples exceed full scale and were clipped; --output-format float keeps them")
    seconds = length / inputs.rate
    network = reporting.network_report(
        conditions,
        trace=str(options.trace) if options.trace is not None else None,
        server_ms=None if options.real_clock else options.server_ms or 0,
        pcm=options.pcm_encoding,
        hints=options.hint_encoding,
    )
    report = reporting.Report(
        bundle=reporting.bundle_report(manifest),
        input=str(options.input_file),
        seconds=round(seconds, 6),
        sample_rate=inputs.rate,
        outputs=[str(path) for path in outputs],
        clipped_samples=clipped,
        clock="real" if options.real_clock else "virtual",
        seed=options.seed,
        network=network if hints is not None else None,
        frames=len(log.used),
        hints=reporting.hint_report(run, seconds) if hints is not None else None,
        server_lost=reporting.lost_report(run),
        quality=_quality(inputs.samples, at_file_rate, inputs.references),
        timing=reporting.timing(
            run,
            manifest.model,
            server="none" if hints is None else options.server or "local",
            wall_seconds=time.perf_counter() - began,
        ),
    )
    if options.report is not None:
        reporting.write_report(options.report, report)
    if options.compare is not None and inputs.references is not None:
        _compare(options.compare, options.input_file, manifest, inputs, at_file_rate, report.quality)
    if options.plot is not None:
        _plot(options.plot, options.input_file, manifest, inputs, sources, run)
    Console().print(reporting.table(report))


def _load_baseline(bundle: str, engine: EngineName, model: ModelConfig) -> Model:
    """One network alone, to stand beside a bundle's.

    Raises:
        InputError: it is no network alone, or made for other signals.
    """
    other = read_manifest(find_bundle(bundle)).model
    if other.boosting is not None:
        raise InputError(f"{bundle}: is a pair; give --alone the bundle of one network alone")
    if (other.task, other.microphones, other.framing) != (model.task, model.microphones, model.framing):
        raise InputError(f"{bundle}: is not of the task, microphones and framing of --bundle; give --alone one that is")
    return load_model(find_bundle(bundle), engine)


def _large_estimate(bundle: str, mixture: Samples, embedding: Samples | None) -> Samples:
    with needs_torch("--with-large"):
        from device_client.torch_engine import large_estimate
    return large_estimate(bundle, mixture, embedding)


def _check_call(options: ReplayOptions, manifest: Manifest) -> None:
    """Whether the flags fit each other and the bundle."""
    task, name = manifest.model.task, options.bundle
    if task == "tse" and options.enrollment is None:
        raise InputError(f"{name}: extracts a target speaker; give --enrollment FILE with a voice or an embedding")
    if task == "ss" and options.enrollment is not None:
        raise InputError(f"{name}: separates all speakers; leave out --enrollment")
    measuring = {"--with-large": options.with_large, "--alone": options.alone, "--compare": options.compare}
    for flag, wanted in measuring.items():
        if wanted and not options.references:
            raise InputError(f"{flag}: measures; give --reference to measure against")
    given = (options.network, options.delay_ms, options.jitter_ms, options.loss, options.bandwidth_mbit)
    simulated = options.trace is not None or any(value is not None for value in given)
    if manifest.model.boosting is None and (
        options.server is not None or options.with_large or options.real_clock or simulated
    ):
        raise InputError(
            f"{name}: is one network alone; leave out --with-large, --clock and the flags of server and network"
        )
    if options.trace is not None and any(value is not None for value in given):
        raise InputError("--trace holds the whole network; leave out the flags of the simulated one")
    if options.server_ms is not None and options.real_clock:
        raise InputError("--server-ms is for the virtual clock; on the real one the server takes what it takes")


def _check_frame_log_call(options: ReplayOptions) -> None:
    """A recorded session has its hints, its speaker and its network in it."""
    given = (
        *(options.server, options.enrollment, options.alone, options.compare, options.network, options.trace),
        *(options.delay_ms, options.jitter_ms, options.loss, options.bandwidth_mbit, options.server_ms),
        *(options.report, options.plot),
    )
    if any(value is not None for value in given) or options.references or options.with_large or options.real_clock:
        raise InputError("--frame-log runs a recorded session again: give only --output, --bundle and --engine with it")


def _output_paths(options: ReplayOptions, model: ModelConfig) -> list[Path]:
    """Where the estimates go, one file a source; all files to be written have been checked."""
    outputs = [options.output]
    if model.sources > 1:
        stem = options.output.stem
        outputs = [options.output.with_stem(f"{stem}-speaker{number}") for number in range(1, model.sources + 1)]
    read = [path for path in (options.input_file, *options.references, options.enrollment) if path is not None]
    for path in (*outputs, options.report, options.plot):
        if path is not None and path.resolve() in [other.resolve() for other in read]:
            raise InputError(f"{path}: would overwrite an input; choose another name")
    for path in outputs:
        audio.check_output(path, options.output_format)
    if options.report is not None and not options.report.parent.is_dir():
        raise InputError(f"{options.report}: no folder {options.report.parent}; make it first")
    if options.plot is not None:
        from device_client.plot import check_plot

        check_plot(options.plot)
    if options.compare is not None and options.compare.exists() and not options.compare.is_dir():
        raise InputError(f"{options.compare}: is a file; give --compare a folder")
    if options.compare is not None and any(path.resolve().parent == options.compare.resolve() for path in read):
        raise InputError(
            f"{options.compare}: holds an input, which could be overwritten; give --compare another folder"
        )
    return outputs


def _read_inputs(options: ReplayOptions, model: ModelConfig) -> _Inputs:
    recording = audio.read_audio(options.input_file)
    samples, warning = audio.to_microphones(recording, model.microphones, options.input_file)
    if warning:
        warn(warning)
    references = None
    if options.references:
        if len(options.references) != model.sources:
            raise InputError(f"--reference: give it {model.sources} times for this bundle, once for each source")
        references = np.stack(
            [_read_reference(path, recording, model.microphones, options.input_file) for path in options.references]
        )
    return _Inputs(
        samples=samples,
        rate=recording.rate,
        mixture=audio.resample(samples, recording.rate, model.framing.sample_rate),
        references=references,
        enrollment=_read_enrollment(options.enrollment) if options.enrollment is not None else None,
    )


def _read_reference(path: Path, mixture: audio.Recording, microphones: int, mixture_path: Path) -> Samples:
    recording = audio.read_audio(path)
    if recording.rate != mixture.rate or recording.samples.shape[1] != mixture.samples.shape[1]:
        raise InputError(f"{path}: must have the sample rate and the length of {mixture_path}")
    samples, _ = audio.to_microphones(recording, microphones, path)
    if not np.ptp(samples, axis=1).all():
        raise InputError(f"{path}: is silent, nothing can be measured against it")
    return samples


def _read_enrollment(path: Path) -> Samples:
    """Speech ``[N]`` at 16 kHz, or an embedding ``[256]``."""
    if path.suffix == ".npy":
        return read_embedding(path)
    return audio.read_speech(path)


def _speaker_embedding(enrollment: Samples | None, server: str | None, credentials: Credentials) -> Samples | None:
    if enrollment is None or len(enrollment) == SPEAKER_EMBEDDING_SIZE:
        return enrollment
    if server is None:
        raise InputError("--enrollment: this bundle runs without a server, which makes embeddings; give one as .npy")
    return enroll(server, enrollment, credentials)


def _new_log(mixture: Samples, model: ModelConfig) -> HintLog:
    return HintLog(model.framing.frames(mixture.shape[1]), model.delay)


def _open_hints(
    options: ReplayOptions,
    manifest: Manifest,
    server: str,
    embedding: Samples | None,
    log: HintLog,
    conditions: simulated_network.NetworkConditions,
    trace: simulated_network.Trace | None,
    stack: ExitStack,
) -> Hints:
    """A session with the server, on the clock that was asked for; ``stack`` ends it."""
    model = manifest.model
    uplink, downlink = simulated_network.make_links(
        conditions, spacing_ns=round(model.framing.chunk_seconds * 1e9), seed=options.seed, trace=trace
    )
    open_stream = partial(
        HintStream,
        server,
        manifest,
        encodings=Encodings(options.pcm_encoding, options.hint_encoding),
        credentials=options.credentials,
        speaker_embedding=embedding,
    )
    if options.real_clock:
        real = RealHints(model.delay, log, uplink=uplink, downlink=downlink)
        stream = open_stream(hold=real.hold)
        stack.callback(stream.close)
        real.start(stream)
        return real
    stream = open_stream(reproducible=True)
    stack.callback(stream.close)
    return VirtualHints(
        stream,
        model.delay,
        log,
        uplink=uplink,
        downlink=downlink,
        server_ns=round((options.server_ms or 0) * 1e6),
        sample_bytes=model.microphones * (2 if options.pcm_encoding == "s16" else 4),
    )


def _run_frames(
    label: str, model: Model, mixture: Samples, embedding: Samples | None, hints: Hints | None, log: HintLog
) -> Run:
    config = model.manifest.model
    engine = model.session(embedding)
    with _progress(label, len(log.used)) as advance:
        return run_frames(engine, mixture, config.framing, config.delay, hints, log, advance)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A function to call once a frame; a bar appears on a terminal after two seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    bar = Progress(console=console, transient=True)
    task = bar.add_task(label, total=total)
    began, done = time.monotonic(), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done % 16 == 0:
            if not bar.live.is_started and time.monotonic() - began > 2:
                bar.start()
            bar.update(task, completed=done)

    try:
        yield advance
    finally:
        bar.stop()


def _quality(
    mixture: Samples, estimates: dict[str, Samples], references: Samples | None
) -> dict[str, reporting.Quality]:
    if references is None:
        return {}
    before = si_sdr(mixture, references).mean(), snr(mixture, references).mean()
    quality = {"mixture": reporting.Quality(si_sdr=round(float(before[0]), 3), si_sdri=0, snri=0)}
    for name in ("alone", "small_without_hints", "boosted", "large"):
        if name in estimates:
            matched = estimates[name][list(match_sources(estimates[name], references))]
            after = si_sdr(matched, references).mean(), snr(matched, references).mean()
            quality[name] = reporting.Quality(
                si_sdr=round(float(after[0]), 3),
                si_sdri=round(float(after[0] - before[0]), 3),
                snri=round(float(after[1] - before[1]), 3),
            )
    return quality


def _compare(
    folder: Path,
    input_file: Path,
    manifest: Manifest,
    inputs: _Inputs,
    estimates: dict[str, Samples],
    quality: dict[str, reporting.Quality],
) -> None:
    from device_client.comparison import Comparison, System, write_comparison

    assert inputs.references is not None
    systems: dict[System, Samples] = {}
    for name in ("alone", "boosted", "large"):
        if name in estimates:
            # Separated voices come in any order: here all in that of the references.
            systems[name] = estimates[name][list(match_sources(estimates[name], inputs.references))]
    gains = {name: quality[name].si_sdri for name in systems}
    systems["reference"] = inputs.references
    title = f"{input_file.name}, bundle {manifest.label}"
    comparison = Comparison(inputs.samples, systems, gains, inputs.rate, manifest.model.task, title)
    write_comparison(folder, comparison)


def _plot(path: Path, input_file: Path, manifest: Manifest, inputs: _Inputs, sources: Samples, run: Run) -> None:
    from device_client.plot import plot_replay

    shown = {"mixture": inputs.samples}
    for number, source in enumerate(sources, start=1):
        shown[f"output, speaker {number}" if len(sources) > 1 else "output"] = source
    notice = " - UNTRAINED, random weights" if manifest.untrained else ""
    title = f"{input_file.name}, bundle {manifest.name}{notice}"
    budget_ms = 1000 * manifest.model.delay * manifest.model.framing.chunk_seconds
    plot_replay(path, title, shown, inputs.rate, run.log if manifest.model.boosting else None, run.ended_at, budget_ms)
