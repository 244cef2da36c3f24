"""The service by itself, at moments that a network connection hits by chance only."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import torch

from knowledge_boosting.remote_server.bundles import Bundles
from knowledge_boosting.remote_server.limits import Limits
from knowledge_boosting.remote_server.metrics import Metrics
from knowledge_boosting.remote_server.service import HintService
from tests.processes import PATIENCE
from tests.remote_server.driver import Material, Request


class Call:
    """A call as the service sees it."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


async def first_frame(ss: Material) -> AsyncIterator[Request]:
    yield ss.opening()
    yield ss.audio(0)
    await asyncio.Event().wait()


def test_a_device_that_vanishes_leaves_its_place_to_the_next_one(
    golden_bundle: Callable[[str], Path], ss: Material
) -> None:
    metrics = Metrics()
    path = golden_bundle("ss_delay6_compression2")
    bundles = Bundles([str(path)], torch.device("cpu"), max_sessions=1, max_wait=0, metrics=metrics)
    service = HintService(bundles, Limits(), metrics)

    async def session() -> None:
        responses = service.StreamHints(first_frame(ss), Call())
        assert (await anext(responses)).WhichOneof("response") == "started"
        assert (await anext(responses)).hint.frame == 0
        await responses.aclose()  # type: ignore[attr-defined]  # what gRPC's own generators have

    async def one_after_the_other() -> None:
        for _ in range(3):
            await session()

    try:
        asyncio.run(asyncio.wait_for(one_after_the_other(), PATIENCE))
    finally:
        service.close()
