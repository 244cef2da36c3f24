"""Connect to a server, and diagnose why a connection fails."""

import contextlib
import functools
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

import grpc

from knowledge_boosting.common.addresses import proxy_of, split_address
from knowledge_boosting.common.call_credentials import TOKEN_VARIABLE, Credentials
from knowledge_boosting.common.errors import Failure, InputError, printable

# The statuses that mean that the request itself is at fault.
_REQUEST_FAULTS = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
}
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_PROBE_TIMEOUT = 2.0  # seconds; the server was reachable a moment ago
_GREETING_TIMEOUT = 0.5  # seconds; time for the greeting of a protocol in which the server speaks first
# The connection preface of an HTTP/2 client: the fixed text and an empty SETTINGS frame.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


class Refused(InputError):
    """A server answers, but client and server do not accept each other. A retry would fail in the same way."""


def off_main_thread(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Make a function run on another thread if it is called on the main thread, which waits for it.

    Python raises interruptions on the main thread. One that is raised while gRPC begins or awaits a call leaves a call
    that nobody completes, and closing its channel would wait for it forever.
    """

    @functools.wraps(function)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        if threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        future: Future[_Result] = Future()

        def call() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=call, name="kb-call", daemon=True).start()
        return future.result()

    return run


def connect(server: str, credentials: Credentials, timeout: float) -> grpc.Channel:
    """Connect to a server.

    Args:
        server: Its address, ``HOST:PORT``.
        credentials: The TLS settings. The token is sent with each call, not here.
        timeout: Seconds until the server must have accepted the connection.

    Returns:
        A connected channel, which the caller closes.

    Raises:
        Refused: Client and server do not accept each other.
        InputError: The address is malformed, or there is no answer.
    """
    credentials.check(server)
    host, _ = split_address(server)
    options = [
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # By default, channels share connections and the pauses after failed connection attempts.
        ("grpc.use_local_subchannel_pool", 1),
        # Traffic to this machine can contain an unencrypted token, so that it must not go through a proxy.
        ("grpc.enable_http_proxy", int(proxy_of(host) is not None)),
    ]
    channel = _channel(server, credentials, options)
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    channel.subscribe(states.put, try_to_connect=True)
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            state = states.get(timeout=left)
            if state is grpc.ChannelConnectivity.READY:
                channel.unsubscribe(states.put)
                return channel
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                break
    channel.close()
    raise _no_connection(server, credentials)


def call_failed(server: str, what: str, call: grpc.Call) -> InputError | Failure:
    """Convert the status of a failed call into an exception for the caller to raise.

    Args:
        server: The address of the server, ``HOST:PORT``.
        what: What failed, for the message.
        call: A call that has ended with a status other than OK.
    """
    text = f"{server}: {what} ({call.code().name}: {printable(str(call.details())[:1000])})"
    if call.code() is grpc.StatusCode.UNAUTHENTICATED:
        return Refused(f"{text}; give a token of that server with --token-file or {TOKEN_VARIABLE}")
    if call.code() is grpc.StatusCode.PERMISSION_DENIED:
        return Refused(text)
    if call.code() in _REQUEST_FAULTS:
        return InputError(text)
    return Failure(f"{text}; try again")


def _channel(server: str, credentials: Credentials, options: list[tuple[str, int]]) -> grpc.Channel:
    if not credentials.tls:
        return grpc.insecure_channel(server, options)
    identity = credentials.identity
    tls = grpc.ssl_channel_credentials(
        credentials.authorities,
        identity.key if identity is not None else None,
        identity.certificates if identity is not None else None,
    )
    return grpc.secure_channel(server, tls, options)


def _no_connection(server: str, credentials: Credentials) -> InputError:
    """Find out why there is no connection.

    gRPC reports the reason only as free text, so this connects once more with a plain socket.
    """
    host, port = split_address(server)
    proxy = proxy_of(host)
    try:
        why = _other_service(host, port) or _tls_fault(host, port, credentials)
    except (socket.gaierror, UnicodeError):
        if proxy is None:
            return InputError(f"--server {server}: the host name is unknown; check its spelling")
    except OSError:
        pass
    else:
        if why is not None:
            return Refused(f"--server {server}: {why}")
    if proxy is not None:
        text = f"no answer through the proxy {proxy[0]} from {proxy[1]}; set no_proxy={host} to connect directly"
        return InputError(f"--server {server}: {text}")
    return InputError(f"--server {server}: no answer; check that kb-server runs there and that the port is open")


def _other_service(host: str, port: int) -> str | None:
    """Detect a service that is not a gRPC server.

    Returns:
        A message that names the service. None if it could speak HTTP/2 or TLS.

    Raises:
        OSError: There is no answer.
    """
    with socket.create_connection((host, port), _PROBE_TIMEOUT) as connection:
        try:
            connection.settimeout(_GREETING_TIMEOUT)
            greeting = connection.recv(64)
        except TimeoutError:
            connection.settimeout(_PROBE_TIMEOUT)
            try:
                connection.sendall(_HTTP2_PREFACE)
                greeting = connection.recv(64)
            except OSError:
                return None
        except OSError:
            return None
    if greeting.startswith(b"SSH-"):
        return "an SSH server answers on that port; give the port of kb-server, which is 50051 by default"
    if greeting.startswith(b"HTTP/"):
        return "a web server (HTTP/1) answers on that port; give the port of kb-server, which is 50051 by default"
    return None


def _tls_fault(host: str, port: int, credentials: Credentials) -> str | None:
    """Make a TLS handshake with Python's ssl module, which reports the exact fault.

    Returns:
        A message about the fault. None if there is none.

    Raises:
        OSError: There is no answer.
    """
    connection = socket.create_connection((host, port), _PROBE_TIMEOUT)
    try:
        with connection, _probe_context(credentials).wrap_socket(connection, server_hostname=host) as tls:
            if not credentials.tls:
                return "speaks TLS; give --tls or --tls-ca FILE"
            if tls.selected_alpn_protocol() != "h2":
                return "speaks TLS but not gRPC; give the port of kb-server"
            # With TLS 1.3, a server rejects the client's certificate only after the handshake.
            if tls.recv(1):
                return None
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not trusted ({error.verify_message.rstrip('.')}); {_certificate_fix(error)}"
    except ssl.SSLError as error:
        if not credentials.tls or isinstance(error, ssl.SSLEOFError):
            return None
        if "ALERT" not in (error.reason or ""):
            return "speaks no TLS; leave out the --tls flags, or start the server with --tls-cert"
    except OSError:
        return None
    if credentials.identity is None:
        return "requires a client certificate; give --tls-cert and --tls-key"
    return (
        "rejects the certificate of --tls-cert; give one that is valid now and issued by the server's --tls-client-ca"
    )


def _probe_context(credentials: Credentials) -> ssl.SSLContext:
    if not credentials.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    authorities = credentials.authorities.decode(errors="replace") if credentials.authorities is not None else None
    context = ssl.create_default_context(cadata=authorities)
    context.set_alpn_protocols(["h2"])
    if credentials.identity_files is not None:
        context.load_cert_chain(*credentials.identity_files)
    return context


def _certificate_fix(error: ssl.SSLCertVerificationError) -> str:
    """Return advice for a rejected certificate. The numbers are the codes ``X509_V_ERR`` of OpenSSL."""
    match error.verify_code:
        case 9 | 10:
            return "renew it, or correct the clock of this machine"
        case 62 | 64:
            return "give --server a name that is in the certificate"
    return "give --tls-ca FILE with the certificate of its authority"
