"""Tests for enrollment: computing a speaker embedding from speech."""

import os
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import soundfile

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import ENROLLMENT_RATE, PCM_ENCODINGS, Samples, encode_pcm
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub
from knowledge_boosting.training.data.corpus import find_speech, read_segment
from knowledge_boosting.training.data.speakers import draw_sources, select_speakers
from tests.golden_cases import TOLERANCE, worst
from tests.processes import PATIENCE, Server, running_server
from tests.remote_server.driver import Device, Material

SAMPLES = Path(__file__).parents[2] / "samples"


def read_clip(name: str) -> Samples:
    """Return the first channel of a sample clip, ``[N]``."""
    samples, rate = soundfile.read(SAMPLES / name, dtype="float32", always_2d=True)
    assert rate == ENROLLMENT_RATE
    return np.ascontiguousarray(samples[:, 0])


def request(speech: Samples, encoding: str = "f32", rate: int = ENROLLMENT_RATE) -> pb.EnrollRequest:
    pcm = encode_pcm(speech[None], PCM_ENCODINGS[encoding])
    return pb.EnrollRequest(sample_rate=rate, pcm_encoding=PCM_ENCODINGS[encoding], pcm=pcm)


def enroll(server: Server, message: pb.EnrollRequest) -> Samples:
    with grpc.insecure_channel(server.address) as channel:
        answer = HintServiceStub(channel).Enroll(message, timeout=PATIENCE)
    return np.array(answer.speaker_embedding, dtype=np.float32)


def refusal(server: Server, message: pb.EnrollRequest) -> tuple[str, str]:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        HintServiceStub(channel).Enroll(message, timeout=PATIENCE)
    return caught.value.code().name, caught.value.details() or ""


@pytest.fixture
def encoder_installed() -> None:
    pytest.importorskip("resemblyzer", reason="needs the optional package resemblyzer")


# The dependencies of the speaker encoder emit warnings about each other.
needs_encoder = pytest.mark.usefixtures("encoder_installed")
quiet = pytest.mark.filterwarnings("ignore")


@quiet
@needs_encoder
def test_enrollment_gives_the_embedding_of_the_speaker_encoder(tse_server: Server) -> None:
    import resemblyzer

    speech = read_clip("enrollment.flac")
    embedding = enroll(tse_server, request(speech))
    assert embedding.shape == (256,)
    assert np.isfinite(embedding).all()
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
    encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
    voiced = resemblyzer.preprocess_wav(speech, source_sr=ENROLLMENT_RATE)
    assert worst(embedding, encoder.embed_utterance(voiced)) < TOLERANCE
    # The clip has 16-bit samples, so the s16 encoding is exact.
    assert worst(enroll(tse_server, request(speech, "s16")), embedding) < 1e-6


@quiet
@needs_encoder
def test_training_and_server_give_the_same_speech_the_same_embedding(tse_server: Server) -> None:
    corpus = find_speech(Path(__file__).parents[1] / "training" / "speech", skip_broken=False)
    speakers = list(select_speakers(corpus, ENROLLMENT_RATE, 2 * ENROLLMENT_RATE).values())
    sources, _ = draw_sources(
        np.random.default_rng(0), speakers, ENROLLMENT_RATE, 2 * ENROLLMENT_RATE, skip_broken=False
    )
    for source in sources:
        assert source.embedding is not None
        assert worst(enroll(tse_server, request(read_segment(source.enrollment))), source.embedding[0]) < 1e-6


@quiet
@needs_encoder
def test_embeddings_of_one_speaker_are_more_similar_than_those_of_two(tse_server: Server) -> None:
    speech, other_speech = read_clip("enrollment.flac"), read_clip("source2.flac")
    half = len(speech) // 2
    parts = speech[:half], speech[half:], other_speech
    first, second, other = (enroll(tse_server, request(part)) for part in parts)
    assert first @ second > max(first @ other, second @ other) + 0.1


@quiet
@needs_encoder
def test_an_embedding_from_enrollment_opens_a_session(tse_server: Server, tse: Material) -> None:
    embedding = enroll(tse_server, request(read_clip("enrollment.flac")))
    with Device(tse_server, tse.opening(speaker_embedding=embedding.tolist()), tse.audio(0)) as device:
        device.started()
        assert device.hints(1)[0].frame == 0


@quiet
@needs_encoder
def test_hints_continue_during_an_enrollment(tse_server: Server, tse: Material) -> None:
    speech = np.tile(read_clip("enrollment.flac"), 3)
    frames = 40
    with grpc.insecure_channel(tse_server.address) as channel, Device(tse_server, tse.opening()) as device:
        enrollment = HintServiceStub(channel).Enroll.future(request(speech), timeout=PATIENCE)
        device.started()
        device.send(*(tse.audio(frame) for frame in range(frames)))
        hints = device.hints(frames)
        assert len(enrollment.result().speaker_embedding) == 256
    assert worst(tse.values(hints), tse.hints[:frames]) < TOLERANCE


