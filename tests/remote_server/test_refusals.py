"""Every bad message ends its session with a status and a text that names the field, and no other session."""

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
OVER_THE_LIMIT = 5 * 1024 * 1024  # bytes; gRPC takes 4 MiB a message


@pytest.fixture(scope="module", autouse=True)
def silent_device(ss_server: Server) -> Iterator[Device]:
    """A device that opens a session and says nothing; first of all, so that no test has to wait for its end."""
    with Device(ss_server) as device:
        yield device


def refusal(server: Server, witness: Witness, *requests: Request) -> tuple[str, str]:
    """The status and details that a session of these messages ends in, with all that holds for every refusal checked.

    The device leaves its end of the stream open: it is the server that ends the session.
    """
    witness.assert_exact()
    seen = len(server.log)
    with Device(server, *requests) as device:
        status, why = device.end()
    assert_logged(server, seen, status=status, why=why)
    assert not any("Traceback" in line for line in server.log[seen:])
    witness.assert_exact()
    return status, why


def spoilt(ss: Material, value: float) -> list[Request]:
    samples = ss.window(1).copy()
    samples[1, 77] = value
    return [ss.opening(), ss.audio(0), message(1, encode_pcm(samples, F32))]


OPENINGS: dict[str, tuple[str, str, Messages]] = {
    "another bundle": (
        "FAILED_PRECONDITION",
        "config.bundle_id: the device has 'other' ('0123456789abcdef')",
        lambda ss: [ss.opening(bundle_name="other", bundle_id="0123456789abcdef")],
    ),
    "a bundle of no id": ("FAILED_PRECONDITION", "config.bundle_id: ", lambda ss: [ss.opening(bundle_id="")]),
    "a bundle of a name that no status line can hold as it is": (
        "FAILED_PRECONDITION",
        "config.bundle_id: ",
        lambda ss: [ss.opening(bundle_name="a\r\nb\0%41\u2028é日本" * 10_000, bundle_id="\x1b[31m" * 10_000)],
    ),
    "a newer protocol": (
        "FAILED_PRECONDITION",
        "config.protocol_version: is 2, this server speaks 1",
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
    "a first frame after which the indices run out": (
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


@pytest.mark.parametrize(("status", "why", "messages"), OPENINGS.values(), ids=OPENINGS)
def test_a_session_cannot_open_with(
    status: str, why: str, messages: Messages, ss_server: Server, ss_witness: Witness, ss: Material
) -> None:
    ended, details = refusal(ss_server, ss_witness, *messages(ss))
    assert ended == status
    assert details.startswith(why)
    assert len(details) < 500


@pytest.mark.parametrize(
    ("embedding", "why"),
    [
        ([0.0625] * 255, "has 255 values, must have 256"),
        ([0.0625] * 257, "has 257 values, must have 256"),
        ([], "has 0 values, must have 256"),
        ([float("nan")] + [0.0625] * 255, "has values that are NaN or infinite"),
        ([0.0625] * 255 + [float("-inf")], "has values that are NaN or infinite"),
    ],
    ids=["one value too few", "one value too many", "no values", "a NaN", "an infinity"],
)
def test_a_target_speech_session_cannot_open_with_a_speaker_embedding_of(
    embedding: list[float], why: str, tse_server: Server, tse_witness: Witness, tse: Material
) -> None:
    ended = refusal(tse_server, tse_witness, tse.opening(speaker_embedding=embedding))
    assert ended == ("INVALID_ARGUMENT", f"config.speaker_embedding: {why}")


AUDIO: dict[str, tuple[str, Messages]] = {
    "a second configuration": (
        "request: only audio may follow the first message, not config",
        lambda ss: [ss.opening(), ss.opening()],
    ),
    "a configuration between audio": (
        "request: only audio may follow the first message, not config",
        lambda ss: [ss.opening(), ss.audio(0), ss.opening(), ss.audio(1)],
    ),
    "an empty message": (
        "request: only audio may follow the first message, not an empty one",
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
    "pcm of one sample less than a chunk": (
        "audio.pcm: has 127 samples a channel, must have a multiple of 128",
        lambda ss: [ss.opening(), ss.audio(0), message(1, encode_pcm(ss.window(1)[:, 1:], F32))],
    ),
    "pcm of one sample more than a chunk": (
        "audio.pcm: has 129 samples a channel, must have a multiple of 128",
        lambda ss: [ss.opening(), ss.audio(0), message(1, encode_pcm(np.pad(ss.window(1), ((0, 0), (0, 1))), F32))],
    ),
    "no pcm": ("audio.pcm: has 0 samples a channel", lambda ss: [ss.opening(), ss.audio(0), message(1, b"")]),
    "no pcm at all": ("audio.pcm: has 0 samples a channel", lambda ss: [ss.opening(), message(0, b"")]),
    "a first chunk without the lookahead": (
        "audio.pcm: has 128 samples a channel, must have a multiple of 128 and 64 samples before them",
        lambda ss: [ss.opening(), message(0, encode_pcm(ss.window(0)[:, :128], F32))],
    ),
    "the lookahead alone": (
        "audio.pcm: has 64 samples a channel",
        lambda ss: [ss.opening(), message(0, encode_pcm(ss.window(0)[:, :64], F32))],
    ),
    "the lookahead twice": (
        "audio.pcm: has 192 samples a channel, must have a multiple of 128",
        lambda ss: [ss.opening(), ss.audio(0), message(1, encode_pcm(ss.window(0), F32))],
    ),
    "more chunks than a message may hold": (
        f"audio.pcm: has {MAX_CHUNKS_PER_MESSAGE + 1} chunks, a message may hold {MAX_CHUNKS_PER_MESSAGE}",
        lambda ss: [ss.opening(), ss.audio(0, MAX_CHUNKS_PER_MESSAGE + 1)],
    ),
    "a frame over again": (
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
    "another first frame than said": (
        "audio.first_frame: is 0, must be 9",
        lambda ss: [ss.opening(first_frame=9), ss.audio(0)],
    ),
    "a NaN": ("audio.pcm has samples that are NaN or infinite", lambda ss: spoilt(ss, np.nan)),
    "an infinity": ("audio.pcm has samples that are NaN or infinite", lambda ss: spoilt(ss, np.inf)),
    "a negative infinity": ("audio.pcm has samples that are NaN or infinite", lambda ss: spoilt(ss, -np.inf)),
    "samples on which the network overflows": (
        "audio.pcm: the network overflows on ",  # frame 1, or both where one step had both
        lambda ss: [ss.opening(), ss.audio(0), message(1, encode_pcm(np.full((2, 128), 3e38, np.float32), F32))],
    ),
}


@pytest.mark.parametrize(("why", "messages"), AUDIO.values(), ids=AUDIO)
def test_a_session_cannot_go_on_with(
    why: str, messages: Messages, ss_server: Server, ss_witness: Witness, ss: Material
) -> None:
    ended, details = refusal(ss_server, ss_witness, *messages(ss))
    assert ended == "INVALID_ARGUMENT"
    assert details.startswith(why)


def test_the_hints_of_good_audio_come_before_the_refusal_of_bad_audio(ss_server: Server, ss: Material) -> None:
    seen = len(ss_server.log)
    with Device(ss_server, ss.opening(), ss.audio(0, 3), ss.audio(5)) as device:
        session = device.started()
        assert [hint.frame for hint in device.hints(3)] == [0, 1, 2]
        assert device.end()[0] == "INVALID_ARGUMENT"
    assert_logged(ss_server, seen, session=session, status="INVALID_ARGUMENT", frames=3)


def test_a_stream_closed_without_a_word_is_refused(ss_server: Server, ss_witness: Witness) -> None:
    ss_witness.assert_exact()
    seen = len(ss_server.log)
    with Device(ss_server) as device:
        device.finish()
        ended = device.end()
    assert ended == ("INVALID_ARGUMENT", "request: the stream ended before its configuration")
    assert_logged(ss_server, seen, status=ended[0], why=ended[1])
    ss_witness.assert_exact()


def test_a_device_that_says_nothing_loses_its_place(
    silent_device: Device, ss_server: Server, ss_witness: Witness
) -> None:
    status, why = silent_device.end()
    assert status == "INVALID_ARGUMENT"
    assert why.startswith("request: no config came within ")
    assert_logged(ss_server, 0, status=status, why=why, frames=0)
    ss_witness.assert_exact()


@pytest.mark.parametrize("good", [0, 1, 2], ids=["at once", "after the configuration", "after audio"])
def test_bytes_that_are_no_message_are_refused(good: int, ss_server: Server, ss_witness: Witness, ss: Material) -> None:
    ss_witness.assert_exact()
    seen = len(ss_server.log)
    messages = [ss.opening().SerializeToString(), ss.audio(0).SerializeToString()][:good]
    status, why = send_bytes(ss_server, *messages, b"\xff\xfe\xfd no message")
    assert status == "INVALID_ARGUMENT"
    assert why.startswith("request: ")
    assert_logged(ss_server, seen, status=status, why=why)
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
        status, why = device.end()
    assert status == "RESOURCE_EXHAUSTED"
    assert "larger than max" in why
    # gRPC refuses the message before the session sees it.
    assert_logged(ss_server, seen, session=session, status="CANCELLED", frames=1)
    ss_witness.assert_exact()


def test_a_configuration_over_the_limit_of_grpc_opens_no_session(
    ss_server: Server, ss_witness: Witness, ss: Material
) -> None:
    ss_witness.assert_exact()
    seen = len(ss_server.log)
    with Device(ss_server, ss.opening(bundle_name="x" * OVER_THE_LIMIT)) as device:
        status, why = device.end()
    assert status == "RESOURCE_EXHAUSTED"
    assert "larger than max" in why
    assert_logged(ss_server, seen, status="CANCELLED", frames=0)
    ss_witness.assert_exact()


def test_a_session_too_many_is_refused_until_another_one_ends(
    small_server: Server, small_witness: Witness, ss: Material
) -> None:
    with Device(small_server, ss.opening()) as second:
        second.started()
        ended, details = refusal(small_server, small_witness, ss.opening())
        assert ended == "RESOURCE_EXHAUSTED"
        assert details.startswith("all 2 sessions of this server are taken")
        second.send(ss.audio(0))
        assert second.hints(1)[0].frame == 0
        second.finish()
        assert second.end()[0] == "OK"
    # The place of a session that has ended is free at once.
    with Device(small_server, ss.opening(), ss.audio(0)) as third:
        third.started()
        assert third.hints(1)[0].frame == 0
        third.finish()
        assert third.end()[0] == "OK"


def test_a_refused_session_keeps_no_place(small_server: Server, small_witness: Witness, ss: Material) -> None:
    for _ in range(3):
        with open_when_free(small_server, ss) as device:
            device.send(ss.audio(1))
            assert device.end()[0] == "INVALID_ARGUMENT"
    wait_until_free(small_server, ss)
    small_witness.assert_exact()


def between_two_messages(device: Device, ss: Material) -> None:
    device.send(ss.audio(0))
    device.hints(1)


def with_audio_under_way(device: Device, ss: Material) -> None:
    device.send(ss.audio(0))
    device.hints(1)
    device.send(*(ss.audio(frame) for frame in range(1, 100)))


def with_hints_it_has_not_read(device: Device, ss: Material) -> None:
    device.send(*(ss.audio(frame) for frame in range(126)))
    device.hints(1)


@pytest.mark.parametrize("moment", [between_two_messages, with_audio_under_way, with_hints_it_has_not_read])
@pytest.mark.parametrize("way", ["closes its connection", "cancels the call"])
def test_the_log_tells_and_the_place_is_free_when_a_device(
    way: str, moment: Callable[[Device, Material], None], small_server: Server, small_witness: Witness, ss: Material
) -> None:
    small_witness.assert_exact()
    seen = len(small_server.log)
    with open_when_free(small_server, ss) as device:
        moment(device, ss)
        if way == "cancels the call":
            device.call.cancel()
        else:
            device.channel.close()
        assert_logged(small_server, seen, session=device.session, status="CANCELLED")
    wait_until_free(small_server, ss)
    assert not any("Traceback" in line for line in small_server.log[seen:])
    small_witness.assert_exact()


def test_the_log_tells_and_the_place_is_free_when_a_device_process_is_killed(
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


def test_a_call_of_no_known_name_is_answered_so(ss_server: Server, ss_witness: Witness) -> None:
    with grpc.insecure_channel(ss_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE_NAME}/Nonsense")
        method(b"", timeout=PATIENCE)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    ss_witness.assert_exact()
