"""Tests for ``kb-client enroll``: a speaker is enrolled once, and then selected by name in a live session."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import soundfile

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.device_client.speakers import check_name, save
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import PCM_ENCODINGS, encode_pcm
from knowledge_boosting.protos.hints_pb2_grpc import (
    HintServiceServicer,
    HintServiceStub,
    add_HintServiceServicer_to_server,
)
from tests.golden_cases import TOLERANCE
from tests.processes import PATIENCE, Server, refusal_here, run

SAMPLES = Path(__file__).parents[2] / "samples"
SS, TSE = "ss_delay6_compression2", "tse_delay6"


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary configuration folder for the user."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "configuration"


@pytest.mark.usefixtures("configuration")
def test_an_enrolled_speaker_is_extracted(
    golden_bundle: Callable[[str], Path], tse_server: Server, tmp_path: Path
) -> None:
    pytest.importorskip("resemblyzer", reason="needs the optional package resemblyzer")
    enrolled = run("kb-client", "enroll", "anna", SAMPLES / "enrollment.flac", "--server", tse_server.address)
    assert enrolled.returncode == 0, enrolled.stderr
    assert "--speaker anna" in enrolled.stdout
    soundfile.write(tmp_path / "in.wav", np.zeros((1600, 2)), 16000)
    files = ["--input", tmp_path / "in.wav", "--output", tmp_path / "out.wav", "--record", tmp_path / "recording"]
    live = run("kb-client", "live", "--bundle", golden_bundle(TSE), "--speaker", "anna", *files)
    assert live.returncode == 0, live.stderr
    used = json.loads((tmp_path / "recording" / "session.json").read_text())["speaker_embedding"]
    np.testing.assert_allclose(used, embedding(tse_server), atol=TOLERANCE)
    # The recorded session can be repeated with the same speaker.
    again = ["-o", tmp_path / "again.wav", "--frame-log", tmp_path / "recording" / "frames.csv"]
    result = run(*("kb-client", "replay", tmp_path / "recording" / "input.wav", "--bundle", golden_bundle(TSE)), *again)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again.wav").read_bytes() == (tmp_path / "recording" / "output.wav").read_bytes()


def embedding(server: Server) -> list[float]:
    """Return the embedding that the server computes for the same speech."""
    speech = soundfile.read(SAMPLES / "enrollment.flac", dtype="float32", always_2d=True)[0].mean(axis=1)
    encoding = PCM_ENCODINGS["f32"]
    request = pb.EnrollRequest(sample_rate=16000, pcm_encoding=encoding, pcm=encode_pcm(speech[None], encoding))
    with grpc.insecure_channel(server.address) as channel:
        return list(HintServiceStub(channel).Enroll(request, timeout=PATIENCE).speaker_embedding)


@pytest.mark.parametrize("status", ["DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL"])
@pytest.mark.usefixtures("configuration")
def test_a_temporary_fault_of_the_server_gives_exit_code_1(
    status: str, golden_bundle: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    add_HintServiceServicer_to_server(Unable(grpc.StatusCode[status]), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    soundfile.write(tmp_path / "in.wav", np.ones((1600, 2)), 16000)
    replay: list[object] = ["replay", tmp_path / "in.wav", "-o", tmp_path / "out.wav", "--bundle", golden_bundle(SS)]
    try:
        for call in (["enroll", "anna", SAMPLES / "enrollment.flac"], replay):
            line = refusal_here("kb-client", capsys, *call, "--server", address, code=1)
            assert f"({status}: not now)" in line
            assert line.endswith("; try again")
    finally:
        server.stop(None).wait()


class Unable(HintServiceServicer):
    """A service that ends every call with the same status."""

    def __init__(self, status: grpc.StatusCode) -> None:
        self._status = status

    def Enroll(self, request: pb.EnrollRequest, context: grpc.ServicerContext) -> pb.EnrollResponse:
        context.abort(self._status, "not now")

    def StreamHints(
        self, request_iterator: Iterator[pb.StreamHintsRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.StreamHintsResponse]:
        context.abort(self._status, "not now")

    def DescribeModel(
        self, request: pb.DescribeModelRequest, context: grpc.ServicerContext
    ) -> pb.DescribeModelResponse:
        context.abort(self._status, "not now")


@pytest.mark.parametrize("answer", [[np.nan] * 256, [0.0] * 256, [0.1] * 3], ids=["nan", "zeros", "short"])
def test_an_answer_that_is_no_embedding_is_not_stored(
    answer: list[float], configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Faulty(Unable):
        def Enroll(self, request: pb.EnrollRequest, context: grpc.ServicerContext) -> pb.EnrollResponse:
            return pb.EnrollResponse(speaker_embedding=answer)

    server = grpc.server(ThreadPoolExecutor(2))
    add_HintServiceServicer_to_server(Faulty(grpc.StatusCode.INTERNAL), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        call = ["enroll", "anna", SAMPLES / "enrollment.flac", "--server", address]
        assert "its answer is no speaker embedding" in refusal_here("kb-client", capsys, *call, code=1)
    finally:
        server.stop(None).wait()
    assert not list(configuration.rglob("*.npy"))


def test_invalid_enrollments_are_refused(
    configuration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "short.wav", np.ones(16000), 16000)
    cases: list[tuple[list[object], str]] = [
        (["anna", tmp_path / "short.wav"], "has 1.0 s; give 5 to 30 s"),
        (["anna", tmp_path / "none.wav"], "no such file"),
        (["a/b", SAMPLES / "enrollment.flac"], "can contain only letters, digits"),
        (["anna", SAMPLES / "enrollment.flac", "--server", "127.0.0.1:1"], "no answer"),
        (["anna", "--seconds", 2], "--seconds"),
    ]
    for flags, expected in cases:
        line = refusal_here("kb-client", capsys, "enroll", *flags)
        assert expected in line, line
    assert not configuration.exists()


def test_an_unwritable_folder_is_reported_before_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "/proc"):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / folder))
        with pytest.raises(InputError, match="cannot write there"):
            check_name("anna", None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    check_name("anna", None)
    speech = save("anna", np.ones(256, np.float32))
    with pytest.raises(InputError, match="would overwrite an input"):
        check_name("anna", speech)
