"""A server of hints: whom it serves, and what it tells them. What carries the messages is for its adapters."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from knowledge_boosting.common.addresses import host_of
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import PROTOCOL_VERSION
from knowledge_boosting.remote_server.core.access import Caller, Denied
from knowledge_boosting.remote_server.core.admission import Admission, shutting_down
from knowledge_boosting.remote_server.core.bundles import Bundles
from knowledge_boosting.remote_server.core.enrollment import SpeakerEncoder
from knowledge_boosting.remote_server.core.limits import Limits
from knowledge_boosting.remote_server.core.log import Refusals, log_event
from knowledge_boosting.remote_server.core.messages import check_enrollment, read_config
from knowledge_boosting.remote_server.core.metrics import Metrics
from knowledge_boosting.remote_server.core.refusals import Refused, Status
from knowledge_boosting.remote_server.core.session import Session

_log = logging.getLogger("kb-server")


class HintServer:
    """Serves the hints of one or more bundles.

    Every call names its caller and the address it comes from, and ends in :class:`Refused` where it is not served.
    """

    def __init__(self, bundles: Bundles, limits: Limits, metrics: Metrics) -> None:
        self.bundles = bundles
        self._limits, self._metrics, self._refusals = limits, metrics, Refusals()
        self._admission = Admission(bundles, limits)
        self._sessions: dict[Session, tuple[Caller, asyncio.Task[Any]]] = {}
        self._enrollments: dict[str, deque[float]] = {}
        self._draining = False
        self._speakers = SpeakerEncoder() if SpeakerEncoder.installed() else None

    def refused(self, caller: Caller, peer: str, method: str, why: Refused) -> None:
        """Count and log a call that got nothing."""
        status = why.status.name
        self._metrics.refused.labels(status).inc()
        source = caller.name or host_of(peer)
        fields = {"status": status, "why": str(why), **_of_token(why)}
        self._refusals.add(source, "call_refused", peer=peer, method=method[:100], **fields)

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
            for session, (caller, task) in list(self._sessions.items()):
                why = session.overdue(now) or _taken_away(session, caller)
                if why is not None:
                    session.end(why)
                if session.stuck(now):
                    task.cancel()  # it waits for a device that does not read

    async def drain(self, seconds: float) -> None:
        """Accept no more sessions, tell the devices to go elsewhere, and end those still here after ``seconds``."""
        if not self._draining:
            self._draining = True
            self._admission.close()
            for session in self._sessions:
                session.announce_draining(seconds)
        await self._wait_until_empty(seconds)
        for session in self._sessions:
            session.end(shutting_down())
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

    async def session(
        self, requests: AsyncIterator[pb.StreamHintsRequest], caller: Caller, peer: str
    ) -> AsyncGenerator[pb.StreamHintsResponse]:
        """One session, from its configuration to the end of its audio: what the device gets.

        Args:
            requests: the device's; what cannot be read is raised there as :class:`Refused`.

        Raises:
            Refused: it was not served, or has ended otherwise than by the device's own wish.
        """
        record = _Record(caller, peer, self._refusals)
        bundle_name: str | None = None
        try:
            place = self._admission.place(caller, host_of(peer), lambda: self._configuration(requests))
            async with place as (config, bundle):
                bundle_name = bundle.manifest.name
                session = record.session = Session(config, bundle, self._limits, self._metrics)
                task = asyncio.current_task()
                assert task is not None
                self._sessions[session] = caller, task
                self._metrics.sessions.labels(bundle_name).inc()
                record.log_start(bundle_name)
                try:
                    # Closed before the place is given away; left to the interpreter, it would be some time later.
                    async with aclosing(session.responses(requests)) as responses:
                        async for response in responses:
                            yield response
                finally:
                    del self._sessions[session]
                    self._metrics.sessions.labels(bundle_name).dec()
            record.end("OK", "the device ended it")
        except Refused as error:
            record.end(error.status.name, str(error), **_of_token(error))
            raise
        except (asyncio.CancelledError, GeneratorExit):
            why = record.session.ended if record.session is not None else None
            if why is not None:
                record.end(why.status.name, str(why), **_of_token(why))
            else:
                record.end("CANCELLED", "the device went away")
            raise
        except Exception:
            _log.exception("session failed")
            record.end("INTERNAL", "the server failed on it")
            raise Refused("the server failed on this session; see its log", Status.INTERNAL) from None
        finally:
            if bundle_name is None:
                self._metrics.refused.labels(record.status).inc()
            else:
                self._metrics.ended.labels(bundle_name, record.status).inc()

    async def enroll(self, request: pb.EnrollRequest, caller: Caller, peer: str) -> pb.EnrollResponse:
        """Enrollment speech to a speaker embedding.

        Raises:
            Refused: it cannot be accepted, or not now.
        """
        try:
            speech = check_enrollment(request, self._limits.enrollment_seconds)
            if self._speakers is None:
                raise Refused(
                    "this server has no speaker encoder; install it there with "
                    "pip install 'knowledge-boosting[enroll]'",
                    Status.UNIMPLEMENTED,
                )
            self._count_enrollment(host_of(peer))
            embedding = await self._speakers.embed(speech)
        except Refused as error:
            self.refused(caller, peer, "Enroll", error)
            raise
        except ValueError as error:
            raise Refused(f"pcm: no voice to learn from ({error})") from None
        except Exception:
            _log.exception("enrollment failed")
            raise Refused("the server failed on this enrollment; see its log", Status.INTERNAL) from None
        return pb.EnrollResponse(speaker_embedding=embedding.tolist())

    def describe(self, request: pb.DescribeModelRequest, caller: Caller) -> pb.DescribeModelResponse:
        """What this server runs.

        Raises:
            Refused: there is no such bundle, or it is not for this caller.
        """
        allowed = self._admission.allowed(caller)
        bundle = self.bundles.find(request.bundle) if request.bundle or not allowed else allowed[0]
        if bundle is None:
            names = ", ".join(served.manifest.name for served in allowed)
            raise Refused(f"bundle: {request.bundle[:80]!r} is none of {names}", Status.NOT_FOUND)
        caller.check_bundle(bundle.manifest.name)
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

    async def _configuration(self, requests: AsyncIterator[pb.StreamHintsRequest]) -> pb.SessionConfig:
        seconds = self._limits.config_seconds
        try:
            async with asyncio.timeout(seconds):
                request = await anext(requests, None)
        except TimeoutError:
            raise Refused(f"request: no config came within {seconds:g} s") from None
        if request is None:
            await asyncio.sleep(0.01)  # a call that was cancelled ends its requests too, before its task is told
            raise Refused("request: the stream ended before its configuration")
        return read_config(request)

    def _count_enrollment(self, host: str) -> None:
        limit, now = self._limits.enrollments_per_minute, time.monotonic()
        if not limit:
            return
        for known, times in list(self._enrollments.items()):
            while times and now - times[0] > 60:
                times.popleft()
            if not times:
                del self._enrollments[known]
        times = self._enrollments.setdefault(host, deque())
        if len(times) >= limit:
            text = f"{limit} enrollments of this host within a minute; wait"
            raise Refused(text, Status.RESOURCE_EXHAUSTED)
        times.append(now)

    async def _wait_until_empty(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._admission.empty and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


def _taken_away(session: Session, caller: Caller) -> Refused | None:
    try:
        caller.check_still(session.bundle_name)
    except Refused as error:
        return error
    return None


def _of_token(why: Refused) -> dict[str, str]:
    """What the log tells of a token that does not allow a call."""
    return {"token": why.token} if isinstance(why, Denied) else {}


class _Record:
    """What the log tells of a call."""

    def __init__(self, caller: Caller, peer: str, refusals: Refusals) -> None:
        self.session: Session | None = None
        self.status = ""
        self._caller, self._peer, self._refusals = caller, peer, refusals
        self._opened = time.monotonic()

    def log_start(self, bundle: str) -> None:
        assert self.session is not None
        log_event("session_opened", session=self.session.id, peer=self._peer, caller=self._caller.name, bundle=bundle)

    def end(self, status: str, why: str, **more: str) -> None:
        self.status = status
        fields = {"peer": self._peer, "status": status, "why": why, **more}
        seconds = round(time.monotonic() - self._opened, 3)
        if self.session is None:
            source = self._caller.name or host_of(self._peer)
            self._refusals.add(source, "session_closed", session=None, **fields, frames=0, seconds=seconds)
        else:
            log_event("session_closed", session=self.session.id, **fields, frames=self.session.frames, seconds=seconds)
