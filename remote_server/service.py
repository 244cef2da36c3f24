"""The gRPC service: whom it serves, and what it tells them."""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from knowledge_boosting.common.addresses import host_of
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import PROTOCOL_VERSION
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceServicer
from knowledge_boosting.remote_server.access import CALLER, Caller
from knowledge_boosting.remote_server.bundles import Bundles, ServedBundle
from knowledge_boosting.remote_server.enrollment import SpeakerEncoder
from knowledge_boosting.remote_server.limits import Limits
from knowledge_boosting.remote_server.log import Refusals, log_event
from knowledge_boosting.remote_server.messages import (
    Refused,
    check_config,
    check_enrollment,
    read_config,
    unknown_bundle,
)
from knowledge_boosting.remote_server.metrics import Metrics
from knowledge_boosting.remote_server.session import Session

_log = logging.getLogger("kb-server")

_RETRY_MS = 2000  # after which a device that found no place may try again

# grpc's own context types differ between its synchronous and asyncio halves.
Context = Any


class HintService(HintServiceServicer):
    """Serves the hints of one or more bundles."""

    def __init__(self, bundles: Bundles, limits: Limits, metrics: Metrics) -> None:
        self.bundles = bundles
        self._limits, self._metrics, self._refusals = limits, metrics, Refusals()
        self._sessions: dict[Session, asyncio.Task[Any]] = {}
        self._loading = 0  # calls that wait for a bundle
        self._callers: dict[Session, Caller] = {}
        self._peers: Counter[str] = Counter()
        self._enrollments: dict[str, deque[float]] = {}
        self._draining = False
        self._speakers = SpeakerEncoder() if SpeakerEncoder.installed() else None

    def refused(self, peer: str, method: str, status: str, why: str) -> None:
        """Count and log a call that got nothing."""
        self._metrics.refused.labels(status).inc()
        caller = CALLER.get().name or host_of(peer)
        self._refusals.add(caller, "call_refused", peer=peer, method=method[:100], status=status, why=why)

    async def watch(self) -> None:
        """End sessions whose time is up, as long as the server runs.

        Raises:
            Failure: an engine has ended, and its sessions would wait for ever.
        """
        while True:
            await asyncio.sleep(0.5)
            self._refusals.flush()
            self.bundles.check()
            now = time.monotonic()
            for session, task in list(self._sessions.items()):
                why = session.overdue(now) or self._taken_away(session)
                if why is not None:
                    session.end(why)
                if session.stuck(now):
                    task.cancel()  # it waits for a device that does not read

    def _taken_away(self, session: Session) -> Refused | None:
        try:
            self._callers[session].check_still(session.bundle_name)
        except Refused as error:
            return error
        return None

    async def drain(self, seconds: float) -> None:
        """Accept no more sessions, tell the devices to go elsewhere, and end those still here after ``seconds``."""
        if not self._draining:
            self._draining = True
            for session in self._sessions:
                session.announce_draining(seconds)
        await self._wait_until_empty(seconds)
        for session in self._sessions:
            session.end(_shutting_down())
        await self._wait_until_empty(2)

    def load_speaker_encoder(self) -> None:
        """Begin to load what enrollments need, if devices may want some; the first one need not wait for it then."""
        if self._speakers is not None and any(served.manifest.model.needs_speaker for served in self.bundles.served):
            self._speakers.load()

    def close(self) -> None:
        """End the threads."""
        if self._speakers is not None:
            self._speakers.close()
        self.bundles.close()

    async def StreamHints(
        self, request_iterator: AsyncIterator[pb.StreamHintsRequest], context: Context
    ) -> AsyncIterator[pb.StreamHintsResponse]:
        """One session, from its configuration to the end of its audio."""
        peer = context.peer()
        host = host_of(peer)
        record = _Record(peer, self._refusals)
        bundle: ServedBundle | None = None
        self._peers[host] += 1
        stack = ExitStack()
        try:
            if self._draining:
                raise _shutting_down()
            self._check_host(host, self._limits.sessions_per_peer or 0)
            config = await self._configuration(request_iterator)
            found = await self._admit(config)
            if self._draining:  # by now
                raise _shutting_down()
            self._check_host(host, self._limits.sessions_of(host, found.slots))
            stack.enter_context(CALLER.get().session())
            bundle = found
            bundle.sessions += 1
            session = record.session = Session(config, bundle, self._limits, self._metrics)
            task = asyncio.current_task()
            assert task is not None
            self._sessions[session], self._callers[session] = task, CALLER.get()
            self._metrics.sessions.labels(bundle.manifest.name).inc()
            record.log_start(bundle)
            # Closed before the place is given away; left to the interpreter, it would be closed some time later.
            async with aclosing(session.responses(request_iterator)) as responses:
                async for response in responses:
                    yield response
            record.end("OK", "the device ended it")
        except Refused as error:
            record.end(error.status.name, str(error))
            if error.status is grpc.StatusCode.RESOURCE_EXHAUSTED:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", str(_RETRY_MS)),))
            await context.abort(error.status, str(error))
        except (asyncio.CancelledError, GeneratorExit):
            why = record.session.ended if record.session is not None else None
            if why is not None:
                record.end(why.status.name, str(why))
            else:
                record.end("CANCELLED", "the device went away")
            raise
        except Exception:
            _log.exception("session failed")
            record.end("INTERNAL", "the server failed on it")
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed on this session; see its log")
        finally:
            stack.close()
            self._peers[host] -= 1
            self._peers += Counter()  # forgets those that have none
            if bundle is None:
                self._metrics.refused.labels(record.status).inc()
            else:
                self._sessions.pop(record.session, None)  # type: ignore[arg-type]
                self._callers.pop(record.session, None)  # type: ignore[arg-type]
                bundle.sessions -= 1
                self._metrics.sessions.labels(bundle.manifest.name).dec()
                self._metrics.ended.labels(bundle.manifest.name, record.status).inc()
                self.bundles.let_go(bundle)

    async def Enroll(self, request: pb.EnrollRequest, context: Context) -> pb.EnrollResponse:
        """Enrollment speech to a speaker embedding."""
        try:
            speech = check_enrollment(request, self._limits.enrollment_seconds)
            if self._speakers is None:
                raise Refused(
                    "this server has no speaker encoder; install it there with "
                    "pip install 'knowledge-boosting[enroll]'",
                    grpc.StatusCode.UNIMPLEMENTED,
                )
            self._count_enrollment(host_of(context.peer()))
            embedding = await self._speakers.embed(speech)
        except Refused as error:
            self.refused(context.peer(), "Enroll", error.status.name, str(error))
            await context.abort(error.status, str(error))
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"pcm: no voice to learn from ({error})")
        except Exception:
            _log.exception("enrollment failed")
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed on this enrollment; see its log")
        return pb.EnrollResponse(speaker_embedding=embedding.tolist())

    async def DescribeModel(self, request: pb.DescribeModelRequest, context: Context) -> pb.DescribeModelResponse:
        """What this server runs."""
        allowed = self._allowed()
        bundle = self.bundles.find(request.bundle) if request.bundle or not allowed else allowed[0]
        if bundle is None:
            names = ", ".join(served.manifest.name for served in allowed)
            await context.abort(grpc.StatusCode.NOT_FOUND, f"bundle: {request.bundle[:80]!r} is none of {names}")
            raise AssertionError  # abort has raised
        try:
            CALLER.get().check_bundle(bundle.manifest.name)
        except Refused as error:
            await context.abort(error.status, str(error))
        manifest = bundle.manifest
        model = manifest.model
        return pb.DescribeModelResponse(
            protocol_version=PROTOCOL_VERSION,
            bundle_name=manifest.name,
            bundle_id=manifest.id,
            untrained=manifest.untrained,
            task=model.task,
            sample_rate=model.framing.sample_rate,
            microphones=model.microphones,
            chunk=model.framing.chunk,
            lookahead=model.framing.lookahead,
            delay=model.delay,
            hint_channels=model.hint_channels,
            hint_bins=model.framing.bins,
            max_chunks_per_message=self._limits.chunks,
            enrolls=self._speakers is not None,
            sessions=bundle.sessions,
            max_sessions=bundle.slots,
            bundles=[served.manifest.name for served in allowed],
        )

    def _allowed(self) -> list[ServedBundle]:
        """The bundles that whoever calls may use, and hear of."""
        return [served for served in self.bundles.served if CALLER.get().may_use(served.manifest.name)]

    async def _configuration(self, requests: AsyncIterator[pb.StreamHintsRequest]) -> pb.SessionConfig:
        seconds = self._limits.config_seconds
        try:
            async with asyncio.timeout(seconds):
                request = await anext(requests, None)
        except TimeoutError:
            raise Refused(f"request: no config came within {seconds:g} s") from None
        except DecodeError:
            raise Refused("request: is no StreamHintsRequest") from None
        if request is None:
            await asyncio.sleep(0.01)  # a call that was cancelled ends its requests too, before its task is told
            raise Refused("request: the stream ended before its configuration")
        return read_config(request)

    async def _admit(self, config: pb.SessionConfig) -> ServedBundle:
        """The bundle of a session, loaded and with a place in it.

        Raises:
            Refused: the configuration does not fit, the bundle cannot be loaded, or all places are taken.
        """
        bundle = self.bundles.find(config.bundle_id) if config.bundle_id else None
        if bundle is None or bundle.manifest.id != config.bundle_id:
            raise unknown_bundle(config, [served.manifest for served in self._allowed()])
        CALLER.get().check_bundle(bundle.manifest.name)
        check_config(config, bundle.manifest.model)
        self._loading += 1
        try:
            await self.bundles.load(bundle)
        except InputError:
            text = f"this server cannot load {bundle.manifest.label}; see its log"
            raise Refused(text, grpc.StatusCode.INTERNAL) from None
        finally:
            self._loading -= 1
        if bundle.retired:  # by now
            raise unknown_bundle(config, [served.manifest for served in self._allowed()])
        if not self.bundles.has_place(bundle):
            text = f"all {bundle.slots} sessions of this server are taken; try again later or another server"
            raise Refused(text, grpc.StatusCode.RESOURCE_EXHAUSTED)
        return bundle

    def _check_host(self, host: str, most: int) -> None:
        """Refuse a session of a host that has so many already; 0: no limit."""
        if most and self._peers[host] > most:
            text = f"{most} sessions of this host are open already; end one of them"
            raise Refused(text, grpc.StatusCode.RESOURCE_EXHAUSTED)

    def _count_enrollment(self, host: str) -> None:
        most, now = self._limits.enrollments_per_minute, time.monotonic()
        if not most:
            return
        for known, times in list(self._enrollments.items()):
            while times and now - times[0] > 60:
                times.popleft()
            if not times:
                del self._enrollments[known]
        times = self._enrollments.setdefault(host, deque())
        if len(times) >= most:
            text = f"{most} enrollments of this host within a minute; wait"
            raise Refused(text, grpc.StatusCode.RESOURCE_EXHAUSTED)
        times.append(now)

    async def _wait_until_empty(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (self._sessions or self._loading) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


class _Record:
    """What the log tells of a call."""

    def __init__(self, peer: str, refusals: Refusals) -> None:
        self.session: Session | None = None
        self.status = ""
        self._peer, self._refusals = peer, refusals
        self._opened = time.monotonic()

    def log_start(self, bundle: ServedBundle) -> None:
        assert self.session is not None
        name = bundle.manifest.name
        log_event("session_opened", session=self.session.id, peer=self._peer, caller=CALLER.get().name, bundle=name)

    def end(self, status: str, why: str) -> None:
        self.status = status
        fields = {"peer": self._peer, "status": status, "why": why}
        seconds = round(time.monotonic() - self._opened, 3)
        if self.session is None:
            caller = CALLER.get().name or host_of(self._peer)
            self._refusals.add(caller, "session_closed", session=None, **fields, frames=0, seconds=seconds)
        else:
            log_event("session_closed", session=self.session.id, **fields, frames=self.session.frames, seconds=seconds)


def _shutting_down() -> Refused:
    return Refused("the server is shutting down; try another", grpc.StatusCode.UNAVAILABLE)
