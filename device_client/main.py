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
    """What time it is for the frame loop."""

    VIRTUAL = "virtual"
    REAL = "real"


class EngineChoice(StrEnum):
    """What computes the small network."""

    ONNX = "onnx"
    TORCH = "torch"


class OutputFormat(StrEnum):
    """Samples of output files."""

    S16 = "s16"
    FLOAT = "float"


class PcmEncoding(StrEnum):
    """Samples on the wire."""

    S16 = "s16"
    F32 = "f32"


class HintEncoding(StrEnum):
    """Hint values on the wire."""

    F32 = "f32"
    F16 = "f16"
    INT8 = "int8"


class PlayChoice(StrEnum):
    """What is heard."""

    SPEAKER_1 = "1"
    SPEAKER_2 = "2"
    BOTH = "both"
    BYPASS = "bypass"


@app.callback()
def commands() -> None:
    """Speech enhancement on this device, boosted by a server's hints."""


@app.command()
def replay(
    input_file: Annotated[
        Path, typer.Argument(metavar="IN.wav", help="Mixture: WAV, FLAC or OGG, one or two channels.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Estimate; SS adds -speaker1, -speaker2 to the name.")],
    bundle: Annotated[str, typer.Option("--bundle", help="Name or path of the bundle.")] = DEFAULT_BUNDLE,
    engine: Annotated[
        EngineChoice, typer.Option("--engine", help="What computes the small network; torch needs torch installed.")
    ] = EngineChoice.ONNX,
    server: Annotated[
        str | None, typer.Option("--server", metavar="HOST:PORT", help="A running kb-server; else one is started here.")
    ] = None,
    enrollment: Annotated[
        Path | None,
        typer.Option("--enrollment", help="TSE: speech of the wanted person, 1 to 30 s, or an embedding (.npy)."),
    ] = None,
    frame_log: Annotated[
        Path | None,
        typer.Option("--frame-log", metavar="DIR/frames.csv", help="Run a session of live --record again, exactly."),
    ] = None,
    reference: Annotated[
        list[Path] | None, typer.Option("--reference", help="True source, to measure against; SS: give it twice.")
    ] = None,
    with_large: Annotated[bool, typer.Option("--with-large", help="Measure the large network too.")] = False,
    alone: Annotated[
        str | None, typer.Option("--alone", metavar="BUNDLE", help="Measure this network alone too, of the same task.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare", metavar="DIR", help="Write mixture, references and all estimates here, and a figure."
        ),
    ] = None,
    clock: Annotated[Clock, typer.Option("--clock", help="Computed arrival times, or real pacing.")] = Clock.VIRTUAL,
    network: Annotated[
        str | None, typer.Option("--network", help="Preset: lan, wifi, 5g, lte or satellite; flags below override it.")
    ] = None,
    delay_ms: Annotated[
        float | None, typer.Option("--delay-ms", min=0, max=60000, help="Round trip, half up and half down.")
    ] = None,
    jitter_ms: Annotated[
        float | None,
        typer.Option("--jitter-ms", min=0, max=60000, help="Mean of an exponential extra delay, half each way."),
    ] = None,
    loss: Annotated[
        float | None, typer.Option("--loss", min=0, max=0.5, help="Share of packets lost and sent again, 0 to 0.5.")
    ] = None,
    bandwidth_mbit: Annotated[
        float | None, typer.Option("--bandwidth-mbit", min=0.01, help="Limit each way, Mbit/s.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="CSV of recorded one-way delays (up_ms,down_ms), a line a packet.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of jitter and loss.")] = 0,
    server_ms: Annotated[
        float | None, typer.Option("--server-ms", min=0, max=60000, help="Virtual clock: server time a frame.")
    ] = None,
    require_server: Annotated[
        bool, typer.Option("--require-server", help="Fail if the server is lost; else go on without hints.")
    ] = False,
    pcm_encoding: Annotated[PcmEncoding, typer.Option("--pcm-encoding", help="Samples sent.")] = PcmEncoding.F32,
    hint_encoding: Annotated[HintEncoding, typer.Option("--hint-encoding", help="Hints sent.")] = HintEncoding.F32,
    output_format: Annotated[
        OutputFormat, typer.Option("--output-format", help="Samples in the output file.")
    ] = OutputFormat.S16,
    report_file: Annotated[Path | None, typer.Option("--report", help="Write the report as JSON.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw spectrograms and hint ages.")] = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Run a recording through the small network, helped by a server's hints under a simulated network."""
    # What runs a replay is imported only now, so that --help and mistakes in the call answer at once.
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
            secrets=tuple(path for path in (tls_ca, tls_cert, tls_key, token_file) if path is not None),
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
        )
    )


@app.command()
def live(
    bundle: Annotated[str, typer.Option("--bundle", help="Name or path of the bundle.")] = DEFAULT_BUNDLE,
    server: Annotated[
        list[str] | None,
        typer.Option("--server", metavar="HOST:PORT", help="A kb-server; give several to have others to turn to."),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--input", help="Device by name or index, or a sound file; else the default device.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--output", help="Device by name or index, or a file to write (.wav).")
    ] = None,
    virtual_mic: Annotated[
        str | None,
        typer.Option("--virtual-mic", metavar="NAME", help="Linux: play into a new microphone for other programs."),
    ] = None,
    speaker: Annotated[
        str | None, typer.Option("--speaker", metavar="NAME", help="TSE: whom to extract, enrolled before (or .npy).")
    ] = None,
    play: Annotated[
        PlayChoice, typer.Option("--play", help="What to hear at first; both: 1 at the left, 2 at the right.")
    ] = PlayChoice.SPEAKER_1,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="DIR", help="Keep input, output and a log of all frames.")
    ] = None,
    rate: Annotated[
        int | None, typer.Option("--rate", min=8000, max=384_000, help="Of the devices, Hz; else one that they take.")
    ] = None,
    buffer_ms: Annotated[
        float, typer.Option("--buffer-ms", min=0, max=500, help="Sound kept ready; more helps against underruns.")
    ] = 8,
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="Tell figures and events in JSON, a line each, for scripts.")
    ] = False,
    engine: Annotated[EngineChoice, typer.Option("--engine", help="What computes the network.")] = EngineChoice.ONNX,
    pcm_encoding: Annotated[PcmEncoding, typer.Option("--pcm-encoding", help="Samples sent.")] = PcmEncoding.F32,
    hint_encoding: Annotated[HintEncoding, typer.Option("--hint-encoding", help="Hints sent.")] = HintEncoding.F32,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Enhance live: microphone in, loudspeaker out, with a server's hints as long as they come in time."""
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
            secrets=tuple(path for path in (tls_ca, tls_cert, tls_key, token_file) if path is not None),
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
    """List sound devices, and which ones live would pick."""
    from knowledge_boosting.device_client.commands.devices import print_devices

    print_devices()


