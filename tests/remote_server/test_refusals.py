"""Tests for invalid messages: each ends its own session with a status and a text that names the field."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import MAX_CHUNKS_PER_MESSAGE, SERVICE_NAME, encode_pcm
from tests.processes import PATIENCE, Server
from tests.remote_server.driver import (
    Device,
    Material,
    Request,
    Witness,
    assert_logged,
    message,
    open_when_free,
    send_bytes,
    wait_until_free,
)

Messages = Callable[[Material], list[Request]]

F32 = pb.PCM_ENCODING_F32LE
OVER_THE_LIMIT = 5 * 1024 * 1024  # bytes; above the limit of gRPC for a message, 4 MiB


@pytest.fixture(scope="module", autouse=True)
def silent_device(ss_server: Server) -> Iterator[Device]:
    """A device that opens a call and sends nothing. It is created first, so that no test waits for its timeout."""
    with Device(ss_server) as device:
        yield device


def refusal(server: Server, witness: Witness, *requests: Request) -> tuple[str, str]:
    """Return the status and details of a session with these messages, after the checks that apply to every refusal.

    The device does not end its requests, so that the server must end the session.
    """
    witness.assert_exact()
    seen = len(server.log)
    with Device(server, *requests) as device:
        status, details = device.end()
    assert_logged(server, seen, status=status, why=details)
    assert not any("Traceback" in line for line in server.log[seen:])
    witness.assert_exact()
    return status, details


def with_sample(ss: Material, value: float) -> list[Request]:
    samples = ss.window(1).copy()
    samples[1, 77] = value
    return [ss.opening(), ss.audio(0), message(1, encode_pcm(samples, F32))]


OPENINGS: dict[str, tuple[str, str, Messages]] = {
    "another bundle": (
        "FAILED_PRECONDITION",
        "config.bundle_id: the device has 'other' ('0123456789abcdef')",
        lambda ss: [ss.opening(bundle_name="other", bundle_id="0123456789abcdef")],
    ),
    "no bundle id": ("FAILED_PRECONDITION", "config.bundle_id: ", lambda ss: [ss.opening(bundle_id="")]),
    "a bundle name that cannot be part of a status line": (
        "FAILED_PRECONDITION",
        "config.bundle_id: ",
        lambda ss: [ss.opening(bundle_name="a\r\nb\0%41\u2028é日本" * 10_000, bundle_id="\x1b[31m" * 10_000)],
    ),
    "a newer protocol": (
        "FAILED_PRECONDITION",
        "config.protocol_version: is 2, but this server uses 1",
        lambda ss: [ss.opening(protocol_version=2)],
    ),
    "no protocol version": (
        "FAILED_PRECONDITION",
        "config.protocol_version: is 0",
        lambda ss: [ss.opening(protocol_version=0)],
    ),
    "another sample rate": (
        "INVALID_ARGUMENT",
        "config.sample_rate: is 48000, must be 16000",
        lambda ss: [ss.opening(sample_rate=48000)],
    ),
    "no sample rate": ("INVALID_ARGUMENT", "config.sample_rate: is 0", lambda ss: [ss.opening(sample_rate=0)]),
    "a speaker embedding for separation": (
        "INVALID_ARGUMENT",
        "config.speaker_embedding: has 256 values, must have 0",
        lambda ss: [ss.opening(speaker_embedding=[0.0625] * 256)],
    ),
    "no pcm encoding": (
        "INVALID_ARGUMENT",
        "config.pcm_encoding",
        lambda ss: [ss.opening(pcm_encoding=pb.PCM_ENCODING_UNSPECIFIED)],
    ),
    "an unknown pcm encoding": ("INVALID_ARGUMENT", "config.pcm_encoding", lambda ss: [ss.opening(pcm_encoding=77)]),
    "no hint encoding": (
        "INVALID_ARGUMENT",
        "config.hint_encoding",
        lambda ss: [ss.opening(hint_encoding=pb.HINT_ENCODING_UNSPECIFIED)],
    ),
    "an unknown hint encoding": ("INVALID_ARGUMENT", "config.hint_encoding", lambda ss: [ss.opening(hint_encoding=-4)]),
    "a negative first frame": (
        "INVALID_ARGUMENT",
        "config.first_frame: is -1",
        lambda ss: [ss.opening(first_frame=-1)],
    ),
    "a first frame after which the indexes overflow": (
        "INVALID_ARGUMENT",
        "config.first_frame: ",
        lambda ss: [ss.opening(first_frame=2**63 - 1), ss.audio(0, 2, first_frame=2**63 - 1)],
    ),
    "audio before the configuration": (
        "INVALID_ARGUMENT",
        "request: the first message must be config, not audio",
        lambda ss: [ss.audio(0)],
    ),
    "an empty first message": (
        "INVALID_ARGUMENT",
        "request: the first message must be config, not an empty one",
        lambda _: [Request()],
    ),
}


@pytest.mark.parametrize(("status", "reason", "messages"), OPENINGS.values(), ids=OPENINGS)
def test_a_session_cannot_open_with(
    status: str, reason: str, messages: Messages, ss_server: Server, ss_witness: Witness, ss: Material
) -> None:
    ended, details = refusal(ss_server, ss_witness, *messages(ss))
    assert ended == status
    assert details.startswith(reason)
    assert len(details) < 500


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        ([0.0625] * 255, "has 255 values, must have 256"),
        ([0.0625] * 257, "has 257 values, must have 256"),
        ([], "has 0 values, must have 256"),
        ([float("nan")] + [0.0625] * 255, "has values that are NaN or infinite"),
        ([0.0625] * 255 + [float("-inf")], "has values that are NaN or infinite"),
        ([0.0625] * 255 + [-1e10], "has values above 10000; scale its norm to 1"),
    ],
    ids=["one value too few", "one value too many", "no values", "a NaN", "an infinity", "a huge value"],
)
def test_a_target_speech_session_cannot_open_with_a_speaker_embedding_of(
    embedding: list[float], reason: str, tse_server: Server, tse_witness: Witness, tse: Material
) -> None:
    ended = refusal(tse_server, tse_witness, tse.opening(speaker_embedding=embedding))
    assert ended == ("INVALID_ARGUMENT", f"config.speaker_embedding: {reason}")


AUDIO: dict[str, tuple[str, Messages]] = {
    "a second configuration": (
        "request: after the first message, all must be audio, not config",
        lambda ss: [ss.opening(), ss.opening()],
    ),
    "a configuration between audio": (
        "request: after the first message, all must be audio, not config",
        lambda ss: [ss.opening(), ss.audio(0), ss.opening(), ss.audio(1)],
    ),
    "an empty message": (
        "request: after the first message, all must be audio, not an empty one",
        lambda ss: [ss.opening(), ss.audio(0), Request()],
    ),
    "pcm cut within a sample": (
        "audio.pcm has 1535 bytes",
        lambda ss: [ss.opening(), message(0, encode_pcm(ss.window(0), F32)[:-1])],
    ),
    "pcm without the last channel of its last sample": (
        "audio.pcm has 1532 bytes",
        lambda ss: [ss.opening(), message(0, encode_pcm(ss.window(0), F32)[:-4])],
    ),
    "pcm with one sample less than a chunk": (
        "audio.pcm: has 127 samples per channel, must have a multiple of 128",
        lambda ss: [ss.opening(), ss.audio(0), message(1, encode_pcm(ss.window(1)[:, 1:], F32))],
    ),
    "pcm with one sample more than a chunk": (
        "audio.pcm: has 129 samples per channel, must have a multiple of 128",
        lambda ss: [ss.opening(), ss.audio(0), message(1, encode_pcm(np.pad(ss.window(1), ((0, 0), (0, 1))), F32))],
    ),
    "no pcm": ("audio.pcm: has 0 samples per channel", lambda ss: [ss.opening(), ss.audio(0), message(1, b"")]),
    "no pcm at all": ("audio.pcm: has 0 samples per channel", lambda ss: [ss.opening(), message(0, b"")]),
    "a first chunk without the lookahead": (
        "audio.pcm: has 128 samples per channel, must have a multiple of 128 plus 64",
        lambda ss: [ss.opening(), message(0, encode_pcm(ss.window(0)[:, :128], F32))],
    ),
    "only the lookahead": (
        "audio.pcm: has 64 samples per channel",
        lambda ss: [ss.opening(), message(0, encode_pcm(ss.window(0)[:, :64], F32))],
    ),
    "the lookahead twice": (
        "audio.pcm: has 192 samples per channel, must have a multiple of 128",
        lambda ss: [ss.opening(), ss.audio(0), message(1, encode_pcm(ss.window(0), F32))],
    ),
    "too many chunks in a message": (
        f"audio.pcm: has {MAX_CHUNKS_PER_MESSAGE + 1} chunks, must have at most {MAX_CHUNKS_PER_MESSAGE}",
        lambda ss: [ss.opening(), ss.audio(0, MAX_CHUNKS_PER_MESSAGE + 1)],
    ),
    "a repeated frame": (
        "audio.first_frame: is 1, must be 2",
        lambda ss: [ss.opening(), ss.audio(0), ss.audio(1), ss.audio(1)],
    ),
    "an earlier frame": (
        "audio.first_frame: is 0, must be 3",
        lambda ss: [ss.opening(), ss.audio(0, 3), message(0, encode_pcm(ss.window(1), F32))],
    ),
    "a later frame": ("audio.first_frame: is 2, must be 1", lambda ss: [ss.opening(), ss.audio(0), ss.audio(2)]),
    "a negative frame": (
        "audio.first_frame: is -1, must be 1",
        lambda ss: [ss.opening(), ss.audio(0), message(-1, encode_pcm(ss.window(1), F32))],
    ),
    "another first frame than that of the configuration": (
        "audio.first_frame: is 0, must be 9",
        lambda ss: [ss.opening(first_frame=9), ss.audio(0)],
    ),
    "a NaN": ("audio.pcm has samples that are NaN or infinite", lambda ss: with_sample(ss, np.nan)),
    "an infinity": ("audio.pcm has samples that are NaN or infinite", lambda ss: with_sample(ss, np.inf)),
    "a negative infinity": ("audio.pcm has samples that are NaN or infinite", lambda ss: with_sample(ss, -np.inf)),
    "samples at which the network overflows": (
        "audio.pcm: the network overflows at ",  # frame 1, or both frames if they share a step
        lambda ss: [ss.opening(), ss.audio(0), message(1, encode_pcm(np.full((2, 128), 3e38, np.float32), F32))],
    ),
}


@pytest.mark.parametrize(("reason", "messages"), AUDIO.values(), ids=AUDIO)
def test_a_session_cannot_continue_with(
    reason: str, messages: Messages, ss_server: Server, ss_witness: Witness, ss: Material
) -> None:
    ended, details = refusal(ss_server, ss_witness, *messages(ss))
    assert ended == "INVALID_ARGUMENT"
    assert details.startswith(reason)


def test_the_hints_of_valid_audio_come_before_the_refusal_of_invalid_audio(ss_server: Server, ss: Material) -> None:
    seen = len(ss_server.log)
    with Device(ss_server, ss.opening(), ss.audio(0, 3), ss.audio(5)) as device:
        session = device.started()
        assert [hint.frame for hint in device.hints(3)] == [0, 1, 2]
        assert device.end()[0] == "INVALID_ARGUMENT"
    assert_logged(ss_server, seen, session=session, status="INVALID_ARGUMENT", frames=3)


def test_a_call_without_requests_is_refused(ss_server: Server, ss_witness: Witness) -> None:
    ss_witness.assert_exact()
    seen = len(ss_server.log)
    with Device(ss_server) as device:
        device.finish()
        ended = device.end()
    assert ended == ("INVALID_ARGUMENT", "request: the stream ended before its configuration")
    assert_logged(ss_server, seen, status=ended[0], why=ended[1])
    ss_witness.assert_exact()


def test_a_silent_device_is_refused_after_a_while(
    silent_device: Device, ss_server: Server, ss_witness: Witness
) -> None:
    status, details = silent_device.end()
    assert status == "INVALID_ARGUMENT"
    assert details.startswith("request: no config arrived within ")
    assert_logged(ss_server, 0, status=status, why=details, frames=0)
    ss_witness.assert_exact()


@pytest.mark.parametrize("valid", [0, 1, 2], ids=["at once", "after the configuration", "after audio"])
def test_bytes_that_are_not_a_message_are_refused(
    valid: int, ss_server: Server, ss_witness: Witness, ss: Material
) -> None:
    ss_witness.assert_exact()
    seen = len(ss_server.log)
    messages = [ss.opening().SerializeToString(), ss.audio(0).SerializeToString()][:valid]
    status, details = send_bytes(ss_server, *messages, b"\xff\xfe\xfd no message")
    assert status == "INVALID_ARGUMENT"
    assert details.startswith("request: ")
    assert_logged(ss_server, seen, status=status, why=details)
    assert not any("Traceback" in line for line in ss_server.log[seen:])
    ss_witness.assert_exact()


def test_a_message_over_the_limit_of_grpc_ends_its_session(
    ss_server: Server, ss_witness: Witness, ss: Material
) -> None:
    ss_witness.assert_exact()
    seen = len(ss_server.log)
    with Device(ss_server, ss.opening(), ss.audio(0)) as device:
        session = device.started()
        device.hints(1)
        device.send(message(1, bytes(OVER_THE_LIMIT)))
        status, details = device.end()
    assert status == "RESOURCE_EXHAUSTED"
    assert "larger than max" in details
    # gRPC refuses the message before the session sees it.
    assert_logged(ss_server, seen, session=session, status="CANCELLED", frames=1)
    ss_witness.assert_exact()


def test_a_configuration_over_the_limit_of_grpc_opens_no_session(
    ss_server: Server, ss_witness: Witness, ss: Material
) -> None:
    ss_witness.assert_exact()
    seen = len(ss_server.log)
    with Device(ss_server, ss.opening(bundle_name="x" * OVER_THE_LIMIT)) as device:
        status, details = device.end()
    assert status == "RESOURCE_EXHAUSTED"
    assert "larger than max" in details
    assert_logged(ss_server, seen, status="CANCELLED", frames=0)
    ss_witness.assert_exact()


def test_without_a_free_slot_a_session_is_refused_until_another_one_ends(
    small_server: Server, small_witness: Witness, ss: Material
) -> None:
    with Device(small_server, ss.opening()) as second:
        second.started()
        ended, details = refusal(small_server, small_witness, ss.opening())
        assert ended == "RESOURCE_EXHAUSTED"
        assert details.startswith("all sessions of this server are in use")
        second.send(ss.audio(0))
        assert second.hints(1)[0].frame == 0
        second.finish()
        assert second.end()[0] == "OK"
    # The slot of a session that has ended is free at once.
    with Device(small_server, ss.opening(), ss.audio(0)) as third:
        third.started()
        assert third.hints(1)[0].frame == 0
        third.finish()
        assert third.end()[0] == "OK"


def test_a_refused_session_uses_no_slot(small_server: Server, small_witness: Witness, ss: Material) -> None:
    for _ in range(3):
        with open_when_free(small_server, ss) as device:
            device.send(ss.audio(1))
            assert device.end()[0] == "INVALID_ARGUMENT"
    wait_until_free(small_server, ss)
    small_witness.assert_exact()


def between_two_messages(device: Device, ss: Material) -> None:
    device.send(ss.audio(0))
    device.hints(1)


def with_audio_in_flight(device: Device, ss: Material) -> None:
    device.send(ss.audio(0))
    device.hints(1)
    device.send(*(ss.audio(frame) for frame in range(1, 100)))


def with_unread_hints(device: Device, ss: Material) -> None:
    device.send(*(ss.audio(frame) for frame in range(126)))
    device.hints(1)


@pytest.mark.parametrize("moment", [between_two_messages, with_audio_in_flight, with_unread_hints])
@pytest.mark.parametrize("action", ["closes its connection", "cancels the call"])
def test_the_end_is_logged_and_the_slot_is_free_when_a_device(
    action: str, moment: Callable[[Device, Material], None], small_server: Server, small_witness: Witness, ss: Material
) -> None:
    small_witness.assert_exact()
    seen = len(small_server.log)
    with open_when_free(small_server, ss) as device:
        moment(device, ss)
        if action == "cancels the call":
            device.call.cancel()
        else:
            device.channel.close()
        assert_logged(small_server, seen, session=device.session, status="CANCELLED")
    wait_until_free(small_server, ss)
    assert not any("Traceback" in line for line in small_server.log[seen:])
    small_witness.assert_exact()


def test_the_end_is_logged_and_the_slot_is_free_when_a_device_process_is_killed(
    small_server: Server, small_witness: Witness, ss: Material, golden_bundle: Callable[[str], Path]
) -> None:
    small_witness.assert_exact()
    seen = len(small_server.log)
    wait_until_free(small_server, ss)
    arguments = [small_server.address, str(golden_bundle("ss_delay6_compression2"))]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.remote_server.lone_device", *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        session = process.stdout.readline().strip()
        assert session
        with Device(small_server, ss.opening()) as third:
            assert third.end()[0] == "RESOURCE_EXHAUSTED"
    finally:
        process.kill()
        process.communicate()
    assert_logged(small_server, seen, session=session, status="CANCELLED")
    wait_until_free(small_server, ss)
    small_witness.assert_exact()


def test_an_unknown_method_is_unimplemented(ss_server: Server, ss_witness: Witness) -> None:
    with grpc.insecure_channel(ss_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE_NAME}/Nonsense")
        method(b"", timeout=PATIENCE)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    ss_witness.assert_exact()
