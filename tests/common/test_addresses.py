"""Tests for parsing and classifying network addresses."""

import pytest

from knowledge_boosting.common.addresses import is_loopback, proxy_of, split_address
from knowledge_boosting.common.errors import InputError

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in PROXIES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("gpu-host:50051", ("gpu-host", 50051)),
        ("10.0.0.7:1", ("10.0.0.7", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:5", ("fe80::1%eth0", 5)),
    ],
)
def test_an_address_is_host_and_port(server: str, expected: tuple[str, int]) -> None:
    assert split_address(server) == expected


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ("http://gpu-host:50051/", "must be an address without http://; give gpu-host:50051"),
        ("grpc://gpu-host:50051", "must be an address without grpc://; give gpu-host:50051"),
        ("https://", "must be an address without https://; give HOST:PORT"),
        ("::1", "an IPv6 address needs brackets and a port; give [::1]:50051"),
        ("2001:db8::7:50051", "an IPv6 address needs brackets; give [2001:db8::7]:50051"),
        ("gpu-host", "must be HOST:PORT; give gpu-host:50051 if 50051 is the port"),
        ("gpu-host:", "must be HOST:PORT, with a port from 1 to 65535"),
        ("gpu-host:0", "must be HOST:PORT, with a port from 1 to 65535"),
        ("gpu-host:65536", "must be HOST:PORT, with a port from 1 to 65535"),
        ("gpu-host:\u0661", "must be HOST:PORT, with a port from 1 to 65535"),
        ("gpu-host:50051/", "must be HOST:PORT, with a port from 1 to 65535"),
        (":50051", "must be HOST:PORT, such as gpu-host:50051"),
        ("", "must be HOST:PORT, such as gpu-host:50051"),
        ("[gpu-host]:50051", "must be HOST:PORT, such as gpu-host:50051"),
        ("[::1]", "must be HOST:PORT, such as gpu-host:50051"),
        ("me@gpu-host:50051", "must be HOST:PORT, such as gpu-host:50051"),
        ("gpu host:50051", "must be HOST:PORT, such as gpu-host:50051"),
        ("unix:/run/kb:50051", "must be HOST:PORT, such as gpu-host:50051"),
    ],
)
def test_a_malformed_address_is_refused_with_the_expected_form(server: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        split_address(server)
    assert str(caught.value) == f"--server {server}: {message}"


def test_every_spelling_of_a_loopback_address_is_recognised() -> None:
    ours = ["localhost", "LOCALHOST", "LocalHost.", "127.0.0.1", "127.8.9.10", "::1", "[::1]", "::ffff:127.0.0.1"]
    assert all(map(is_loopback, ours))
    others = ["", "gpu-host", "localhost.example", "127.0.0.1.example", "0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1"]
    assert not any(map(is_loopback, others))


def test_the_proxy_of_a_host_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_of("gpu-host") is None
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:3128/")
    assert proxy_of("gpu-host") == ("proxy:3128", "http_proxy")
    monkeypatch.setenv("https_proxy", "other:8080")
    assert proxy_of("gpu-host") == ("other:8080", "https_proxy")
    for host in ("LOCALHOST", "::1", "127.0.0.1"):
        assert proxy_of(host) is None
    for exceptions in ("gpu-host", "a, GPU-HOST", "host"):
        monkeypatch.setenv("no_proxy", exceptions)
        assert proxy_of("gpu-host") is None
        assert proxy_of("gpu-host.example") == ("other:8080", "https_proxy")
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    assert proxy_of("10.1.2.3") is None
    assert proxy_of("11.1.2.3") == ("other:8080", "https_proxy")
