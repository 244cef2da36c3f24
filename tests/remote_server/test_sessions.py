"""Tests for sessions: they give the hints of the published computation, for any messages and with other sessions."""

from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import (
    HINT_ENCODINGS,
    MAX_CHUNKS_PER_MESSAGE,
    PCM_ENCODINGS,
    PROTOCOL_VERSION,
    SERVICE_NAME,
    Samples,
    decode_pcm,
    encode_pcm,
)
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub
from tests.golden_cases import TOLERANCE, worst
from tests.processes import PATIENCE, Server
from tests.remote_server.driver import Device, Material, Request, assert_logged, message, send_bytes


def whole_session(server: Server, *requests: Request, count: int) -> list[pb.Hint]:
    """Run a session to its proper end, and return its hints."""
    with Device(server, *requests) as device:
        device.finish()
        device.started()
        hints = device.hints(count)
        assert device.end() == ("OK", "")
    return hints


def frame_by_frame(stream: Material, samples: Samples | None = None, count: int | None = None) -> list[Request]:
    return [stream.audio(frame, 1, samples) for frame in range(len(stream.hints) if count is None else count)]


def test_a_separation_session_gives_the_published_hints(ss_server: Server, ss: Material) -> None:
    hints = whole_session(ss_server, ss.opening(), *frame_by_frame(ss), count=len(ss.hints))
    assert [hint.frame for hint in hints] == list(range(len(ss.hints)))
    assert worst(ss.values(hints), ss.hints) < TOLERANCE


def test_a_target_speech_session_gives_the_published_hints(tse_server: Server, tse: Material) -> None:
    hints = whole_session(tse_server, tse.opening(), *frame_by_frame(tse), count=len(tse.hints))
    assert [hint.frame for hint in hints] == list(range(len(tse.hints)))
    assert worst(tse.values(hints), tse.hints) < TOLERANCE


def test_another_speaker_gives_other_hints(tse_server: Server, tse: Material) -> None:
    other = tse.opening(speaker_embedding=tse.speaker[::-1])
    hints = whole_session(tse_server, other, *frame_by_frame(tse, count=20), count=20)
    assert worst(tse.values(hints), tse.hints[:20]) > 100 * TOLERANCE


def test_eight_concurrent_sessions_do_not_affect_each_other(ss_server: Server, ss: Material) -> None:
    sessions, frames = 8, 60
    rng = np.random.default_rng(8)
    gains = np.linspace(0.2, 1.6, sessions, dtype=np.float32)
    shifts = rng.integers(0, ss.samples.shape[1], sessions)
    length = frames * ss.manifest.model.framing.chunk + ss.manifest.model.framing.lookahead
    inputs = np.stack(
        [gain * np.roll(ss.samples, shift, axis=1)[:, :length] for gain, shift in zip(gains, shifts, strict=True)]
    )
    expected = ss.offline_hints(inputs)

    # Each session starts after the earlier ones have sent some frames. Then the order of sessions is random.
    turns = [k for k in range(sessions) for _ in range(5 + k)]
    turns += [int(k) for k in rng.permutation([k for k in range(sessions) for _ in range(frames - 5 - k)])]
    devices: dict[int, Device] = {}
    sent = dict.fromkeys(range(sessions), 0)
    seen = len(ss_server.log)
    for turn, k in enumerate(turns):
        if k not in devices:
            devices[k] = Device(ss_server, ss.opening())
            devices[k].started()
        devices[k].send(ss.audio(sent[k], 1, inputs[k]))
        sent[k] += 1
        if turn == len(turns) // 2:
            invalid = [ss.opening(), ss.audio(0), message(1, encode_pcm(ss.window(1) * np.nan, pb.PCM_ENCODING_F32LE))]
            with Device(ss_server, *invalid) as device:
                ended = device.end()
            assert ended == ("INVALID_ARGUMENT", "audio.pcm has samples that are NaN or infinite")
        if turn == 2 * len(turns) // 3:
            opening, audio = ss.opening().SerializeToString(), ss.audio(0).SerializeToString()
            assert send_bytes(ss_server, opening, audio, rng.bytes(1000))[0] == "INVALID_ARGUMENT"
    for k, device in devices.items():
        device.finish()
        hints = device.hints(frames)
        assert device.end() == ("OK", "")
        assert [hint.frame for hint in hints] == list(range(frames))
        assert worst(ss.values(hints), expected[k]) < TOLERANCE
        assert_logged(ss_server, seen, session=device.session, status="OK", frames=frames)
        device.close()


