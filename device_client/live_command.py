"""``kb-client live``: from microphone to loudspeaker, until somebody ends it."""

import gc
import json
import signal
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live

from common.cli import warn
from common.errors import InputError
from device_client import live_view, speakers
from device_client.device_audio import DeviceAudio, open_device_audio
from device_client.engine import EngineName, load_model
from device_client.hint_stream import Encodings
from device_client.live import LiveLoop
from device_client.live_audio import LiveAudio, open_file_audio
from device_client.live_hints import LiveHints
from device_client.mixer import Mixer, Play
from device_client.recording import Recorder, check_folder
from device_client.virtual_mic import OUTPUT_DEVICE, virtual_mic
from models.manifest import UNTRAINED_NOTICE, Manifest, find_bundle, read_manifest
from protos.codec import Samples

# A thread that waits for the interpreter gets it after so long; the default of 5 ms is most of a frame.
_SWITCH_INTERVAL = 0.0005  # seconds
_COLLECT_EVERY = 10.0  # seconds
_FILES = (".wav", ".flac", ".ogg")


@dataclass(frozen=True)
class LiveOptions:
    """The flags of ``kb-client live``; its help says what each means."""

    bundle: str
    engine: EngineName
    servers: tuple[str, ...]
    source: str | None
    target: str | None
    rate: int | None
    buffer_ms: float
    play: Play
    speaker: str | None
    record: Path | None
    virtual_mic: str | None
    json_lines: bool
    pcm_encoding: str
    hint_encoding: str


def live(options: LiveOptions) -> None:
    """Run live until the audio ends, a key says so, or the process is told to.

    Raises:
        InputError: a flag, a device or a file is at fault. Nothing has been started.
        Failure: the audio device went away, or a recording could not be kept up.
    """
    directory = find_bundle(options.bundle)
    manifest = read_manifest(directory)
    speaker = _speaker_embedding(options, manifest)
    _check_call(options, manifest)
    hints = None
    if options.servers:
        encodings = Encodings(options.pcm_encoding, options.hint_encoding)
        hints = LiveHints(options.servers, manifest, encodings=encodings, speaker_embedding=speaker)
    model = load_model(directory, options.engine)
    with ExitStack() as stack:
        audio = _open_audio(options, manifest, stack)
        recorder = None
        if options.record is not None:
            recorder = Recorder(options.record, manifest, speaker, options.play)
            stack.callback(recorder.close)
        loop = LiveLoop(model.session(speaker), manifest.model, audio, hints, options.play, recorder)
        if manifest.untrained:
            warn(UNTRAINED_NOTICE)
        if manifest.model.boosting is not None and hints is None:
            warn("no --server was given: the small network works alone")
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: audio.stop()))
        if hints is not None:
            hints.start()
            stack.callback(hints.close)
        _run(options, manifest, loop, audio, hints, stack)


def _run(
    options: LiveOptions,
    manifest: Manifest,
    loop: LiveLoop,
    audio: LiveAudio,
    hints: LiveHints | None,
    stack: ExitStack,
) -> None:
    trouble: list[BaseException] = []

    def run_loop() -> None:
        try:
            loop.run()
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=run_loop, name="kb-frames")
    stack.callback(sys.setswitchinterval, sys.getswitchinterval())
    sys.setswitchinterval(_SWITCH_INTERVAL)
    # What is there now is there to stay; collections look at what has come since, and this thread says when.
    gc.collect()
    gc.freeze()
    gc.disable()
    stack.callback(gc.unfreeze)
    stack.callback(gc.enable)
    audio.start()
    thread.start()
    try:
        _show(options, manifest, loop, audio, hints, thread)
    finally:
        audio.stop()
        thread.join()
    if trouble:
        raise trouble[0]


def _show(
    options: LiveOptions,
    manifest: Manifest,
    loop: LiveLoop,
    audio: LiveAudio,
    hints: LiveHints | None,
    thread: threading.Thread,
) -> None:
    """Tell how it goes until the loop has ended."""
    chunk_seconds = manifest.model.framing.chunk_seconds
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not options.json_lines
    if on_terminal:
        _show_view(manifest, loop, audio, hints, thread)
    else:
        every = 1.0 if options.json_lines else 10.0
        _show_lines(options.json_lines, every, chunk_seconds, loop, audio, hints, thread)
    now = live_view.figures(loop, hints, audio, chunk_seconds)
    if options.json_lines:
        print(json.dumps({"event": "ended", **asdict(now)}), flush=True)
    else:
        print(live_view.log_line(now))
    slow = live_view.too_slow(now)
    if slow is not None:
        warn(slow)


