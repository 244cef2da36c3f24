"""The ``kb-client`` command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from knowledge_boosting.common import cli
from knowledge_boosting.common.call_options import Tls, TlsCa, TlsCert, TlsKey, TokenFile
from knowledge_boosting.models.bundle import DEFAULT_BUNDLE

app = cli.Application(no_args_is_help=True)


class Clock(StrEnum):
    """The clock of a replay."""

    VIRTUAL = "virtual"
    REAL = "real"


class EngineChoice(StrEnum):
    """The engine that runs the small network."""

    AUTO = "auto"
    COMPILED = "compiled"
    ONNX = "onnx"
    TORCH = "torch"


class OutputFormat(StrEnum):
    """The sample format of output files."""

    S16 = "s16"
    FLOAT = "float"


class PcmEncoding(StrEnum):
    """The encoding of samples on the wire."""

    S16 = "s16"
    F32 = "f32"


class HintEncoding(StrEnum):
    """The encoding of hints on the wire."""

    F32 = "f32"
    F16 = "f16"
    INT8 = "int8"


PcmFlag = Annotated[PcmEncoding, typer.Option("--pcm-encoding", help="Encoding of the samples on the wire.")]
HintFlag = Annotated[HintEncoding, typer.Option("--hint-encoding", help="Encoding of the hints on the wire.")]


class PlayChoice(StrEnum):
    """The mix that is played."""

    SPEAKER_1 = "1"
    SPEAKER_2 = "2"
    BOTH = "both"
    BYPASS = "bypass"


@app.callback()
def commands() -> None:
    """Enhance speech on this device, with hints from a server."""


@app.command()
def replay(
    input_file: Annotated[
        Path, typer.Argument(metavar="IN.wav", help="The mixture: WAV, FLAC or OGG with one or two channels.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The estimate. For SS, -speaker1 and -speaker2 are added to the name."),
    ],
    bundle: Annotated[str, typer.Option("--bundle", help="Name or path of the bundle.")] = DEFAULT_BUNDLE,
    engine: Annotated[
        EngineChoice,
        typer.Option(
            "--engine",
            help="Engine for the small network. auto takes the faster of compiled and onnx. "
            "torch must be installed separately.",
        ),
    ] = EngineChoice.AUTO,
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="HOST:PORT", help="A running kb-server. [default: start one on this machine]"),
    ] = None,
    enrollment: Annotated[
        Path | None,
        typer.Option("--enrollment", help="TSE: 1 to 30 s of speech of the target speaker, or an embedding (.npy)."),
    ] = None,
    frame_log: Annotated[
        Path | None,
        typer.Option("--frame-log", metavar="DIR/frames.csv", help="Repeat a session of live --record exactly."),
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option("--reference", help="The true source, for quality figures. For SS, give it twice."),
    ] = None,
    with_large: Annotated[bool, typer.Option("--with-large", help="Run the large network too.")] = False,
    alone: Annotated[
        str | None,
        typer.Option("--alone", metavar="BUNDLE", help="Run this bundle of one network alone too (same task)."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="DIR",
            help="Write the mixture, references and all estimates, equally loud, and a figure to this folder.",
        ),
    ] = None,
    clock: Annotated[
        Clock, typer.Option("--clock", help="virtual simulates the arrival times; real runs in real time.")
    ] = Clock.VIRTUAL,
    network: Annotated[
        str | None,
        typer.Option(
            "--network",
            help="Preset of network conditions: lan, wifi, 5g, lte or satellite. The next four flags override it.",
        ),
    ] = None,
    delay_ms: Annotated[
        float | None, typer.Option("--delay-ms", min=0, max=60000, help="Round-trip delay, half in each direction.")
    ] = None,
    jitter_ms: Annotated[
        float | None,
        typer.Option(
            "--jitter-ms", min=0, max=60000, help="Mean of an exponential extra delay, half in each direction."
        ),
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option("--loss", min=0, max=0.5, help="Probability that a packet is lost and sent again, 0 to 0.5."),
    ] = None,
    bandwidth_mbit: Annotated[
        float | None, typer.Option("--bandwidth-mbit", min=0.01, help="Bandwidth of each direction, Mbit/s.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="CSV file of recorded one-way delays (up_ms,down_ms), one line for each packet."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed for jitter and loss.")] = 0,
    server_ms: Annotated[
        float | None,
        typer.Option(
            "--server-ms", min=0, max=60000, help="Virtual clock: simulated time of the server for each frame."
        ),
    ] = None,
    require_server: Annotated[
        bool,
        typer.Option("--require-server", help="Fail if the server is lost, instead of continuing without hints."),
    ] = False,
    pcm_encoding: PcmFlag = PcmEncoding.S16,
    hint_encoding: HintFlag = HintEncoding.INT8,
    output_format: Annotated[
        OutputFormat, typer.Option("--output-format", help="Sample format of the output files.")
    ] = OutputFormat.S16,
    report_file: Annotated[Path | None, typer.Option("--report", help="Write the report to this JSON file.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw spectrograms and hint ages to this file (.png, .pdf, .svg).")
    ] = None,
    page_file: Annotated[
        Path | None,
        typer.Option("--page", help="Write a page to hear and compare mixture and outputs to this file (.html)."),
    ] = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Enhance a recording, with hints from a server under simulated network conditions."""
    # Slow imports are made here, so that --help and errors in the call are printed at once.
    from knowledge_boosting.common.call_credentials import read_credentials
    from knowledge_boosting.device_client.commands.replay import replay_file
    from knowledge_boosting.device_client.commands.replay_call import ReplayOptions

    replay_file(
        ReplayOptions(
            input_file=input_file,
            output=output,
            bundle=bundle,
            engine=engine.value,
            server=server,
            credentials=read_credentials(
                [server] if server is not None else [],
                tls=tls,
                tls_ca=tls_ca,
                tls_cert=tls_cert,
                tls_key=tls_key,
                token_file=token_file,
            ),
            credential_files=tuple(path for path in (tls_ca, tls_cert, tls_key, token_file) if path is not None),
            enrollment=enrollment,
            frame_log=frame_log,
            references=tuple(reference or ()),
            with_large=with_large,
            alone=alone,
            compare=compare,
            real_clock=clock is Clock.REAL,
            network=network,
            delay_ms=delay_ms,
            jitter_ms=jitter_ms,
            loss=loss,
            bandwidth_mbit=bandwidth_mbit,
            trace=trace,
            seed=seed,
            server_ms=server_ms,
            require_server=require_server,
            pcm_encoding=pcm_encoding.value,
            hint_encoding=hint_encoding.value,
            output_format=output_format.value,
            report=report_file,
            plot=plot_file,
            page=page_file,
        )
    )


