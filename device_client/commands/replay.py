"""``kb-client replay``: enhance a recording, with hints under simulated network conditions."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import Progress

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.cli import console, warn
from knowledge_boosting.common.errors import Failure, InputError, printable
from knowledge_boosting.common.files import is_standard_output
from knowledge_boosting.common.links import (
    NetworkConditions,
    Trace,
    make_links,
    network_conditions,
    read_trace,
)
from knowledge_boosting.device_client.audio.files import (
    AudioFile,
    OutputStream,
    check_channels,
    open_audio,
    read_speech,
    write_sound,
)
from knowledge_boosting.device_client.commands.replay_call import (
    ReplayOptions,
    check_call,
    check_frame_log_call,
    output_paths,
)
from knowledge_boosting.device_client.commands.replay_outputs import compare, plot, write_page
from knowledge_boosting.device_client.engines.engine import Model
from knowledge_boosting.device_client.engines.loading import EngineName, load_model, needs_torch
from knowledge_boosting.device_client.hints.local_server import local_server
from knowledge_boosting.device_client.hints.stream import Encodings, HintStream, enroll
from knowledge_boosting.device_client.live.recording import replay_recording
from knowledge_boosting.device_client.replay import report as reporting
from knowledge_boosting.device_client.replay.delay_curve import DELAYS_MS, KeptHints
from knowledge_boosting.device_client.replay.hint_log import HintLog
from knowledge_boosting.device_client.replay.loop import Hints, RealHints, Run, VirtualHints, run_frames
from knowledge_boosting.device_client.replay.quality import Measured, qualities
from knowledge_boosting.device_client.speakers import read_embedding
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, ModelConfig, Pair
from knowledge_boosting.models.manifest import Manifest
from knowledge_boosting.protos.codec import Samples

if TYPE_CHECKING:
    from knowledge_boosting.device_client.replay.plot import Spectrogram


def replay_file(options: ReplayOptions) -> None:
    """Enhance a recording, and write and print the results.

    Raises:
        InputError: A flag or a file cannot be used. Nothing has been written.
        Failure: The local server does not start, or a server that is required was lost.
    """
    started = time.perf_counter()
    bundle = Bundle(options.bundle)
    if options.frame_log is not None:
        check_frame_log_call(options)
        replay_recording(options.frame_log, options.input_file, options.output, load_model(bundle, options.engine))
        return
    manifest, config = bundle.manifest, bundle.model
    check_call(options, manifest)
    conditions = network_conditions(
        options.network,
        delay_ms=options.delay_ms,
        jitter_ms=options.jitter_ms,
        loss=options.loss,
        bandwidth_mbit=options.bandwidth_mbit,
    )
    trace = read_trace(options.trace) if options.trace is not None else None
    outputs = output_paths(options, bundle)
    with ExitStack() as stack:
        source = stack.enter_context(open_audio(options.input_file))
        if (warning := check_channels(source, config.microphones)) is not None:
            warn(warning)
        if options.page is not None:
            from knowledge_boosting.device_client.replay.page import check_page

            check_page(options.page, source.length / source.rate)
        measured = _read_measured(options, source, config) if options.references else None
        keeps_estimates = measured is not None or options.page is not None
        enrollment = _read_enrollment(options.enrollment) if options.enrollment is not None else None
        model = load_model(bundle, options.engine)
        baseline = _load_baseline(options.alone, options.engine, config) if options.alone is not None else None
        server = None
        if isinstance(config, Pair):
            server = options.server or stack.enter_context(local_server(bundle.directory))
        embedding = _speaker_embedding(enrollment, server, options.credentials)

        run = _new_run(source, config)
        if options.page is not None and measured is not None and config.on_arrival:
            run.kept = {}
        pictures = _pictures(options, source, config)
        parts: dict[str, list[Samples]] = {}  # the blocks of each system's estimate
        system = "boosted" if server is not None else "small_without_hints"
        with ExitStack() as files:
            comment = f"bundle {manifest.label}" if manifest.untrained else None
            writers = [
                files.enter_context(
                    write_sound(
                        path,
                        source.rate,
                        config.sources * config.microphones // len(outputs),
                        source.length,
                        options.output_format,
                        comment,
                    )
                )
                for path in outputs
            ]

            def write(estimate: Samples) -> None:
                for writer, samples in zip(writers, estimate.reshape(len(writers), -1, estimate.shape[2]), strict=True):
                    writer.write(samples)
                for picture, samples in zip(pictures[1:], estimate, strict=False):
                    picture.add(samples[0])
                if keeps_estimates:
                    parts.setdefault(system, []).append(estimate)

            with ExitStack() as session:
                hints = None
                if server is not None:
                    hints = _open_hints(options, manifest, server, embedding, run, conditions, trace, session)
                _run_frames("replay", model, source, embedding, hints, run, write)
            if run.lost is not None:
                text = f"the server was lost after {run.hints_received} hints ({run.lost.status}: {run.lost.detail})"
                if options.require_server:
                    raise Failure(f"{text}; nothing was written")
                warn(f"{text}; the small network continued without hints")
        clipped = sum(writer.clipped for writer in writers)
        if clipped:
            warn(f"{clipped} samples exceed full scale and were clipped; give --output-format float to keep them")

        if keeps_estimates:
            others = {}
            if measured is not None and server is not None:
                others["without hints"] = "small_without_hints", model
            if baseline is not None:
                others["alone"] = "alone", baseline
            for label, (name, other) in others.items():
                append = parts.setdefault(name, []).append
                _run_frames(label, other, source, embedding, None, _new_run(source, config), append)
            if options.with_large:
                parts["large"] = _large_estimate(bundle, source, config, embedding)
        estimates = {name: np.concatenate(blocks, axis=-1) for name, blocks in parts.items()}
        parts.clear()
        gains = {}
        if run.kept and measured is not None:
            gains = _gains_by_delay(model, source, embedding, run.kept, measured)
        mixture = _microphones(source, config.microphones) if options.page is not None else None
        if pictures:
            for block in source.blocks():
                pictures[0].add(block[0])

    seconds = source.length / source.rate
    network = reporting.network_report(
        conditions,
        trace=printable(options.trace) if options.trace is not None else None,
        server_ms=None if options.real_clock else options.server_ms or 0,
        pcm=options.pcm_encoding,
        hints=options.hint_encoding,
    )
    report = reporting.Report(
        bundle=reporting.bundle_report(manifest),
        input=printable(options.input_file),
        seconds=round(seconds, 6),
        sample_rate=source.rate,
        outputs=[printable(path) for path in outputs],
        clipped_samples=clipped,
        clock="real" if options.real_clock else "virtual",
        seed=options.seed,
        network=network if server is not None else None,
        frames=len(run.log.used),
        overflows=run.overflows,
        hints=reporting.hint_report(run, config, seconds) if server is not None else None,
        server_lost=reporting.lost_report(run),
        quality=qualities(measured, estimates) if measured is not None else {},
        si_sdri_by_delay_ms=gains or None,
        timing=reporting.timing(
            run,
            config,
            server="none" if server is None else options.server or "local",
            wall_seconds=time.perf_counter() - started,
        ),
    )
    if options.report is not None:
        reporting.write_report(options.report, report)
    if options.compare is not None and measured is not None:
        compare(options, manifest, source.rate, measured, estimates, report.quality)
    if options.page is not None and mixture is not None:
        write_page(options, manifest, source.rate, mixture, measured, estimates, report, run)
    if options.plot is not None:
        plot(options.plot, options.input_file, manifest, pictures, run)
    written = (*outputs, options.report, options.plot, options.page)
    uses_standard_output = any(path is not None and is_standard_output(path) for path in written)
    console(stderr=uses_standard_output).print(reporting.table(report))


def _pictures(options: ReplayOptions, source: AudioFile, config: ModelConfig) -> "list[Spectrogram]":
    """Create the spectrograms of the mixture and of every output. Without ``--plot``, the list is empty."""
    if options.plot is None:
        return []
    from knowledge_boosting.device_client.replay.plot import Spectrogram

    return [Spectrogram(source.rate, source.length) for _ in range(1 + config.sources)]


def _load_baseline(bundle: str, engine: EngineName, model: ModelConfig) -> Model:
    """Load one network alone, for a comparison with the model of another bundle.

    Raises:
        InputError: The bundle is a pair, or it is made for other signals.
    """
    opened = Bundle(bundle)
    other = opened.model
    if isinstance(other, Pair):
        raise InputError(f"{bundle}: is a pair; give --alone the bundle of one network alone")
    if (other.task, other.microphones, other.framing) != (model.task, model.microphones, model.framing):
        text = f"{bundle}: differs from --bundle in task, microphones or framing; give --alone a bundle that matches"
        raise InputError(text)
    return load_model(opened, engine)


def _gains_by_delay(
    model: Model, source: AudioFile, embedding: Samples | None, hints: dict[int, Samples], measured: Measured
) -> dict[str, float]:
    """Return the SI-SDRi in dB with the same hints at each delay in milliseconds."""
    config, gains = model.manifest.model, dict[str, float]()
    for delay in DELAYS_MS:
        blocks: list[Samples] = []
        kept = KeptHints(config, hints, delay)
        _run_frames(f"hints after {delay} ms", model, source, embedding, kept, _new_run(source, config), blocks.append)
        gains[str(delay)] = qualities(measured, {"boosted": np.concatenate(blocks, axis=-1)})["boosted"].si_sdri
    return gains


def _large_estimate(bundle: Bundle, source: AudioFile, config: ModelConfig, embedding: Samples | None) -> list[Samples]:
    with needs_torch("--with-large"):
        from knowledge_boosting.device_client.engines.torch_engine import large_estimate
    rate = config.framing.sample_rate
    estimate = large_estimate(
        bundle, np.concatenate(list(source.resampled_blocks(config.microphones, rate)), axis=1), embedding
    )
    stream = OutputStream(estimate.shape[:2], rate, source)
    return [*stream.add(estimate), *stream.finish()]


def _read_measured(options: ReplayOptions, source: AudioFile, model: ModelConfig) -> Measured:
    if len(options.references) != model.sources:
        raise InputError(f"--reference: give it {model.sources} times for this bundle, once for each speaker")
    return Measured(
        _microphones(source, model.microphones),
        np.stack([_read_reference(path, source, model.microphones) for path in options.references]),
    )


def _microphones(file: AudioFile, microphones: int) -> Samples:
    return np.concatenate(list(file.resampled_blocks(microphones, file.rate)), axis=1)


def _read_reference(path: Path, mixture: AudioFile, microphones: int) -> Samples:
    with open_audio(path) as file:
        if (file.rate, file.length) != (mixture.rate, mixture.length):
            raise InputError(f"{path}: must have the sample rate and the length of {mixture.path}")
        check_channels(file, microphones)
        samples = _microphones(file, microphones)
    if not np.ptp(samples, axis=1).all():
        raise InputError(f"{path}: is silent; give a reference with speech")
    return samples


def _read_enrollment(path: Path) -> Samples:
    """Read speech ``[N]`` at 16 kHz, or an embedding ``[256]``."""
    if path.suffix == ".npy":
        return read_embedding(path)
    return read_speech(path)


def _speaker_embedding(enrollment: Samples | None, server: str | None, credentials: Credentials) -> Samples | None:
    if enrollment is None or len(enrollment) == SPEAKER_EMBEDDING_SIZE:
        return enrollment
    if server is None:
        text = "--enrollment: only a server computes embeddings, and this bundle uses none; give an embedding as .npy"
        raise InputError(text)
    return enroll(server, enrollment, credentials)


def _new_run(source: AudioFile, model: ModelConfig) -> Run:
    # Resampling rounds the length to the nearest sample, with a minimum of one.
    max_length = source.length * model.framing.sample_rate // source.rate + 2
    return Run(HintLog(model.framing.frames(max_length), model.delay))


def _open_hints(
    options: ReplayOptions,
    manifest: Manifest,
    server: str,
    embedding: Samples | None,
    run: Run,
    conditions: NetworkConditions,
    trace: Trace | None,
    stack: ExitStack,
) -> Hints:
    """Open a session with the server, on the selected clock. ``stack`` closes it."""
    model = manifest.model
    uplink, downlink = make_links(
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
        real = RealHints(model, run, uplink=uplink, downlink=downlink)
        stream = open_stream(before_send=real.wait_for_uplink)
        stack.callback(stream.close)
        real.start(stream)
        return real
    stream = open_stream(reproducible=True)
    stack.callback(stream.close)
    return VirtualHints(
        stream,
        model,
        run,
        uplink=uplink,
        downlink=downlink,
        server_ns=round((options.server_ms or 0) * 1e6),
        sample_bytes=model.microphones * (2 if options.pcm_encoding == "s16" else 4),
    )


def _run_frames(
    label: str,
    model: Model,
    source: AudioFile,
    embedding: Samples | None,
    hints: Hints | None,
    run: Run,
    write: Callable[[Samples], None],
) -> None:
    """Process a recording, and call ``write`` with the estimate at the recording's rate, ``[S, M, n]`` at a time."""
    config = model.manifest.model
    rate = config.framing.sample_rate
    engine, stream = (
        model.session(embedding),
        OutputStream((config.sources, config.microphones), rate, source),
    )

    def convert(estimate: Samples) -> None:
        for samples in stream.add(estimate):
            write(samples)

    with _progress(label, len(run.log.used)) as advance:
        mixture = source.resampled_blocks(config.microphones, rate)
        run_frames(engine, mixture, config, hints, run, convert, advance)
    for samples in stream.finish():
        write(samples)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each frame. On a terminal, a progress bar appears after two seconds."""
    terminal = console(stderr=True)
    if not terminal.is_terminal:
        yield lambda: None
        return
    bar = Progress(console=terminal, transient=True)
    task = bar.add_task(label, total=total)
    started, done = time.monotonic(), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done % 16 == 0:
            if not bar.live.is_started and time.monotonic() - started > 2:
                bar.start()
            bar.update(task, completed=done)

    try:
        yield advance
    finally:
        bar.stop()
