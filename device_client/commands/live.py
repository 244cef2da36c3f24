"""``kb-client live``: enhance the audio of a microphone in real time."""

import gc
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from rich.live import Live

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.cli import console, termination_signals, warn
from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.common.files import check_files, is_standard_output, is_stream
from knowledge_boosting.device_client import speakers
from knowledge_boosting.device_client.audio.devices import DeviceAudio, open_device_audio
from knowledge_boosting.device_client.audio.files import check_output
from knowledge_boosting.device_client.audio.live_audio import LiveAudio, open_file_audio
from knowledge_boosting.device_client.audio.mixer import Mixer, Play
from knowledge_boosting.device_client.audio.virtual_mic import OUTPUT_DEVICE, virtual_mic
from knowledge_boosting.device_client.engines.loading import EngineName, load_model
from knowledge_boosting.device_client.hints.reconnecting import LiveHints, ServerEvent
from knowledge_boosting.device_client.hints.stream import Encodings
from knowledge_boosting.device_client.live import view
from knowledge_boosting.device_client.live.loop import LiveLoop
from knowledge_boosting.device_client.live.recording import FILES, Recorder, check_folder
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import Pair
from knowledge_boosting.models.manifest import UNTRAINED_NOTICE, Manifest
from knowledge_boosting.protos.codec import Samples

# A thread can wait this long for the interpreter. The default of 5 ms is most of a frame.
_SWITCH_INTERVAL = 0.0005  # seconds
_COLLECTION_INTERVAL = 10.0  # seconds
_SPEAKER_KEYS: dict[str, Play] = {"1": "1", "2": "2", "b": "both"}
# A name with one of these suffixes is that of a file, even if the format is not supported.
_FILE_SUFFIXES = frozenset(
    {
        *(".aac", ".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mp3", ".mp4", ".oga", ".ogg"),
        *(".opus", ".rf64", ".snd", ".w64", ".wav", ".webm", ".wma"),
    }
)


@dataclass(frozen=True)
class LiveOptions:
    """The flags of ``kb-client live``. Its help explains them."""

    bundle: str
    engine: EngineName
    servers: tuple[str, ...]
    credentials: Credentials
    credential_files: tuple[Path, ...]  # the files from which the credentials were read
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
    """Run a live session until the audio ends, the user presses a key, or a signal arrives.

    Raises:
        InputError: A flag, a device or a file cannot be used. Nothing has been started.
        Failure: The sound device is no longer available, or the recording could not be written.
    """
    bundle = Bundle(options.bundle)
    manifest = bundle.manifest
    speaker = _speaker_embedding(options, manifest)
    _check_call(options, bundle)
    hints = None
    if options.servers:
        hints = LiveHints(
            options.servers,
            manifest,
            encodings=Encodings(options.pcm_encoding, options.hint_encoding),
            credentials=options.credentials,
            speaker_embedding=speaker,
        )
    model = load_model(bundle, options.engine)
    recorder = None
    with ExitStack() as stack:
        if hints is not None:
            hints.start()
            stack.callback(hints.close)
            hints.wait_for_server()
        sound = _open_audio(options, manifest, stack)
        if options.record is not None:
            recorder = Recorder(options.record, manifest, speaker, options.play)
            stack.callback(recorder.close)
        loop = LiveLoop(model.session(speaker), manifest.model, sound, hints, options.play, recorder)
        if manifest.untrained:
            warn(UNTRAINED_NOTICE)
        if isinstance(manifest.model, Pair) and hints is None:
            warn("no --server is given, so the small network runs without hints")
        for number in (signal.SIGINT, *termination_signals()):
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: sound.stop()))
        session = _Session(manifest, loop, sound, hints)
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(_SWITCH_INTERVAL)
        # A collection must not interrupt the frame loop for long. So it skips all objects that exist now, and runs only
        # when this thread starts it.
        gc.collect()
        gc.freeze()
        gc.disable()
        stack.callback(gc.unfreeze)
        stack.callback(gc.enable)
        # If the audio goes to standard output, the text goes to standard error.
        text_output = sys.stderr if is_standard_output(Path(options.target or "")) else sys.stdout
        session.start()
        try:
            on_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
            if on_terminal and not options.json_lines:
                _show_view(session)
            else:
                _show_lines(session, options.json_lines, text_output)
        finally:
            session.end()
        now = session.figures()
        line = json.dumps({"event": "ended", **asdict(now)}) if options.json_lines else session.log_line(now)
        print(line, file=text_output)
        if (warning := view.load_warning(now)) is not None:
            warn(warning)
    # An earlier error would have discarded the other files of the session.
    if recorder is not None and recorder.error is not None:
        raise Failure(recorder.error)


