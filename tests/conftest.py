"""Fixtures shared by all tests."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from knowledge_boosting.models.device import pick_device, pick_precision
from knowledge_boosting.models.networks import write_bundle
from tests.certificates import TOKENS_FILE, Certificates, make_certificates, write_private
from tests.golden_cases import Golden, load
from tests.processes import Server, running_server

# A test run in the background may have been told to survive its terminal, and a shell lets it survive Ctrl-C; what it
# starts should not inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the large network in tests that can use a GPU")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of tests that can use a GPU."""
    chosen = pick_device(request.config.getoption("--device"))
    pick_precision("float32", chosen)
    return chosen


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """A parity case by name, read once."""
    cases: dict[str, Golden] = {}

    def get(name: str) -> Golden:
        if name not in cases:
            cases[name] = load(name)
        return cases[name]

    return get


@pytest.fixture(scope="session")
def golden_bundle(golden: Callable[[str], Golden], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a parity case by name, written once."""
    folder = tmp_path_factory.mktemp("bundles")

    def get(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pair = golden(name).pair
            write_bundle(path, pair, pair.config, untrained=False, source="parity vectors", configuration="config.json")
        return path

    return get


@pytest.fixture(scope="session")
def ss_server(golden_bundle: Callable[[str], Path]) -> Iterator[Server]:
    """A server of the SS case ``ss_delay6_compression2``, shared by tests that do not end it."""
    with running_server(golden_bundle("ss_delay6_compression2")) as server:
        yield server


@pytest.fixture(scope="session")
def tse_server(golden_bundle: Callable[[str], Path]) -> Iterator[Server]:
    """A server of the TSE case ``tse_delay6``, shared by tests that do not end it."""
    with running_server(golden_bundle("tse_delay6")) as server:
        yield server


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates and keys in files."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def guarded_server(golden_bundle: Callable[[str], Path], certificates: Certificates) -> Iterator[Server]:
    """A server of the SS case for other machines: with TLS and tokens."""
    tokens = write_private(certificates.folder / "tokens.toml", TOKENS_FILE)
    certificate, key = certificates.pair("server")
    with running_server(
        *(golden_bundle("ss_delay6_compression2"), "--host", "0.0.0.0", "--auth-tokens", tokens),
        *("--tls-cert", certificate, "--tls-key", key),
    ) as server:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        yield server


@pytest.fixture(scope="session")
def mutual_server(golden_bundle: Callable[[str], Path], certificates: Certificates) -> Iterator[Server]:
    """A server of the SS case that wants a certificate of its devices, and describes its interface to all of them."""
    certificate, key = certificates.pair("server")
    with running_server(
        *(golden_bundle("ss_delay6_compression2"), "--host", "0.0.0.0", "--reflection"),
        *("--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", certificates.ca),
    ) as server:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        yield server
