"""A connection to a server, and why there is none."""

import contextlib
import queue
import socket
import ssl
import time

import grpc

from knowledge_boosting.common.addresses import proxy_of, split_address
from knowledge_boosting.common.call_credentials import TOKEN_VARIABLE, Credentials
from knowledge_boosting.common.errors import Failure, InputError, printable

# What ends a call otherwise is no fault of what was asked.
_ASKED_WRONGLY = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
}
# Seconds.
_PROBE_TIMEOUT = 2.0  # for a server that was there a moment ago
_GREETING_TIMEOUT = 0.5  # for one that speaks first
# With which a client begins: its fixed words, and settings, none of them changed.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


class Refused(InputError):
    """A server is there, but the two ends do not accept each other; trying again is of no use."""


def connect(server: str, credentials: Credentials, patience: float) -> grpc.Channel:
    """A channel to a server that is there.

    Args:
        server: ``HOST:PORT``.
        patience: seconds that it has to accept a connection.

    Raises:
        Refused: one of the two does not accept the other.
        InputError: the address is malformed, or nobody answers.
    """
    credentials.check(server)
    host, _ = split_address(server)
    options = [
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # Channels share connections, and the pauses after failed ones, unless told not to.
        ("grpc.use_local_subchannel_pool", 1),
        # What goes to this machine, unencrypted tokens too, goes through no proxy.
        ("grpc.enable_http_proxy", int(proxy_of(host) is not None)),
    ]
    channel = _channel(server, credentials, options)
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    channel.subscribe(states.put, try_to_connect=True)
    deadline = time.monotonic() + patience
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
    """The error of a call that has ended in a status other than OK.

    Args:
        what: was asked of the server.
    """
    text = f"{server}: {what} ({call.code().name}: {printable(str(call.details())[:1000])})"
    if call.code() is grpc.StatusCode.UNAUTHENTICATED:
        return Refused(f"{text}; give --token-file or {TOKEN_VARIABLE} a token of that server")
    if call.code() is grpc.StatusCode.PERMISSION_DENIED:
        return Refused(text)
    if call.code() in _ASKED_WRONGLY:
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
    """Why there is none. gRPC does not tell, but in a text of its own; so we connect once more ourselves."""
    host, port = split_address(server)
    proxy = proxy_of(host)
    try:
        strange = _stranger(host, port)
        why = strange or _refusal(host, port, credentials)
    except (socket.gaierror, UnicodeError):
        if proxy is None:
            return InputError(f"--server {server}: no host of that name is known here; is it spelt right?")
    except OSError:
        pass
    else:
        if why is not None:
            return Refused(f"--server {server}: {why}")
    if proxy is not None:
        text = f"no answer through the proxy {proxy[0]}, which {proxy[1]} names; set no_proxy={host} to go without it"
        return InputError(f"--server {server}: {text}")
    return InputError(f"--server {server}: no answer; is kb-server running there, and the port open?")


def _stranger(host: str, port: int) -> str | None:
    """Who is there instead of a server that speaks HTTP/2 or TLS; None if it may do so.

    Raises:
        OSError: nobody is there.
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
        return "an SSH server answers on that port; give the port of kb-server, 50051 unless told otherwise"
    if greeting.startswith(b"HTTP/"):
        return "a web server (HTTP/1) answers on that port; give the port of kb-server, 50051 unless told otherwise"
    return None


def _refusal(host: str, port: int, credentials: Credentials) -> str | None:
    """What Python's own TLS says is wrong between the two ends; None if nothing is.

    Raises:
        OSError: nobody is there.
    """
    connection = socket.create_connection((host, port), _PROBE_TIMEOUT)
    try:
        with connection, _probe_context(credentials).wrap_socket(connection, server_hostname=host) as tls:
            if not credentials.tls:
                return "speaks TLS; give --tls, or --tls-ca FILE"
            if tls.selected_alpn_protocol() != "h2":
                return "speaks TLS but not gRPC; is that the port of kb-server?"
            # Whether it accepts this device's certificate a server says only now, by going on or not.
            if tls.recv(1):
                return None
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not trusted ({error.verify_message.rstrip('.')}); {_mend(error)}"
    except ssl.SSLError as error:
        if not credentials.tls or isinstance(error, ssl.SSLEOFError):
            return None
        if "ALERT" not in (error.reason or ""):
            return "speaks no TLS; leave out --tls and the like, or have it started with --tls-cert"
    except OSError:
        return None
    if credentials.identity is None:
        return "wants a certificate of this device; give --tls-cert and --tls-key"
    return "does not accept the certificate of --tls-cert; is it of the authority that the server knows, and in time?"


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


def _mend(error: ssl.SSLCertVerificationError) -> str:
    """What to do about a certificate that was not accepted; the numbers are OpenSSL's ``X509_V_ERR``."""
    match error.verify_code:
        case 9 | 10:
            return "renew it, or mend the clock of this machine"
        case 62 | 64:
            return "give --server a name that is in the certificate"
    return "give --tls-ca FILE with the certificate of its authority"
