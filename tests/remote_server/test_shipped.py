"""Tests for a server without ``--bundle``: it serves all shipped bundles, and loads them on demand."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import soundfile
import torch

from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.networks import load_large
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import PCM_ENCODINGS, PROTOCOL_VERSION, Samples, decode_hint, encode_pcm
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub
from tests.golden_cases import TOLERANCE, worst
from tests.processes import PATIENCE, Server, command, environment, run, running_server
from tests.remote_server.driver import Device, Request, message

DEFAULT, OTHER = "ss-compact", "tse-48ms-compact"
SAMPLES = Path(__file__).parents[2] / "samples"
FRAMES = 20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server(None, for_us=False) as server:
        yield server


def audio(frames: int, microphones: int, chunk: int, lookahead: int) -> Samples:
    noise = np.random.default_rng(0).normal(0, 0.1, (microphones, frames * chunk + lookahead))
    return noise.astype(np.float32)


def opening(name: str, speaker: Samples | None = None) -> Request:
    manifest = Bundle(name).manifest
    return Request(
        config=pb.SessionConfig(
            protocol_version=PROTOCOL_VERSION,
            bundle_id=manifest.id,
            sample_rate=manifest.model.framing.sample_rate,
            speaker_embedding=[] if speaker is None else speaker.tolist(),
            pcm_encoding=pb.PCM_ENCODING_F32LE,
            hint_encoding=pb.HINT_ENCODING_F32LE,
        )
    )


def loaded(server: Server) -> list[str]:
    return [line["bundle"] for line in map(json.loads, server.log) if line["event"] == "bundle_loaded"]


def test_a_bundle_is_loaded_once_on_the_first_request(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        described = HintServiceStub(channel).DescribeModel(pb.DescribeModelRequest(), timeout=PATIENCE)
        other = HintServiceStub(channel).DescribeModel(pb.DescribeModelRequest(bundle=OTHER), timeout=PATIENCE)
    assert described.bundle_name == DEFAULT
    assert (described.on_arrival, other.on_arrival) == (True, False)
    assert list(described.bundles) == [DEFAULT, OTHER]
    assert other.task == "tse"
    started = json.loads(server.wait_for_log('"server_started"'))
    assert list(started["sessions"]) == [DEFAULT]
    # A refused session does not load its bundle.
    with Device(server, opening(OTHER)) as device:
        assert device.end()[0] == "INVALID_ARGUMENT"
    assert not loaded(server)

    bundle = Bundle(OTHER)
    model, manifest = load_large(bundle), bundle.manifest
    framing = manifest.model.framing
    samples = audio(FRAMES, manifest.model.microphones, framing.chunk, framing.lookahead)
    speaker = np.full(256, 1 / 16, np.float32)
    with torch.inference_mode():
        state = model.initial_state(1, torch.from_numpy(speaker)[None])
        expected = model(torch.from_numpy(samples)[None], state)[0][0].numpy()
    pcm = encode_pcm(samples, PCM_ENCODINGS["f32"])
    with Device(server, opening(OTHER, speaker)) as first, Device(server, opening(OTHER, speaker)) as second:
        for device in (first, second):
            device.started()
            device.send(message(0, pcm))
        for device in (first, second):
            hints = [
                decode_hint(hint, pb.HINT_ENCODING_F32LE, manifest.model.hint_channels, framing.bins)
                for hint in device.hints(FRAMES)
            ]
            assert worst(np.stack(hints), expected) < TOLERANCE
    assert loaded(server) == [OTHER]


def test_the_speaker_encoder_is_loaded_before_the_first_enrollment(server: Server) -> None:
    pytest.importorskip("resemblyzer", reason="needs the optional package resemblyzer")
    server.wait_for_log('"speaker_encoder_loaded"')


def test_it_extracts_a_speaker_with_the_call_of_the_readme(server: Server, tmp_path: Path) -> None:
    samples, rate = soundfile.read(SAMPLES / "mixture.flac")
    soundfile.write(tmp_path / "mixture.wav", samples[: rate // 2], rate)
    result = run(
        *("kb-client", "replay", tmp_path / "mixture.wav", "-o", tmp_path / "out.wav", "--server", server.address),
        *("--bundle", OTHER, "--enrollment", SAMPLES / "enrollment.npy", "--require-server"),
    )
    assert result.returncode == 0, result.stderr


def test_the_status_says_how_old_hints_may_be(server: Server) -> None:
    result = run("kb-server", "status", server.address)
    assert result.returncode == 0, result.stderr
    first, heading, *lines = result.stdout.splitlines()
    assert first.startswith(f"{server.address}: serving; protocol {PROTOCOL_VERSION}; ")
    assert heading.split() == ["bundle", "id", "task", "hint", "age", "sessions", "free"]
    by_name = {line.split()[0]: line for line in lines}
    assert list(by_name) == [DEFAULT, OTHER]
    assert [by_name[name].split()[1] for name in by_name] == [Bundle(name).id for name in by_name]
    assert " up to 512 ms " in by_name[DEFAULT]
    assert " 48 ms " in by_name[OTHER]
    assert "up to" not in by_name[OTHER]


def test_the_status_loses_nothing_on_a_narrow_terminal(server: Server) -> None:
    narrow = environment() | {"COLUMNS": "50"}
    lines = subprocess.check_output(command("kb-server", "status", server.address), env=narrow, text=True).splitlines()
    assert len(lines) > 4  # names go on in the next line
    assert not any("…" in line for line in lines)
