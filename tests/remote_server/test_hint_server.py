"""Tests for the server core without a transport, for moments that a real connection rarely produces."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import torch

from knowledge_boosting.remote_server.core.access import ANONYMOUS
from knowledge_boosting.remote_server.core.bundles import Bundles
from knowledge_boosting.remote_server.core.hint_server import HintServer
from knowledge_boosting.remote_server.core.limits import Limits
from knowledge_boosting.remote_server.core.metrics import Metrics
from tests.processes import PATIENCE
from tests.remote_server.driver import Material, Request


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
