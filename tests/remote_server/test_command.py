"""Tests for the ``kb-server`` process: its start, its errors and its end."""

import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.device import pick_device
from knowledge_boosting.models.networks import write_bundle
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub
from knowledge_boosting.remote_server.server import listen_error
from tests.golden_cases import Golden
from tests.processes import PATIENCE, Server, command, refusal, refusal_here, running_server
from tests.remote_server.driver import Device, Material, assert_logged

BUNDLE = "ss_delay6_compression2"


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path]) -> Path:
    return golden_bundle(BUNDLE)


def described(address: str) -> pb.DescribeModelResponse:
    with grpc.insecure_channel(address) as channel:
        return HintServiceStub(channel).DescribeModel(pb.DescribeModelRequest(), timeout=PATIENCE)


@contextmanager
def child_server(*arguments: object) -> "Iterator[subprocess.Popen[str]]":
    """A server that stops when its standard input ends."""
    process = subprocess.Popen(
        command("kb-server", "--port", 0, "--device", "cpu", "--until-stdin-ends", "--drain-seconds", 0, *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ready_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def end(process: "subprocess.Popen[str]") -> str:
    """Close the standard input of a server, and check that it ends properly. Return its log."""
    out, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert not out
    assert "Traceback" not in log
    return log


def test_port_0_prints_the_port_that_answers_until_standard_input_ends(bundle: Path, ss: Material) -> None:
    with child_server("--bundle", bundle) as process:
        line = ready_line(process)
        match = re.fullmatch(rf"kb-server: listening on (127\.0\.0\.1:[1-9]\d*), bundle {BUNDLE}, device cpu\n", line)
        assert match, line
        with Device(Server(process, match[1]), ss.opening(), ss.audio(0)) as device:
            device.started()
            assert device.hints(1)[0].frame == 0
            assert process.stdin is not None
            # The content of standard input does not matter, only its end.
            process.stdin.write("quit\n")
            process.stdin.flush()
            device.send(ss.audio(1))
            assert device.hints(1)[0].frame == 1
            log = end(process)
            assert device.end() == ("UNAVAILABLE", "the server is shutting down; try another server")
    assert '"event": "server_started"' in log
    assert '"event": "server_stopped"' in log
    assert "warning" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_server_and_its_sessions(number: signal.Signals, bundle: Path, ss: Material) -> None:
    with running_server(bundle, "--drain-seconds", 1) as server, Device(server, ss.opening(), ss.audio(0)) as device:
        session = device.started()
        assert device.hints(1)[0].frame == 0
        device.send(*(ss.audio(frame) for frame in range(1, 60)))
        server.process.send_signal(number)
        status, text = device.end()
        assert status == "UNAVAILABLE"
        assert text == "the server is shutting down; try another server"
        assert server.process.wait(timeout=PATIENCE) == 0
        assert_logged(server, 0, session=session, status=status, why=text)
        server.wait_for_log('"event": "server_stopped"')
        assert not any("Traceback" in line for line in server.log)


def test_a_signal_directly_after_the_start_ends_the_server_properly(bundle: Path) -> None:
    with child_server("--bundle", bundle) as process:
        assert "listening" in ready_line(process)
        process.send_signal(signal.SIGTERM)
        # Standard input is still open, and the server must not wait for its end.
        assert process.wait(timeout=PATIENCE) == 0
        assert '"event": "server_stopped"' in end(process)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_an_ipv6_server_prints_an_address_that_answers(bundle: Path) -> None:
    with child_server("--bundle", bundle, "--host", "::1") as process:
        match = re.search(r"listening on (\S+:\d+),", ready_line(process))
        assert match
        assert match[1].startswith("[::1]:")
        assert described(match[1]).bundle_name == BUNDLE
        assert "warning" not in end(process)


def test_a_server_needs_only_the_large_network_and_warns_of_random_weights_and_missing_security(
    golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    pair, folder = golden("ss_delay0").pair, tmp_path / "random"
    write_bundle(folder, pair, pair.config, untrained=True, source="seed 1", configuration="config.json")
    (folder / "small.safetensors").unlink()
    with child_server("--bundle", folder, "--host", "0.0.0.0", "--insecure") as process:
        match = re.search(r"listening on (\S+), bundle random \(UNTRAINED\), ", ready_line(process))
        assert match
        answer = described(match[1].replace("0.0.0.0", "127.0.0.1"))
        log = end(process)
    assert answer.untrained
    assert answer.bundle_name == "random"
    assert "warning: UNTRAINED: random weights" in log
    assert "warning: listening on 0.0.0.0 without encryption or authentication" in log


def test_faults_of_the_call_are_reported_in_one_line(bundle: Path, ss_server: Server, tmp_path: Path) -> None:
    changed = shutil.copytree(bundle, tmp_path / "changed") / "large.safetensors"
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    missing = shutil.copytree(bundle, tmp_path / "missing") / "large.safetensors"
    missing.unlink()
    port = ss_server.address.rpartition(":")[2]
    calls: dict[str, tuple[object, ...]] = {
        f"cannot listen on 127.0.0.1:{port}: the port is in use; give another --port": (bundle, "--port", port),
        "--host 192.0.2.1: is not an address of this machine; give": (bundle, "--host", "192.0.2.1", "--insecure"),
        f"{tmp_path / 'nowhere'}: no bundle of that name or path": (tmp_path / "nowhere",),
        f"{changed}: digest differs from bundle.json": (changed.parent,),
        f"{missing}: no such file; this copy of the bundle lacks its large part": (missing.parent,),
        "--device cuda:7: this machine has ": (bundle, "--device", "cuda:7"),
        "--device foo: must be auto, cpu, cuda or cuda:INDEX": (bundle, "--device", "foo"),
    }
    with ThreadPoolExecutor(2) as pool:
        lines = pool.map(lambda call: refusal("kb-server", "--bundle", *call), calls.values())
        for message, line in zip(calls, lines, strict=True):
            assert line.startswith(message)
    assert described(ss_server.address).bundle_name == BUNDLE


def test_the_reason_why_a_server_cannot_listen_is_reported() -> None:
    for host in ("gpu-host.invalid", "a..b", "http://127.0.0.1"):
        assert listen_error(host, 0).startswith(f"--host {host}: the host name is unknown; give ")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert listen_error("127.0.0.1", port).startswith(f"cannot listen on 127.0.0.1:{port}: the port is in use")


@pytest.mark.parametrize("device", ["", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:\u0661", "cuda:0:0", "mps"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(InputError, match="must be auto, cpu, cuda or cuda:INDEX"):
        pick_device(device)


@pytest.mark.parametrize(("option", "value"), [("--port", 65536), ("--max-sessions", 0), ("--max-sessions", "many")])
def test_an_invalid_number_is_refused(
    option: str, value: object, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert option in refusal_here("kb-server", capsys, "--bundle", bundle, option, value)
