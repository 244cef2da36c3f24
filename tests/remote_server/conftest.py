"""Fixtures for the tests of the server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.golden_cases import Golden
from tests.processes import Server, running_server
from tests.remote_server.driver import Material, Witness, material


@pytest.fixture(scope="session")
def ss(golden: Callable[[str], Golden], golden_bundle: Callable[[str], Path]) -> Material:
    """The material of ``ss_server``."""
    return material(golden_bundle("ss_delay6_compression2"), golden("ss_delay6_compression2"))


@pytest.fixture(scope="session")
def tse(golden: Callable[[str], Golden], golden_bundle: Callable[[str], Path]) -> Material:
    """The material of ``tse_server``."""
    return material(golden_bundle("tse_delay6"), golden("tse_delay6"))


@pytest.fixture(scope="module")
def ss_witness(ss_server: Server, ss: Material) -> Iterator[Witness]:
    """A session on ``ss_server`` that stays open during a whole module."""
    witness = Witness(ss_server, ss)
    yield witness
    witness.close()


@pytest.fixture(scope="module")
def tse_witness(tse_server: Server, tse: Material) -> Iterator[Witness]:
    """A session on ``tse_server`` that stays open during a whole module."""
    witness = Witness(tse_server, tse)
    yield witness
    witness.close()


@pytest.fixture(scope="module")
def small_server(golden_bundle: Callable[[str], Path]) -> Iterator[Server]:
    """A server with two slots."""
    with running_server(golden_bundle("ss_delay6_compression2"), "--max-sessions", 2) as server:
        yield server


@pytest.fixture(scope="module")
def small_witness(small_server: Server, ss: Material) -> Iterator[Witness]:
    """A session that uses one of the two slots of ``small_server``."""
    witness = Witness(small_server, ss)
    yield witness
    witness.close()
