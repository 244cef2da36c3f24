"""Tests for connections to a server, and for the messages when a connection fails."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc
import pytest

from knowledge_boosting.common.call_credentials import Credentials, read_credentials
from knowledge_boosting.common.connection import Refused, connect
from knowledge_boosting.common.errors import InputError
from tests.certificates import Certificates

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
PLAIN = Credentials()


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Listen on a loopback port, and pass every connection to ``answer``."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        def serve(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                answer(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of a gRPC server that listens on the loopback addresses."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    with suppress(RuntimeError):  # a machine without IPv6
        server.add_insecure_port(f"[::1]:{port}")
    server.start()
    yield port
    server.stop(None).wait()


def refusal(server: str, credentials: Credentials = PLAIN, kind: type[InputError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        connect(server, credentials, 5).close()
    return str(caught.value).removeprefix(f"--server {server}: ")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("variable", PROXIES)
def test_loopback_goes_through_no_proxy(variable: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    hosts = ["127.0.0.1", "localhost", "LOCALHOST"] + ["[::1]"] * has_ipv6()
    for host in hosts:
        connect(f"{host}:{port}", PLAIN, 5).close()


def test_a_host_behind_a_proxy_is_reached_through_it_or_the_proxy_is_named(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    def tunnel(connection: socket.socket) -> None:
        asked.append(connection.recv(4096).splitlines()[0])
        with socket.create_connection(("127.0.0.1", port)) as server:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=pump, args=(server, connection), daemon=True)
            back.start()
            pump(connection, server)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def forbid(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    for variable in PROXIES:
        monkeypatch.delenv(variable, raising=False)
    with listening(tunnel) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy}")
        connect("gpu-host.invalid:50051", PLAIN, 5).close()
        assert asked == [b"CONNECT gpu-host.invalid:50051 HTTP/1.1"]
    with listening(forbid) as proxy:
        for where in (proxy, 1):
            monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{where}")
            assert refusal("gpu-host.invalid:50051") == (
                f"no answer through the proxy 127.0.0.1:{where} from https_proxy; "
                "set no_proxy=gpu-host.invalid to connect directly"
            )


def test_an_unknown_host_is_reported() -> None:
    assert refusal("gpu-host.invalid:50051") == "the host name is unknown; check its spelling"
    # A name that is not a valid host name gives the same message.
    assert refusal("a..b:50051") == "the host name is unknown; check its spelling"


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_another_service_on_the_port_is_named(encrypted: bool, certificates: Certificates) -> None:
    def ssh(connection: socket.socket) -> None:
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        while connection.recv(4096):
            pass

    def web(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    credentials = read_credentials(["127.0.0.1:1"], tls_ca=certificates.ca) if encrypted else PLAIN
    for answer, service in ((ssh, "an SSH server"), (web, "a web server (HTTP/1)")):
        with listening(answer) as port:
            message = refusal(f"127.0.0.1:{port}", credentials, Refused)
        assert message == f"{service} answers on that port; give the port of kb-server, which is 50051 by default"


def test_a_web_server_with_tls_is_distinguished_from_a_hint_server(certificates: Certificates) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.pair("server"))
    context.set_alpn_protocols(["http/1.1"])

    def web(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(4096)

    with listening(web) as port:
        server = f"127.0.0.1:{port}"
        credentials = read_credentials([server], tls_ca=certificates.ca)
        assert refusal(server, credentials, Refused) == "speaks TLS but not gRPC; give the port of kb-server"