@app.command()
def enroll(
    name: Annotated[str, typer.Argument(help="To call the voice by.")],
    speech: Annotated[
        Path | None, typer.Argument(metavar="[SPEECH.wav]", help="The voice alone, 5 to 30 s; else it is recorded.")
    ] = None,
    server: Annotated[
        str | None, typer.Option("--server", metavar="HOST:PORT", help="A running kb-server; else one is started here.")
    ] = None,
    bundle: Annotated[
        str, typer.Option("--bundle", help="For the server that is started here; any will do.")
    ] = DEFAULT_BUNDLE,
    source: Annotated[str | None, typer.Option("--input", help="Device to record from, by name or index.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=5, max=30, help="To record.")] = 10,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Learn a voice for target speech extraction, and keep it under a name."""
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
        typer.Option("--bundle", help="Name or path; may be given more than once; else all installed."),
    ] = None,
    engine: Annotated[EngineChoice, typer.Option("--engine", help="What computes the network.")] = EngineChoice.ONNX,
    frames: Annotated[
        int, typer.Option("--frames", min=100, max=1_000_000, help="Frames to time; 125 a second.")
    ] = 2000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Measure how fast this device runs its networks, and say whether that is enough to run live.

    The exit code tells whether it was measured, not how fast: it is 0 for a device that is too slow, too.
    """
    from knowledge_boosting.device_client.commands.bench import bench as run_bench

    run_bench(tuple(bundle or ()), engine.value, frames, json_file)


def main() -> None:
    """Entry point of ``kb-client``."""
    cli.run(app, "kb-client", "client")


if __name__ == "__main__":
    main()
