"""Tests for the server core without a transport, for moments that a real connection rarely produces."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.remote_server.core.access import ANONYMOUS, Caller
from knowledge_boosting.remote_server.core.bundles import Bundles
from knowledge_boosting.remote_server.core.hint_server import HintServer
from knowledge_boosting.remote_server.core.limits import Limits
from knowledge_boosting.remote_server.core.metrics import Metrics
from knowledge_boosting.remote_server.core.refusals import Refused
from tests.processes import PATIENCE, call_here
from tests.remote_server.driver import Material, Request

CONFIG = Path(__file__).parents[2] / "configs/demo/ss-48ms.json"


async def first_frame(ss: Material) -> AsyncIterator[Request]:
    yield ss.opening()
    yield ss.audio(0)
    await asyncio.Event().wait()


def test_the_slot_of_a_vanished_device_is_free_for_the_next_one(
    golden_bundle: Callable[[str], Path], ss: Material
) -> None:
    metrics = Metrics()
    path = golden_bundle("ss_delay6_compression2")
    bundles = Bundles([str(path)], torch.device("cpu"), max_sessions=1, max_wait=0, metrics=metrics)
    server = HintServer(bundles, Limits(), metrics)

    async def session() -> None:
        responses = server.session(first_frame(ss), ANONYMOUS, "ipv4:127.0.0.1:1")
        assert (await anext(responses)).WhichOneof("response") == "started"
        assert (await anext(responses)).hint.frame == 0
        await responses.aclose()

    async def one_after_the_other() -> None:
        for _ in range(3):
            await session()

    try:
        asyncio.run(asyncio.wait_for(one_after_the_other(), PATIENCE))
    finally:
        server.close()


def test_bundles_share_the_measured_number_of_sessions(golden_bundle: Callable[[str], Path]) -> None:
    """Each number is for the whole device. What the sessions of one bundle leave of it, the others can have."""
    paths = [str(golden_bundle(name)) for name in ("ss_delay6_compression2", "tse_delay6")]
    metrics = Metrics()
    bundles = Bundles(paths, torch.device("cpu"), max_sessions=None, max_wait=0, metrics=metrics)
    server = HintServer(bundles, Limits(), metrics)
    try:
        one, other = bundles.served
        one.slots, other.slots = 14, 10
        for sessions, left in ((0, 10), (1, 9), (7, 5), (13, 0), (14, 0)):
            one.sessions = sessions
            assert bundles.free_slots(other) == left
            request = pb.DescribeModelRequest(bundle=other.manifest.name)
            described = server.describe(request, ANONYMOUS, "ipv4:127.0.0.1:1")
            assert (described.free_sessions, described.max_sessions) == (left, 10)
        one.sessions, other.sessions = 7, 5
        assert (bundles.free_slots(one), bundles.free_slots(other)) == (0, 0)
    finally:
        server.close()


def test_two_bundles_of_one_name_are_refused(tmp_path: Path) -> None:
    """Devices, the log and the metrics could not tell them apart. The same bundle may be in two folders."""
    paths = list[Path]()
    for seed in (1, 1, 2):
        paths.append(tmp_path / f"{len(paths)}" / "own")
        flags = ["--untrained", "--seed", seed, "--config", CONFIG, "--output", paths[-1]]
        assert call_here("kb-export", *flags) == 0
    for given, refused in ((paths[:2], False), (paths[1:], True)):
        names, metrics = [str(path) for path in given], Metrics()
        with pytest.raises(InputError, match="own: has the same name, own, as") if refused else nullcontext():
            Bundles(names, torch.device("cpu"), max_sessions=1, max_wait=0, metrics=metrics).close()


def test_refusals_of_every_call_are_counted(golden_bundle: Callable[[str], Path]) -> None:
    metrics = Metrics()
    path = golden_bundle("ss_delay6_compression2")
    bundles = Bundles([str(path)], torch.device("cpu"), max_sessions=1, max_wait=0, metrics=metrics)
    server = HintServer(bundles, Limits(), metrics)
    try:
        with pytest.raises(Refused, match="'nothing' is unknown"):
            server.describe(pb.DescribeModelRequest(bundle="nothing"), ANONYMOUS, "ipv4:127.0.0.1:1")
        silence = pb.EnrollRequest(sample_rate=16000, pcm_encoding=pb.PCM_ENCODING_S16LE, pcm=bytes(2 * 16000 * 6))
        with pytest.raises(Refused, match=r"contains no speech|no speaker encoder"):
            asyncio.run(server.enroll(silence, ANONYMOUS, "ipv4:127.0.0.1:1"))
        counts = {
            status: metrics.refused.labels(status)._value.get()
            for status in ("NOT_FOUND", "INVALID_ARGUMENT", "UNIMPLEMENTED")
        }
    finally:
        server.close()
    assert counts["NOT_FOUND"] == 1
    assert counts["INVALID_ARGUMENT"] + counts["UNIMPLEMENTED"] == 1


@pytest.mark.parametrize(
    ("caller", "peer", "limited"),
    [
        (ANONYMOUS, "ipv4:192.0.2.1:1", True),
        (ANONYMOUS, "ipv4:127.0.0.1:1", False),  # it can be a proxy for many devices
        (Caller("laptop"), "ipv4:127.0.0.1:1", True),
    ],
)
def test_enrollments_are_counted_by_token_or_host(
    caller: Caller, peer: str, limited: bool, golden_bundle: Callable[[str], Path]
) -> None:
    metrics = Metrics()
    path = golden_bundle("ss_delay6_compression2")
    bundles = Bundles([str(path)], torch.device("cpu"), max_sessions=1, max_wait=0, metrics=metrics)
    server = HintServer(bundles, Limits(enrollments_per_minute=1), metrics)
    if server._speakers is None:
        server.close()
        pytest.skip("the speaker encoder is not installed")
    silence = pb.EnrollRequest(sample_rate=16000, pcm_encoding=pb.PCM_ENCODING_S16LE, pcm=bytes(2 * 16000 * 6))
    statuses = []
    try:
        for _ in range(2):
            with pytest.raises(Refused) as refused:
                asyncio.run(server.enroll(silence, caller, peer))
            statuses.append(refused.value.status.name)
    finally:
        server.close()
    assert statuses == ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED" if limited else "INVALID_ARGUMENT"]
