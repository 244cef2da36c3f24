"""The hint service on many machines: a Ray Serve application whose replicas each do what kb-server does.

docs/cluster.md tells how it is started. Ray Serve hands a call to the method of the same name, requests as an
asynchronous iterator, and expects an asynchronous generator of responses where a call streams.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import ray._private.worker
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.grpc_util import RayServegRPCContext

from knowledge_boosting.common.errors import Failure
from knowledge_boosting.models.bundle import DEFAULT_BUNDLE, Bundle
from knowledge_boosting.models.device import pick_device
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.remote_server.core.access import ANYBODY
from knowledge_boosting.remote_server.core.bundles import Bundles
from knowledge_boosting.remote_server.core.hint_server import HintServer
from knowledge_boosting.remote_server.core.limits import Limits
from knowledge_boosting.remote_server.core.metrics import Metrics
from knowledge_boosting.remote_server.core.refusals import Refused, Status
from knowledge_boosting.remote_server.service import TRY_LATER, code_of, readable

# Calls beyond a replica's sessions that it takes at once: questions, enrollments, and sessions to be refused.
_OTHER_CALLS = 16
# Scale up before a replica is full: starting another one takes longer than a device waits.
_TARGET_LOAD = 0.75

# Seconds.
_MAX_WAIT = 0.001  # of a step for further sessions' audio
_LEAVING_POLL = 0.25
_DEREGISTRATION = 2.0  # for every HAProxy to hear that a replica leaves
_MOVING = 5.0  # for its devices to go to another replica after that
_DRAIN = 8.0  # for all of this
_HEALTH_PERIOD, _HEALTH_TIMEOUT = 5.0, 10.0
_UPSCALE_DELAY, _DOWNSCALE_DELAY = 5.0, 600.0  # a replica that goes costs its devices a gap; one too many costs little


class Options(BaseModel):
    """What an application is built from: ``args`` in a Serve configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = DEFAULT_BUNDLE  # name, or path on every node
    max_sessions: int = Field(default=16, ge=1)  # of one replica
    cpus: float = Field(default=1, gt=0)  # of one replica
    gpus: float = Field(default=0, ge=0)  # of one replica; a share of one, or whole ones
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)


def build(options: Options) -> serve.Application:
    """The application of a bundle.

    Raises:
        InputError: there is no such bundle.
    """
    Bundle(options.bundle)
    deployment = serve.deployment(
        HintReplica,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=max(options.min_replicas, options.max_replicas),
            target_ongoing_requests=_TARGET_LOAD * options.max_sessions,
            upscale_delay_s=_UPSCALE_DELAY,
            downscale_delay_s=_DOWNSCALE_DELAY,
        ),
        max_ongoing_requests=options.max_sessions + _OTHER_CALLS,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        graceful_shutdown_timeout_s=_DEREGISTRATION + _DRAIN,
        graceful_shutdown_wait_loop_s=_LEAVING_POLL,
        health_check_period_s=_HEALTH_PERIOD,
        health_check_timeout_s=_HEALTH_TIMEOUT,
    )
    return deployment.bind(options)


class HintReplica:
    """One replica: a server of its own, reached through Ray."""

    def __init__(self, options: Options) -> None:
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
            raise Failure("this node was started without the settings of deploy/ray/environment; see docs/cluster.md")
        self._server = _server(options)
        self._server.load_speaker_encoder()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._server.watch()), loop.create_task(self._drain_when(_leaving()))]

    async def StreamHints(
        self, requests: AsyncIterator[pb.StreamHintsRequest], grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.StreamHintsResponse]:
        """One session."""
        try:
            session = self._server.session(readable(requests), ANYBODY, grpc_context.peer())
            async with aclosing(session) as responses:
                async for response in responses:
                    yield response
        except Refused as error:
            _refuse(error, grpc_context)

    async def Enroll(self, request: pb.EnrollRequest, grpc_context: RayServegRPCContext) -> pb.EnrollResponse:
        """Enrollment speech to a speaker embedding."""
        try:
            return await self._server.enroll(request, ANYBODY, grpc_context.peer())
        except Refused as error:
            _refuse(error, grpc_context)
            return pb.EnrollResponse()

    async def DescribeModel(
        self, request: pb.DescribeModelRequest, grpc_context: RayServegRPCContext
    ) -> pb.DescribeModelResponse:
        """What this replica runs."""
        try:
            return self._server.describe(request, ANYBODY)
        except Refused as error:
            _refuse(error, grpc_context)
            return pb.DescribeModelResponse()

    async def check_health(self) -> None:
        """Have every engine answer: a thread that hangs or has ended, or a device that fails, is noticed by Ray."""
        for bundle in self._server.bundles.served:
            await bundle.engine.answer()

    async def _drain_when(self, leaving: Callable[[], bool]) -> None:
        while not leaving():
            await asyncio.sleep(_LEAVING_POLL)
        await asyncio.sleep(_DEREGISTRATION)
        await self._server.drain(_MOVING)


def _refuse(why: Refused, context: RayServegRPCContext) -> None:
    """Give a call its end; Ray's contexts have no ``abort``."""
    if why.status is Status.RESOURCE_EXHAUSTED:
        context.set_trailing_metadata(TRY_LATER)
    context.set_code(code_of(why.status))
    context.set_details(str(why))


def _server(options: Options) -> HintServer:
    # Ray has made the replica's share of the GPUs, or none, the visible ones.
    device, metrics = pick_device("auto"), Metrics()
    bundles = Bundles([options.bundle], device, max_sessions=options.max_sessions, max_wait=_MAX_WAIT, metrics=metrics)
    # All calls come from HAProxy's address, which does not show whose they are: limits by address are off.
    return HintServer(bundles, Limits(sessions_per_peer=0, enrollments_per_minute=0), metrics)


def _leaving() -> Callable[[], bool]:
    """Whether Ray is stopping this replica: it tells a deployment only when its last call has ended, far too late."""
    worker = ray._private.worker.global_worker
    replica = worker.actors[worker.actor_id]._replica_impl
    return lambda: bool(replica._shutting_down)
