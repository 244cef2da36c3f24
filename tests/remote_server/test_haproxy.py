"""Tests for the documented configuration of HAProxy as a proxy for open networks."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub
from tests.attackers import WATCH
from tests.haproxy import haproxy, running_haproxy
from tests.processes import PATIENCE, Server, environment
from tests.remote_server.driver import Device, Material

ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(haproxy() is None, reason="HAProxy is not installed (apt-get install haproxy)"),
]


@pytest.fixture
def behind(ss_server: Server) -> Iterator[Server]:
    """The server behind the proxy."""
    with running_haproxy(ss_server.address) as address:
        yield Server(ss_server.process, address)


def test_the_proxy_passes_sessions(behind: Server, ss: Material) -> None:
    with Device(behind, ss.opening(), *(ss.audio(frame) for frame in range(5))) as device:
        device.started()
        assert [hint.frame for hint in device.hints(5)] == list(range(5))
        device.finish()
        assert device.end() == ("OK", "")
    with Device(behind, ss.opening(bundle_id="another")) as refused:
        assert refused.end()[0] == "FAILED_PRECONDITION"


def test_the_proxy_blocks_other_services(behind: Server) -> None:
    with grpc.insecure_channel(behind.address) as channel:
        assert HintServiceStub(channel).DescribeModel(pb.DescribeModelRequest(), timeout=PATIENCE).bundle_name
        for method in (WATCH, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
            with pytest.raises(grpc.RpcError) as refused:
                list(call(iter([b""]), timeout=PATIENCE))
            assert isinstance(refused.value, grpc.Call)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def under_attack(*arguments: object) -> dict[str, int]:
    call = [sys.executable, "-m", "benchmarks.under_attack", *map(str, arguments)]
    run = subprocess.run(call, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, int] = json.loads(run.stdout)
    return result


@pytest.mark.long  # half a minute on an otherwise idle machine
def test_the_proxy_withstands_all_attacks_at_once() -> None:
    result = under_attack(*2 * ["watch", "pings", "places", "refusals"], "resets", "--seconds", 30, "--proxy")
    assert result["lost"] + result["above_48_ms"] <= 0.05 * result["sent"], result
    assert result["above_250_ms"] == 0, result
    assert result["sigterm_seconds"] is not None
    assert result["sigterm_seconds"] <= 8, result


def test_the_proxy_stops_floods() -> None:
    result = under_attack("pings", "resets", "--seconds", 6, "--proxy")
    assert result["lost"] + result["above_48_ms"] <= 0.5 * result["sent"], result