@app.command()
def live(
    bundle: Annotated[str, typer.Option("--bundle", help="Name or path of the bundle.")] = DEFAULT_BUNDLE,
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            metavar="HOST:PORT",
            help="A kb-server. Give several, and the client falls back to the next one.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", help="Name or index of a device, or a sound file. [default: the default device]"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--output", help="Name or index of a device, or a file to write. [default: the default device]"),
    ] = None,
    virtual_mic: Annotated[
        str | None,
        typer.Option("--virtual-mic", metavar="NAME", help="Linux: play to a new microphone for other programs."),
    ] = None,
    speaker: Annotated[
        str | None,
        typer.Option("--speaker", metavar="NAME", help="TSE: the enrolled speaker to extract, or an .npy file."),
    ] = None,
    play: Annotated[
        PlayChoice,
        typer.Option("--play", help="The speaker to play at the start. both plays speaker 1 left and speaker 2 right."),
    ] = PlayChoice.SPEAKER_1,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="DIR", help="Write input, output and a log of all frames to this folder."),
    ] = None,
    rate: Annotated[
        int | None,
        typer.Option(
            "--rate", min=8000, max=384_000, help="Sample rate of the devices, Hz. [default: a rate they support]"
        ),
    ] = None,
    buffer_ms: Annotated[
        float,
        typer.Option("--buffer-ms", min=0, max=500, help="Audio buffered for playback. Increase it against underruns."),
    ] = 8,
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="Print figures and events as JSON, one object per line, for scripts.")
    ] = False,
    engine: Annotated[EngineChoice, typer.Option("--engine", help="Engine for the small network.")] = EngineChoice.AUTO,
    pcm_encoding: PcmFlag = PcmEncoding.S16,
    hint_encoding: HintFlag = HintEncoding.INT8,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Enhance the audio of a microphone in real time, with hints from a server."""
    from knowledge_boosting.common.call_credentials import read_credentials
    from knowledge_boosting.device_client.commands.live import LiveOptions
    from knowledge_boosting.device_client.commands.live import live as run_live

    run_live(
        LiveOptions(
            bundle=bundle,
            engine=engine.value,
            servers=tuple(server or ()),
            credentials=read_credentials(
                server or [], tls=tls, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file
            ),
            credential_files=tuple(path for path in (tls_ca, tls_cert, tls_key, token_file) if path is not None),
            source=source,
            target=target,
            rate=rate,
            buffer_ms=buffer_ms,
            play=play.value,
            speaker=speaker,
            record=record,
            virtual_mic=virtual_mic,
            json_lines=json_lines,
            pcm_encoding=pcm_encoding.value,
            hint_encoding=hint_encoding.value,
        )
    )


@app.command()
def devices() -> None:
    """List the sound devices, and those that live uses by default."""
    from knowledge_boosting.device_client.commands.devices import print_devices

    print_devices()


@app.command()
def enroll(
    name: Annotated[str, typer.Argument(help="A name for the speaker.")],
    speech: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SPEECH.wav]", help="5 to 30 s of speech of this speaker only. [default: record a microphone]"
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="HOST:PORT", help="A running kb-server. [default: start one on this machine]"),
    ] = None,
    bundle: Annotated[
        str, typer.Option("--bundle", help="Bundle for the server that is started on this machine; any bundle works.")
    ] = DEFAULT_BUNDLE,
    source: Annotated[
        str | None, typer.Option("--input", help="Name or index of the device to record. [default: the default device]")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=5, max=30, help="Duration of the recording.")] = 10,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Enroll a speaker for target speech extraction under a name."""
    from knowledge_boosting.common.call_credentials import read_credentials
    from knowledge_boosting.device_client.commands.enroll import enroll_speaker

    credentials = read_credentials(
        [server] if server is not None else [],
        tls=tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        token_file=token_file,
    )
    enroll_speaker(name, speech, server=server, credentials=credentials, bundle=bundle, source=source, seconds=seconds)


@app.command()
def bench(
    bundle: Annotated[
        list[str] | None,
        typer.Option("--bundle", help="Name or path of a bundle. Can be repeated. [default: all installed bundles]"),
    ] = None,
    engine: Annotated[EngineChoice, typer.Option("--engine", help="Engine for the small network.")] = EngineChoice.AUTO,
    frames: Annotated[
        int, typer.Option("--frames", min=100, max=1_000_000, help="Number of frames to measure. A second has 125.")
    ] = 2000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this JSON file.")] = None,
) -> None:
    """Measure how fast this device runs its networks, and whether it is fast enough for live.

    The exit code is 0 if the measurement succeeded, even if the device is too slow.
    """
    from knowledge_boosting.device_client.commands.bench import bench as run_bench

    run_bench(tuple(bundle or ()), engine.value, frames, json_file)


def main() -> None:
    """Entry point of ``kb-client``."""
    cli.run(app, "kb-client", "client")


if __name__ == "__main__":
    main()
