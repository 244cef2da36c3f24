"""The server core: sessions, enrollments and descriptions, independent of the transport."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from knowledge_boosting.common.addresses import host_of, is_loopback
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import PROTOCOL_VERSION
from knowledge_boosting.remote_server.core.access import Caller, Denied
from knowledge_boosting.remote_server.core.admission import Admission, shutting_down
from knowledge_boosting.remote_server.core.bundles import Bundles
from knowledge_boosting.remote_server.core.enrollment import SpeakerEncoder
from knowledge_boosting.remote_server.core.limits import Limits
from knowledge_boosting.remote_server.core.log import RefusalLog, log_event
from knowledge_boosting.remote_server.core.messages import check_enrollment, read_config
from knowledge_boosting.remote_server.core.metrics import Metrics
from knowledge_boosting.remote_server.core.refusals import Refused, Status
from knowledge_boosting.remote_server.core.session import Session

_log = logging.getLogger("kb-server")


class HintServer:
    """Serves the hints of one or more bundles.

    The methods for calls get the caller and the address of its peer. They raise :class:`Refused` if they refuse a call.
    """

    def __init__(self, bundles: Bundles, limits: Limits, metrics: Metrics) -> None:
        self.bundles = bundles
        self._limits, self._metrics, self._refusals = limits, metrics, RefusalLog()
        self._admission = Admission(bundles, limits)
        self._sessions: dict[Session, tuple[Caller, asyncio.Task[Any]]] = {}
        self._enrollments: dict[str, deque[float]] = {}
        self._draining = False
        self._speakers = SpeakerEncoder() if SpeakerEncoder.installed() else None

    def refused(self, caller: Caller, peer: str, method: str, reason: Refused) -> None:
        """Count and log a call that was refused."""
        status = reason.status.name
        self._metrics.refused.labels(status).inc()
        source = caller.name or host_of(peer)
        fields = {"status": status, "why": str(reason), **_token_fields(reason)}
        self._refusals.add(source, "call_refused", peer=peer, method=method[:100], **fields)

    async def watch(self) -> None:
        """End sessions that exceed a limit, for as long as the server runs.

        Raises:
            Failure: The thread of an engine has ended, so that its sessions would wait forever.
        """
        while True:
            await asyncio.sleep(0.5)
            self._refusals.flush()
            self.bundles.check()
            now = time.monotonic()
            for session, (caller, task) in list(self._sessions.items()):
                reason = session.exceeded_limit(now) or _revoked(session, caller)
                if reason is not None:
                    session.end(reason)
                if session.is_stuck(now):
                    task.cancel()  # the task waits for a device that does not read

    async def drain(self, seconds: float) -> None:
        """Refuse new sessions, ask the devices to move to another server, and end the rest after ``seconds``."""
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
        """Start to load the speaker encoder if a bundle needs it, so that the first enrollment does not wait for it."""
        if self._speakers is not None and any(served.manifest.model.needs_speaker for served in self.bundles.served):
            self._speakers.load()

    def close(self) -> None:
        """End all engines and the process of the speaker encoder."""
        if self._speakers is not None:
            self._speakers.close()
        self.bundles.close()

    async def session(
        self, requests: AsyncIterator[pb.StreamHintsRequest], caller: Caller, peer: str
    ) -> AsyncGenerator[pb.StreamHintsResponse]:
        """Serve one session, from its configuration to the end of its audio.

        Args:
            requests: The requests of the device. The iterator raises :class:`Refused` for a request that is invalid.
            caller: The caller.
            peer: The address of the peer, as gRPC writes it.

        Yields:
            The responses to the device.

        Raises:
            Refused: The session was refused, or it did not end by the device's request.
        """
        record = _CallRecord(caller, peer, self._refusals)
        bundle_name: str | None = None
        try:
            slot = self._admission.slot(caller, host_of(peer), lambda: self._configuration(requests))
            async with slot as (config, bundle):
                bundle_name = bundle.manifest.name
                session = record.session = Session(config, bundle, self._limits, self._metrics)
                task = asyncio.current_task()
                assert task is not None
                self._sessions[session] = caller, task
                self._metrics.sessions.labels(bundle_name).inc()
                record.log_start(bundle_name)
                try:
                    # The session must be closed before its slot is released. The interpreter would close it later.
                    async with aclosing(session.responses(requests)) as responses:
                        async for response in responses:
                            yield response
                finally:
                    del self._sessions[session]
                    self._metrics.sessions.labels(bundle_name).dec()
            record.end("OK", "the device ended the session")
        except Refused as error:
            record.end(error.status.name, str(error), **_token_fields(error))
            raise
        except (asyncio.CancelledError, GeneratorExit):
            reason = record.session.end_reason if record.session is not None else None
            if reason is not None:
                record.end(reason.status.name, str(reason), **_token_fields(reason))
            else:
                record.end("CANCELLED", "the device cancelled the call or disconnected")
            raise
        except Exception:
            _log.exception("session failed")
            record.end("INTERNAL", "an error of the server ended the session")
            raise Refused("an error of the server ended the session; see its log", Status.INTERNAL) from None
        finally:
            if bundle_name is None:
                self._metrics.refused.labels(record.status).inc()
            else:
                self._metrics.ended.labels(bundle_name, record.status).inc()

    async def enroll(self, request: pb.EnrollRequest, caller: Caller, peer: str) -> pb.EnrollResponse:
        """Compute a speaker embedding from enrollment speech.

        Raises:
            Refused: The speech is not valid, or the server cannot process it now.
        """
        try:
            speech = check_enrollment(request, self._limits.enrollment_seconds)
            if self._speakers is None:
                raise Refused(
                    "this server has no speaker encoder; install it on the server with "
                    "pip install 'knowledge-boosting[enroll]'",
                    Status.UNIMPLEMENTED,
                )
            self._count_enrollment(caller, host_of(peer))
            try:
                embedding = await self._speakers.embed(speech)
            except ValueError as error:
                raise Refused(f"pcm: contains no speech that can be used ({error})") from None
        except Refused as error:
            self.refused(caller, peer, "Enroll", error)
            raise
        except Exception:
            _log.exception("enrollment failed")
            raise Refused("an error of the server ended the enrollment; see its log", Status.INTERNAL) from None
        return pb.EnrollResponse(speaker_embedding=embedding.tolist())

    def describe(self, request: pb.DescribeModelRequest, caller: Caller, peer: str) -> pb.DescribeModelResponse:
        """Describe a bundle of this server.

        Raises:
            Refused: There is no such bundle, or the caller has no permission to use it.
        """
        try:
            return self._description(request, caller)
        except Refused as error:
            self.refused(caller, peer, "DescribeModel", error)
            raise

    def _description(self, request: pb.DescribeModelRequest, caller: Caller) -> pb.DescribeModelResponse:
        allowed = self._admission.allowed(caller)
        if not request.bundle and not allowed:  # the names of the bundles are not for this caller
            text = f"the token of {caller.name} is for no bundle of this server; ask the operator of this server"
            raise Denied(text, Status.PERMISSION_DENIED, "not enough")
        bundle = self.bundles.find(request.bundle) if request.bundle or not allowed else allowed[0]
        if bundle is None:
            names = ", ".join(served.manifest.name for served in allowed)
            raise Refused(f"bundle: {request.bundle[:80]!r} is unknown; give one of {names}", Status.NOT_FOUND)
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
            delay=model.max_age,
            hint_channels=model.hint_channels,
            hint_bins=model.framing.bins,
            max_chunks_per_message=self._limits.chunks,
            enrolls=self._speakers is not None,
            sessions=bundle.sessions,
            max_sessions=bundle.slots,
            free_sessions=self.bundles.free_slots(bundle),
            bundles=[served.manifest.name for served in allowed],
            on_arrival=model.on_arrival,
        )

    async def _configuration(self, requests: AsyncIterator[pb.StreamHintsRequest]) -> pb.SessionConfig:
        seconds = self._limits.config_seconds
        try:
            async with asyncio.timeout(seconds):
                request = await anext(requests, None)
        except TimeoutError:
            raise Refused(f"request: no config arrived within {seconds:g} s") from None
        if request is None:
            await asyncio.sleep(0.01)  # a cancelled call ends its requests first, and cancels this task a moment later
            raise Refused("request: the stream ended before its configuration")
        return read_config(request)

    def _count_enrollment(self, caller: Caller, host: str) -> None:
        limit, now = self._limits.enrollments_per_minute, time.monotonic()
        # This machine can be a proxy for others. Those with a token can still be told apart.
        if not limit or (not caller.name and is_loopback(host)):
            return
        source = caller.name or host
        for other, times in list(self._enrollments.items()):
            while times and now - times[0] > 60:
                times.popleft()
            if not times:
                del self._enrollments[other]
        times = self._enrollments.setdefault(source, deque())
        if len(times) >= limit:
            text = f"{source} has made {limit} enrollments within a minute; try again in a minute"
            raise Refused(text, Status.RESOURCE_EXHAUSTED)
        times.append(now)

    async def _wait_until_empty(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._admission.empty and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


def _revoked(session: Session, caller: Caller) -> Refused | None:
    try:
        caller.check_current(session.bundle_name)
    except Refused as error:
        return error
    return None


def _token_fields(reason: Refused) -> dict[str, str]:
    """Return the fields of the log about the token of a refused call."""
    return {"token": reason.token} if isinstance(reason, Denied) else {}


class _CallRecord:
    """Writes the log of one call of StreamHints."""

    def __init__(self, caller: Caller, peer: str, refusals: RefusalLog) -> None:
        self.session: Session | None = None
        self.status = ""
        self._caller, self._peer, self._refusals = caller, peer, refusals
        self._opened = time.monotonic()

    def log_start(self, bundle: str) -> None:
        assert self.session is not None
        log_event("session_opened", session=self.session.id, peer=self._peer, caller=self._caller.name, bundle=bundle)

    def end(self, status: str, reason: str, **more: str) -> None:
        self.status = status
        fields = {"peer": self._peer, "status": status, "why": reason, **more}
        seconds = round(time.monotonic() - self._opened, 3)
        if self.session is None:
            source = self._caller.name or host_of(self._peer)
            self._refusals.add(source, "session_closed", session=None, **fields, frames=0, seconds=seconds)
        else:
            log_event("session_closed", session=self.session.id, **fields, frames=self.session.frames, seconds=seconds)