@quiet
@needs_encoder
@pytest.mark.parametrize("level", [0.0, 1e-30, 1e10], ids=["silence", "next to silence", "noise of clipping"])
def test_audio_without_speech_is_refused(level: float, tse_server: Server) -> None:
    speech = read_clip("enrollment.flac") * np.float32(level)
    status, details = refusal(tse_server, request(speech))
    assert status == "INVALID_ARGUMENT"
    assert details.startswith("pcm: ")


@quiet
@needs_encoder
def test_a_spike_that_overflows_the_encoder_is_refused(tse_server: Server) -> None:
    speech = read_clip("enrollment.flac")
    speech[60_000] = 3e38
    status, details = refusal(tse_server, request(speech))
    assert status == "INVALID_ARGUMENT"
    assert details.startswith("pcm: ")


def seconds(count: float) -> Samples:
    return np.resize(read_clip("enrollment.flac"), round(count * ENROLLMENT_RATE))


REFUSED: dict[str, tuple[str, Callable[[], pb.EnrollRequest]]] = {
    "too little": ("pcm: has 0.50 s of speech, must have 1 to 30 s", lambda: request(seconds(0.5))),
    "one sample too little": ("pcm: has ", lambda: request(seconds(1)[1:])),
    "too much": ("pcm: has 31.00 s of speech, must have 1 to 30 s", lambda: request(seconds(31))),
    "one sample too much": ("pcm: has ", lambda: request(np.pad(seconds(30), (0, 1)))),
    "nothing": ("pcm: has 0.00 s of speech", lambda: request(seconds(0))),
    "another rate": ("sample_rate: is 8000, must be 16000", lambda: request(seconds(2), rate=8000)),
    "no rate": ("sample_rate: is 0, must be 16000", lambda: request(seconds(2), rate=0)),
    "a NaN": ("pcm has samples that are NaN or infinite", lambda: request(seconds(2) * np.float32(np.nan))),
    "an infinity": (
        "pcm has samples that are NaN or infinite",
        lambda: request(np.append(seconds(2), np.float32(np.inf))),
    ),
    "no encoding": ("pcm_encoding", lambda: pb.EnrollRequest(sample_rate=16000, pcm=bytes(64000))),
    "an unknown encoding": (
        "pcm_encoding",
        lambda: pb.EnrollRequest(sample_rate=16000, pcm_encoding=9, pcm=bytes(64000)),  # type: ignore[arg-type]
    ),
    "half a sample": (
        "pcm has 64001 bytes",
        lambda: pb.EnrollRequest(sample_rate=16000, pcm_encoding=pb.PCM_ENCODING_S16LE, pcm=bytes(64001)),
    ),
}


@pytest.mark.parametrize(("reason", "message"), REFUSED.values(), ids=REFUSED)
def test_enrollment_is_refused_for(reason: str, message: Callable[[], pb.EnrollRequest], tse_server: Server) -> None:
    status, details = refusal(tse_server, message())
    assert status == "INVALID_ARGUMENT"
    assert details.startswith(reason)


def test_without_the_encoder_the_error_says_how_to_install_it(
    golden_bundle: Callable[[str], Path], tse: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python runs this module at its start. It hides the package if it is installed.
    (tmp_path / "sitecustomize.py").write_text("import sys\n\nsys.modules['resemblyzer'] = None\n")
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), before] if before else [str(tmp_path)]))
    with running_server(golden_bundle("tse_delay6")) as server:
        status, details = refusal(server, request(read_clip("enrollment.flac")))
        assert status == "UNIMPLEMENTED"
        assert "pip install 'knowledge-boosting[enroll]'" in details
        with grpc.insecure_channel(server.address) as channel:
            assert not HintServiceStub(channel).DescribeModel(pb.DescribeModelRequest(), timeout=PATIENCE).enrolls
        # A device that already has an embedding can use the server.
        with Device(server, tse.opening(), tse.audio(0)) as device:
            device.started()
            assert worst(tse.values(device.hints(1)), tse.hints[:1]) < TOLERANCE


@quiet
@needs_encoder
def test_the_description_says_that_the_server_enrolls(tse_server: Server) -> None:
    with grpc.insecure_channel(tse_server.address) as channel:
        assert HintServiceStub(channel).DescribeModel(pb.DescribeModelRequest(), timeout=PATIENCE).enrolls
