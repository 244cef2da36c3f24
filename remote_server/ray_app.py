"""The hint service on many machines: a Ray Serve application. Each replica does the same as kb-server.

docs/cluster.md explains how to start it. Ray Serve passes a call to the method of the same name. Streamed requests are
an asynchronous iterator, and streamed responses are an asynchronous generator.
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
from knowledge_boosting.remote_server.core.access import ANONYMOUS
from knowledge_boosting.remote_server.core.bundles import Bundles
from knowledge_boosting.remote_server.core.hint_server import HintServer
from knowledge_boosting.remote_server.core.limits import Limits
from knowledge_boosting.remote_server.core.metrics import Metrics
from knowledge_boosting.remote_server.core.refusals import Refused, Status
from knowledge_boosting.remote_server.service import RETRY_METADATA, checked_requests, grpc_code

# Concurrent calls of a replica in addition to its sessions: other methods, and sessions that are refused.
_OTHER_CALLS = 16
# The start of a replica takes longer than a device waits, so the application scales up before all replicas are full.
_TARGET_LOAD = 0.75

# All times are in seconds.
_MAX_WAIT = 0.001  # time that a step waits for the audio of other sessions
_SHUTDOWN_POLL = 0.25
_DEREGISTRATION = 2.0  # time until every HAProxy knows that a replica shuts down
_MOVE_TIME = 5.0  # time for the devices to move to another replica after that
_SHUTDOWN_TIME = 8.0  # time for the whole shutdown after the deregistration
_HEALTH_PERIOD, _HEALTH_TIMEOUT = 5.0, 10.0
# The end of a replica can cause a gap in the hints of its devices, while a replica that is not needed costs little.
_UPSCALE_DELAY, _DOWNSCALE_DELAY = 5.0, 600.0


class Options(BaseModel):
    """The options of an application: ``args`` in a Serve configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = DEFAULT_BUNDLE  # name, or path on every node
    max_sessions: int = Field(default=16, ge=1)  # of each replica
    cpus: float = Field(default=1, gt=0)  # for each replica
    gpus: float = Field(default=0, ge=0)  # for each replica; a fraction of a GPU or whole GPUs
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)


def build(options: Options) -> serve.Application:
    """Build the application for a bundle.

    Raises:
        InputError: There is no such bundle.
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
        graceful_shutdown_timeout_s=_DEREGISTRATION + _SHUTDOWN_TIME,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_POLL,
        health_check_period_s=_HEALTH_PERIOD,
        health_check_timeout_s=_HEALTH_TIMEOUT,
    )
    return deployment.bind(options)


class HintReplica:
    """One replica: a server that is called through Ray."""

    def __init__(self, options: Options) -> None:
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
            raise Failure("this node was started without the settings of deploy/ray/environment; see docs/cluster.md")
        self._server = _server(options)
        self._server.load_speaker_encoder()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._server.watch()), loop.create_task(self._drain_when(_shutdown_check()))]

    async def StreamHints(
        self, requests: AsyncIterator[pb.StreamHintsRequest], grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.StreamHintsResponse]:
        """Serve one session."""
        try:
            session = self._server.session(checked_requests(requests), ANONYMOUS, grpc_context.peer())
            async with aclosing(session) as responses:
                async for response in responses:
                    yield response
        except Refused as error:
            _refuse(error, grpc_context)

    async def Enroll(self, request: pb.EnrollRequest, grpc_context: RayServegRPCContext) -> pb.EnrollResponse:
        """Compute a speaker embedding from enrollment speech."""
        try:
            return await self._server.enroll(request, ANONYMOUS, grpc_context.peer())
        except Refused as error:
            _refuse(error, grpc_context)
            return pb.EnrollResponse()

    async def DescribeModel(
        self, request: pb.DescribeModelRequest, grpc_context: RayServegRPCContext
    ) -> pb.DescribeModelResponse:
        """Describe the bundle of this replica."""
        try:
            return self._server.describe(request, ANONYMOUS, grpc_context.peer())
        except Refused as error:
            _refuse(error, grpc_context)
            return pb.DescribeModelResponse()

    async def check_health(self) -> None:
        """Check all engines, so that Ray notices a thread that hangs or has ended, and a device that fails."""
        for bundle in self._server.bundles.served:
            await bundle.engine.check_health()

    async def _drain_when(self, shutting_down: Callable[[], bool]) -> None:
        while not shutting_down():
            await asyncio.sleep(_SHUTDOWN_POLL)
        await asyncio.sleep(_DEREGISTRATION)
        await self._server.drain(_MOVE_TIME)


def _refuse(reason: Refused, context: RayServegRPCContext) -> None:
    """Set the status of a call. Ray's contexts have no ``abort``."""
    if reason.status is Status.RESOURCE_EXHAUSTED:
        context.set_trailing_metadata(RETRY_METADATA)
    context.set_code(grpc_code(reason.status))
    context.set_details(str(reason))


def _server(options: Options) -> HintServer:
    # Ray makes only the GPUs of this replica visible.
    device, metrics = pick_device("auto"), Metrics()
    bundles = Bundles([options.bundle], device, max_sessions=options.max_sessions, max_wait=_MAX_WAIT, metrics=metrics)
    # All calls come from the address of HAProxy, so limits by address are off.
    return HintServer(bundles, Limits(sessions_per_peer=0, enrollments_per_minute=0), metrics)


def _shutdown_check() -> Callable[[], bool]:
    """Return a function that returns whether Ray is shutting down this replica.

    Ray notifies a deployment only after its last call has ended, which is too late to drain it.
    """
    worker = ray._private.worker.global_worker
    replica = worker.actors[worker.actor_id]._replica_impl
    return lambda: bool(replica._shutting_down)
