"""Fixtures shared by all tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models.bundle import write_bundle
from tests.golden_cases import Golden, load
from tests.processes import Server, running_server


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