def random_cuts(frames: int, seed: int) -> list[int]:
    """Return random numbers of chunks whose sum is ``frames``."""
    rng = np.random.default_rng(seed)
    cuts: list[int] = []
    while frames > sum(cuts):
        cuts.append(min(int(rng.choice([1, 2, 3, 17, 40])), frames - sum(cuts)))
    return cuts


@pytest.mark.parametrize(
    "cuts",
    [[MAX_CHUNKS_PER_MESSAGE, 1], [1, MAX_CHUNKS_PER_MESSAGE], [63, 63], random_cuts(126, 1), random_cuts(126, 2)],
    ids=["all except one", "all after the first", "halves", "random", "other random"],
)
def test_the_number_of_chunks_in_a_message_does_not_change_the_hints(
    cuts: list[int], ss_server: Server, ss: Material
) -> None:
    requests, frame = [ss.opening()], 0
    for chunks in cuts:
        requests.append(ss.audio(frame, chunks))
        frame += chunks
    assert frame == len(ss.hints)
    hints = whole_session(ss_server, *requests, count=frame)
    assert [hint.frame for hint in hints] == list(range(frame))
    assert worst(ss.values(hints), ss.hints) < TOLERANCE


@pytest.mark.parametrize("first", [1, 1_000_000_007, 2**40])
def test_the_first_frame_of_a_session_changes_only_the_indexes(first: int, ss_server: Server, ss: Material) -> None:
    cuts = [1, 1, 6, 1, 3]
    requests, frame = [ss.opening(first_frame=first)], 0
    for chunks in cuts:
        requests.append(ss.audio(frame, chunks, first_frame=first))
        frame += chunks
    hints = whole_session(ss_server, *requests, count=frame)
    assert [hint.frame for hint in hints] == list(range(first, first + frame))
    assert worst(ss.values(hints), ss.hints[:frame]) < TOLERANCE


def test_the_server_needs_no_later_audio(ss_server: Server, ss: Material) -> None:
    with Device(ss_server, ss.opening()) as device:
        device.started()
        for frame in range(5):
            # Each hint comes before the next audio is sent.
            device.send(ss.audio(frame))
            hints = device.hints(1)
            assert hints[0].frame == frame
            assert worst(ss.values(hints), ss.hints[frame : frame + 1]) < TOLERANCE


@pytest.fixture(scope="module")
def exact(ss_server: Server, ss: Material) -> Samples:
    """The hints ``[T, channels, F]`` of forty frames, in the exact encoding."""
    return ss.values(whole_session(ss_server, ss.opening(), *frame_by_frame(ss, count=40), count=40))


def test_half_precision_hints_are_within_a_thousandth(ss_server: Server, ss: Material, exact: Samples) -> None:
    encoding = HINT_ENCODINGS["f16"]
    opening = ss.opening(hint_encoding=encoding)
    hints = whole_session(ss_server, opening, *frame_by_frame(ss, count=40), count=40)
    assert {len(hint.payload) for hint in hints} == {2 * exact[0].size}
    smallest_normal = 2.0**-14
    difference = np.abs(ss.values(hints, encoding) - exact)
    # The number of frames in a step changes the last bits of the 32-bit values.
    assert (difference <= 1e-3 * np.maximum(np.abs(exact), smallest_normal) + 1e-5).all()
    assert difference.max() > 0


def test_byte_hints_are_within_half_a_step(ss_server: Server, ss: Material, exact: Samples) -> None:
    encoding = HINT_ENCODINGS["int8"]
    opening = ss.opening(hint_encoding=encoding)
    hints = whole_session(ss_server, opening, *frame_by_frame(ss, count=40), count=40)
    assert {len(hint.payload) for hint in hints} == {exact[0].size}
    for hint, value, truth in zip(hints, ss.values(hints, encoding), exact, strict=True):
        assert hint.scale == pytest.approx(np.abs(truth).max() / 127, rel=1e-3)
        assert worst(value, truth) <= 0.501 * hint.scale