class _Session:
    """Runs the frame loop on a thread, and provides its figures and events."""

    def __init__(self, manifest: Manifest, loop: LiveLoop, audio: LiveAudio, hints: LiveHints | None) -> None:
        self.manifest, self.loop, self.audio, self.hints = manifest, loop, audio, hints
        self._thread = threading.Thread(target=self._run, name="kb-frames")
        self._error: BaseException | None = None
        self._collect_at = time.monotonic() + _COLLECTION_INTERVAL

    def start(self) -> None:
        self.audio.start()
        self._thread.start()

    def end(self) -> None:
        """Stop the loop, and raise the exception that ended it, if any."""
        self.audio.stop()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def running(self) -> bool:
        """Return whether the loop runs. This is called often, so it also collects garbage at intervals."""
        if time.monotonic() >= self._collect_at:
            self._collect_at += _COLLECTION_INTERVAL
            gc.collect()
        return self._thread.is_alive()

    def figures(self) -> view.Figures:
        return view.figures(self.loop, self.hints, self.audio, self.manifest.model.framing.chunk_seconds)

    def log_line(self, now: view.Figures) -> str:
        return view.log_line(now, on_arrival=self.manifest.model.on_arrival)

    def new_events(self) -> Iterator[ServerEvent]:
        """Yield the server events since the last call."""
        while self.hints is not None and self.hints.events:
            yield self.hints.events.popleft()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:
            self._error = error


def _show_lines(session: _Session, as_json: bool, file: TextIO) -> None:
    """Print a line at regular intervals until the loop has ended."""
    interval = 1.0 if as_json else 10.0
    next_line = time.monotonic() + interval
    while session.running():
        time.sleep(0.1)
        for event in session.new_events():
            if as_json:
                print(json.dumps({"event": "server", **asdict(event)}), file=file, flush=True)
            elif event.connected:
                print(event.text, file=file, flush=True)
            else:
                warn(event.text)
        if time.monotonic() >= next_line:
            next_line += interval
            now = session.figures()
            line = json.dumps({"event": "figures", **asdict(now)}) if as_json else session.log_line(now)
            print(line, file=file, flush=True)


def _show_view(session: _Session) -> None:
    """Show a full-screen view that reacts to keys, until the loop has ended."""
    model, loop, audio = session.manifest.model, session.loop, session.audio
    framing = model.framing
    latency = f"{1e3 * framing.n_fft / framing.sample_rate:g} ms of the frames"
    if isinstance(audio, DeviceAudio):
        resampling = f", {audio.resampling_ms:.1f} of it resampling from {audio.rate} Hz" if audio.resampling_ms else ""
        latency = f"{audio.latency_ms:.0f} ms from microphone to loudspeaker{resampling}"
    deadline_ms = model.max_age_ms if session.hints is not None else None
    layout = view.Layout(
        f"kb-client live   {session.manifest.label}", latency, deadline_ms, loop.choices, model.on_arrival
    )
    last_choice: Play = loop.play if loop.play != "bypass" else "1"
    last_event = ""
    with view.keyboard() as key, Live(console=console(), screen=True, auto_refresh=False) as screen:
        while session.running():
            pressed = key(0.1).lower()
            if pressed == "q":
                audio.stop()
            elif pressed == "h":
                loop.stream.hints_on = not loop.stream.hints_on
            elif pressed == " ":
                loop.play = last_choice if loop.play == "bypass" else "bypass"
            elif (choice := _SPEAKER_KEYS.get(pressed)) in loop.choices and choice is not None:
                loop.play = last_choice = choice
            for event in session.new_events():
                last_event = event.text
            screen.update(view.view(session.figures(), layout, last_event), refresh=True)


def _check_call(options: LiveOptions, bundle: Bundle) -> None:
    """Check that the flags are consistent with each other and with the bundle."""
    model, name = bundle.model, options.bundle
    if options.servers and not isinstance(model, Pair):
        raise InputError(f"{name}: is one network alone and uses no hints; leave out --server")
    choices = Mixer(model.sources, model.microphones, "bypass").choices
    if options.play not in choices:
        raise InputError(f"--play {options.play}: is not possible with {name}; give one of {', '.join(choices)}")
    files = _is_file(options.source), _is_file(options.target)
    if files == (True, False):
        raise InputError(f"--input {options.source}: is a file; give a file as --output too, such as out.wav")
    if files == (False, True):
        raise InputError(f"--output {options.target}: is a file; give a sound file as --input too")
    if all(files) and options.rate is not None:
        raise InputError("--rate is the rate of devices, and a file has its own rate; leave out --rate")
    if options.virtual_mic is not None and options.target is not None:
        raise InputError("--virtual-mic plays to the virtual microphone; leave out --output")
    if options.record is not None:
        check_folder(options.record)
    reads, writes = list(options.credential_files), []
    if all(files) and options.source is not None and options.target is not None:
        check_output(Path(options.target), "s16")
        reads, writes = [*reads, Path(options.source)], [Path(options.target)]
    if options.speaker is not None and options.speaker.endswith(".npy"):
        reads.append(Path(options.speaker))
    reads += bundle.directory.iterdir()
    check_files(reads, writes, {options.record: FILES} if options.record is not None else {})


def _is_file(name: str | None) -> bool:
    return name is not None and (Path(name).suffix.lower() in _FILE_SUFFIXES or is_stream(Path(name)))


def _speaker_embedding(options: LiveOptions, manifest: Manifest) -> Samples | None:
    if not manifest.model.needs_speaker:
        if options.speaker is not None:
            raise InputError(f"{options.bundle}: separates all speakers; leave out --speaker")
        return None
    if options.speaker is None:
        raise InputError(f"{options.bundle}: extracts a target speaker; give --speaker NAME of an enrolled speaker")
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
