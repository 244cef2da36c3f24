"""The Prometheus metrics of a server: ``kb-server --metrics-port``."""

import socket
import threading
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.remote_server.core.engine import Step

_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.024, 0.032, 0.048, 0.064, 0.125, 0.25, 0.5, 1.0)
_SESSIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of the server. Most have the bundle as a label."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        by_bundle = ("bundle",)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, by_bundle, registry=self._registry, buckets=buckets)

        self.sessions = Gauge("kb_sessions", "Sessions open.", by_bundle, registry=self._registry)
        self.slots = Gauge("kb_slots", "Sessions that can be open at once.", by_bundle, registry=self._registry)
        self.ended = Counter(
            "kb_sessions_ended", "Sessions that have ended.", ("bundle", "status"), registry=self._registry
        )
        self.refused = Counter("kb_refused", "Calls refused, by status.", ("status",), registry=self._registry)
        self.frames = Counter("kb_frames", "Frames computed.", by_bundle, registry=self._registry)
        self.late = Counter(
            "kb_hints_late", "Hints computed after their deadline, and not sent.", by_bundle, registry=self._registry
        )
        self.queue = histogram("kb_queue_seconds", "From a frame's arrival to the start of its step.", _SECONDS)
        self.step = histogram("kb_step_seconds", "Duration of a step.", _SECONDS)
        self.batch = histogram("kb_batch_sessions", "Sessions in a step.", _SESSIONS)

    def begin(self, bundle: str, slots: int) -> None:
        """Create the metrics of a bundle, which start at zero. ``slots`` is its maximum number of sessions."""
        self.slots.labels(bundle).set(slots)
        for metric in (self.sessions, self.frames, self.late, self.queue, self.step, self.batch):
            metric.labels(bundle)

    def observe_step(self, bundle: str, step: Step) -> None:
        """Add one step of a bundle's network to the metrics."""
        self.frames.labels(bundle).inc(step.frames)
        self.step.labels(bundle).observe((step.ended - step.started) / 1e9)
        self.batch.labels(bundle).observe(step.sessions)

    def serve(self, host: str, port: int) -> int:
        """Serve the metrics over HTTP on a separate thread.

        Args:
            host: The address to listen on.
            port: The port. 0: a free port.

        Returns:
            The port.

        Raises:
            InputError: The port is in use, or the address is not one of this machine.
        """
        try:
            server = _Server(host, port)
        except (OSError, OverflowError, UnicodeError) as error:
            text = f"--metrics-port {port}: cannot listen on {host} ({reason(error)}); give another port or address"
            raise InputError(text) from None
        server.set_app(make_wsgi_app(self._registry))
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        return int(server.server_port)


_MAX_CONNECTIONS = 8
_TIMEOUT = 1.0  # seconds to send a request, and to read the response


class _Handler(WSGIRequestHandler):
    timeout = _TIMEOUT

    def log_message(self, format: str, *args: Any) -> None: ...


class _Server(ThreadingMixIn, WSGIServer):
    """An HTTP server with a limited number of connections, each of which has a thread and a time limit."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free_connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # The method of WSGIServer looks up the host name, which can be slow.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free_connections.acquire(timeout=2 * _TIMEOUT):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free_connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None: ...  # idle connections are not worth a message