def test_sixteen_bit_audio_gives_the_hints_of_its_quantised_samples(ss_server: Server, ss: Material) -> None:
    frames = 40
    s16 = PCM_ENCODINGS["s16"]
    quantised = decode_pcm(encode_pcm(ss.samples, s16), s16, 2)
    assert worst(quantised, ss.samples) > 0
    as_s16 = [ss.audio(frame, pcm="s16") for frame in range(frames)]
    from_s16 = whole_session(ss_server, ss.opening(pcm_encoding=s16), *as_s16, count=frames)
    from_f32 = whole_session(ss_server, ss.opening(), *frame_by_frame(ss, quantised, frames), count=frames)
    assert worst(ss.values(from_s16), ss.values(from_f32)) < 1e-5


def test_hints_have_their_compute_time(ss_server: Server, ss: Material) -> None:
    hints = whole_session(ss_server, ss.opening(), ss.audio(0), ss.audio(1, 3), ss.audio(4), count=5)
    assert all(hint.compute_us > 0 for hint in hints)
    # The chunks of one message are computed in steps of two, four and eight frames.
    assert hints[1].compute_us == hints[2].compute_us


def test_silence_gives_finite_hints(ss_server: Server, ss: Material) -> None:
    silence = np.zeros_like(ss.samples)
    for name in HINT_ENCODINGS:
        opening = ss.opening(hint_encoding=HINT_ENCODINGS[name])
        hints = whole_session(ss_server, opening, *frame_by_frame(ss, silence, 3), count=3)
        assert np.isfinite(ss.values(hints, HINT_ENCODINGS[name])).all()


def test_a_session_without_audio_ends_properly(ss_server: Server, ss: Material) -> None:
    seen = len(ss_server.log)
    with Device(ss_server, ss.opening()) as device:
        device.finish()
        session = device.started()
        assert device.end() == ("OK", "")
    assert_logged(ss_server, seen, session=session, status="OK", frames=0)


def test_all_hints_are_sent_before_the_end(ss_server: Server, ss: Material) -> None:
    seen = len(ss_server.log)
    with Device(ss_server, ss.opening(), *frame_by_frame(ss)) as device:
        device.finish()
        session = device.started()
        assert device.hints(len(ss.hints))[-1].frame == len(ss.hints) - 1
        assert device.end()[0] == "OK"
    assert_logged(
        ss_server, seen, session=session, status="OK", why="the device ended the session", frames=len(ss.hints)
    )


def described(server: Server) -> pb.DescribeModelResponse:
    with grpc.insecure_channel(server.address) as channel:
        return HintServiceStub(channel).DescribeModel(pb.DescribeModelRequest(), timeout=PATIENCE)


def test_the_description_of_a_separation_bundle(ss_server: Server, ss: Material) -> None:
    answer = described(ss_server)
    answer.ClearField("enrolls")  # depends on the installed packages
    answer.ClearField("sessions")  # depends on the sessions of other tests
    assert answer == pb.DescribeModelResponse(
        protocol_version=PROTOCOL_VERSION,
        bundle_name="ss_delay6_compression2",
        bundle_id=ss.manifest.id,
        untrained=False,
        task="ss",
        sample_rate=16000,
        microphones=2,
        chunk=128,
        lookahead=64,
        delay=6,
        hint_channels=4,
        hint_bins=97,
        max_chunks_per_message=MAX_CHUNKS_PER_MESSAGE,
        max_sessions=16,
        free_sessions=16,
        bundles=["ss_delay6_compression2"],
    )


def test_the_description_of_a_target_speech_bundle(tse_server: Server, tse: Material) -> None:
    answer = described(tse_server)
    assert (answer.task, answer.bundle_name, answer.bundle_id) == ("tse", "tse_delay6", tse.manifest.id)
    assert (answer.chunk, answer.lookahead, answer.delay) == (32, 16, 6)
    assert (answer.hint_channels, answer.hint_bins) == (4, 25)


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
def test_health_is_serving_for(service: str, ss_server: Server) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    with grpc.insecure_channel(ss_server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(request, timeout=PATIENCE)  # type: ignore[attr-defined] # missing in its stubs
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_health_of_an_unknown_service_is_not_found(ss_server: Server) -> None:
    request = health_pb2.HealthCheckRequest(service="nonsense")
    with grpc.insecure_channel(ss_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        stub = health_pb2_grpc.HealthStub(channel)
        stub.Check(request, timeout=PATIENCE)  # type: ignore[attr-defined] # missing in its stubs
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_service(ss_server: Server) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(ss_server.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE)
        names = {service.name for answer in answers for service in answer.list_services_response.service}
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= names