def _show_lines(
    as_json: bool,
    every: float,
    chunk_seconds: float,
    loop: LiveLoop,
    audio: LiveAudio,
    hints: LiveHints | None,
    thread: threading.Thread,
) -> None:
    next_line, next_collection = time.monotonic() + every, time.monotonic() + _COLLECT_EVERY
    while thread.is_alive():
        thread.join(timeout=0.1)
        while hints is not None and hints.events:
            event = hints.events.popleft()
            if as_json:
                print(json.dumps({"event": "server", **asdict(event)}), flush=True)
            elif event.connected:
                print(event.text, flush=True)
            else:
                warn(event.text)
        if time.monotonic() >= next_line and thread.is_alive():
            next_line += every
            now = live_view.figures(loop, hints, audio, chunk_seconds)
            print(json.dumps({"event": "figures", **asdict(now)}) if as_json else live_view.log_line(now), flush=True)
        if time.monotonic() >= next_collection:
            next_collection += _COLLECT_EVERY
            gc.collect()


def _show_view(
    manifest: Manifest, loop: LiveLoop, audio: LiveAudio, hints: LiveHints | None, thread: threading.Thread
) -> None:
    framing, model = manifest.model.framing, manifest.model
    latency = f"{1e3 * framing.n_fft / framing.sample_rate:g} ms of the frames"
    if isinstance(audio, DeviceAudio):
        resampling = f", {audio.resampling_ms:.1f} of it resampling from {audio.rate} Hz" if audio.resampling_ms else ""
        latency = f"{audio.latency_ms:.0f} ms from microphone to loudspeaker{resampling}"
    budget_ms = 1e3 * model.delay * framing.chunk_seconds if hints is not None else None
    frame = live_view.Frame(f"kb-client live   {manifest.label}", latency, budget_ms, loop.choices)
    before: Play = loop.play if loop.play != "bypass" else "1"
    last_event, next_collection = "", time.monotonic() + _COLLECT_EVERY
    console = Console()
    with live_view.keyboard() as key, Live(console=console, screen=True, auto_refresh=False) as screen:
        while thread.is_alive():
            pressed = key(0.1).lower()
            if pressed == "q":
                audio.stop()
            elif pressed == " ":
                loop.play, before = (before, before) if loop.play == "bypass" else ("bypass", loop.play)
            elif pressed in ("1", "2") and pressed in loop.choices:
                loop.play = "1" if pressed == "1" else "2"
            elif pressed == "b" and "both" in loop.choices:
                loop.play = "both"
            elif pressed == "h":
                loop.hints_on = not loop.hints_on
            while hints is not None and hints.events:
                last_event = hints.events.popleft().text
            now = live_view.figures(loop, hints, audio, framing.chunk_seconds)
            screen.update(live_view.view(now, frame, last_event), refresh=True)
            if time.monotonic() >= next_collection:
                next_collection += _COLLECT_EVERY
                gc.collect()


def _check_call(options: LiveOptions, manifest: Manifest) -> None:
    """Whether the flags fit each other and the bundle."""
    model, name = manifest.model, options.bundle
    if options.servers and model.boosting is None:
        raise InputError(f"{name}: is one network alone; leave out --server")
    choices = Mixer(model.sources, model.microphones, "bypass").choices
    if options.play not in choices:
        raise InputError(f"--play {options.play}: with {name} it can be {', '.join(choices)}")
    if _is_file(options.source) != _is_file(options.target):
        raise InputError("--input and --output must both be devices, or both be files")
    if _is_file(options.source) and options.rate is not None:
        raise InputError("--rate is for devices; a file says its rate itself")
    if options.virtual_mic is not None and options.target is not None:
        raise InputError("--virtual-mic plays to the microphone of that name; leave out --output")
    if options.record is not None:
        check_folder(options.record)


def _is_file(name: str | None) -> bool:
    return name is not None and Path(name).suffix.lower() in _FILES


def _speaker_embedding(options: LiveOptions, manifest: Manifest) -> Samples | None:
    if manifest.model.task == "ss":
        if options.speaker is not None:
            raise InputError(f"{options.bundle}: separates all speakers; leave out --speaker")
        return None
    if options.speaker is None:
        raise InputError(f"{options.bundle}: extracts a target speaker; give --speaker a name from kb-client enroll")
    return speakers.load(options.speaker)


def _open_audio(options: LiveOptions, manifest: Manifest, stack: ExitStack) -> LiveAudio:
    framing, microphones = manifest.model.framing, manifest.model.microphones
    if options.source is not None and options.target is not None and _is_file(options.source):
        files = open_file_audio(Path(options.source), Path(options.target), framing, microphones)
        return stack.enter_context(files)
    target = options.target
    if options.virtual_mic is not None:
        stack.enter_context(virtual_mic(options.virtual_mic, options.rate or framing.sample_rate))
        target = OUTPUT_DEVICE
    devices = open_device_audio(options.source, target, framing, microphones, options.rate, options.buffer_ms)
    return stack.enter_context(devices)
