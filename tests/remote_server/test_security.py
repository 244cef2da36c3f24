"""Tests for the security of a server: TLS, client certificates and tokens."""

import json
import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_key
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub
from knowledge_boosting.remote_server.security import check_security
from tests.certificates import TOKENS, TOKENS_FILE, Certificates, bearer, channel, wait_until, write_private
from tests.processes import PATIENCE, Server, refusal_here
from tests.remote_server.driver import Material

Metadata = tuple[tuple[str, str], ...]

TOKEN_REQUIRED = "this server requires a token in the metadata 'authorization: Bearer TOKEN'"
TOKEN_UNKNOWN = "this server does not know the token"


def describe(to: grpc.Channel, metadata: Metadata = ()) -> str:
    return status_of(
        lambda: HintServiceStub(to).DescribeModel(pb.DescribeModelRequest(), metadata=metadata, timeout=PATIENCE)
    )[0]


def status_of(call: Any) -> tuple[str, str]:
    """Read all responses of a call. Return its status and details."""
    try:
        answers = call()
        if isinstance(answers, grpc.Call):
            list(answers)  # type: ignore[call-overload] # grpc's own types do not say that it is an iterator too
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return error.code().name, error.details() or ""
    return "OK", ""


def calls(to: grpc.Channel, ss: Material, metadata: Metadata) -> dict[str, tuple[str, str]]:
    """Call all methods of a server with some metadata. Return the status and details of each."""
    service, listing = HintServiceStub(to), reflection_pb2.ServerReflectionRequest(list_services="")
    options: dict[str, Any] = {"metadata": metadata, "timeout": PATIENCE}
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(to)
    unknown: Any = to.unary_unary("/no.Such/Method")
    return {
        "StreamHints": status_of(lambda: service.StreamHints(iter([ss.opening()]), **options)),
        "Enroll": status_of(lambda: service.Enroll(pb.EnrollRequest(), **options)),
        "DescribeModel": status_of(lambda: service.DescribeModel(pb.DescribeModelRequest(), **options)),
        "ServerReflectionInfo": status_of(lambda: stub.ServerReflectionInfo(iter([listing]), **options)),
        "no such method": status_of(lambda: unknown(b"", **options)),
    }


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), TOKEN_REQUIRED),
        ((("authorization", TOKENS["laptop"]),), TOKEN_REQUIRED),
        ((("authorization", f"Basic {TOKENS['laptop']}"),), TOKEN_REQUIRED),
        (bearer(TOKENS["laptop"]) + bearer(TOKENS["laptop"]), TOKEN_REQUIRED),
        (bearer(""), TOKEN_UNKNOWN),
        (bearer("wrong-0123456789-9fGkq2"), TOKEN_UNKNOWN),
        (bearer(TOKENS["laptop"][:-1]), TOKEN_UNKNOWN),
        (bearer(TOKENS["laptop"] + "2"), TOKEN_UNKNOWN),
    ],
    ids=["none", "no scheme", "another scheme", "two", "empty", "wrong", "cut short", "longer"],
)
def test_every_call_needs_a_known_token(
    metadata: Metadata, reason: str, guarded_server: Server, certificates: Certificates, ss: Material
) -> None:
    with channel(guarded_server.address, certificates.ca) as to:
        assert set(calls(to, ss, metadata).values()) == {("UNAUTHENTICATED", reason)}


def test_health_needs_no_token(guarded_server: Server, certificates: Certificates) -> None:
    with channel(guarded_server.address, certificates.ca) as to:
        stub: Any = health_pb2_grpc.HealthStub(to)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status == 1


def test_a_known_token_is_served_and_named_in_the_log(
    guarded_server: Server, certificates: Certificates, ss: Material
) -> None:
    seen = len(guarded_server.log)
    with channel(guarded_server.address, certificates.ca) as to:
        results = calls(to, ss, bearer(TOKENS["laptop"]))
    assert results["StreamHints"] == results["DescribeModel"] == ("OK", "")
    # The request is accepted, and then refused because it is empty.
    assert results["Enroll"][0] == "INVALID_ARGUMENT"
    # The server does not listen on a loopback address, so there is no reflection.
    assert results["ServerReflectionInfo"][0] == "UNIMPLEMENTED"
    assert any('"session_opened"' in line and '"caller": "laptop"' in line for line in guarded_server.log[seen:])


def test_a_token_for_another_bundle(guarded_server: Server, certificates: Certificates, ss: Material) -> None:
    with channel(guarded_server.address, certificates.ca) as to:
        results = calls(to, ss, bearer(TOKENS["elsewhere"]))
    reason = f"the token of elsewhere is not for the bundle {ss.manifest.name}; ask the operator of this server"
    assert results["StreamHints"] == ("PERMISSION_DENIED", reason)
    # Here the device has not named the bundle, so the answer does not either.
    reason = "the token of elsewhere is for no bundle of this server; ask the operator of this server"
    assert results["DescribeModel"] == ("PERMISSION_DENIED", reason)


@contextmanager
def session(to: grpc.Channel, ss: Material, token: str) -> Iterator[Any]:
    """Open a session until the block ends."""
    outbox: SimpleQueue[pb.StreamHintsRequest | None] = SimpleQueue()
    outbox.put(ss.opening())
    call: Any = HintServiceStub(to).StreamHints(iter(outbox.get, None), metadata=bearer(token), timeout=PATIENCE)
    try:
        yield call
    finally:
        outbox.put(None)
        call.cancel()


def test_the_sessions_of_a_token_are_limited(guarded_server: Server, certificates: Certificates, ss: Material) -> None:
    opening: Any = [ss.opening()]

    def attempt(token: str) -> tuple[str, str]:
        return status_of(
            lambda: HintServiceStub(to).StreamHints(iter(opening), metadata=bearer(token), timeout=PATIENCE)
        )

    with channel(guarded_server.address, certificates.ca) as to:
        with session(to, ss, TOKENS["single"]) as call:
            next(call)
            status, details = attempt(TOKENS["single"])
            assert status == "RESOURCE_EXHAUSTED"
            assert details == "all sessions of the token of single (1) are in use; end one or try again later"
            # Other tokens have their own sessions, and this token can make other calls.
            assert attempt(TOKENS["laptop"]) == ("OK", "")
            assert describe(to, bearer(TOKENS["single"])) == "OK"
        wait_until(lambda: attempt(TOKENS["single"])[0] == "OK", "the slot of a session that ended stays in use")


def test_a_changed_file_of_tokens_takes_effect_and_an_invalid_one_does_not(
    guarded_server: Server, certificates: Certificates
) -> None:
    path, added = certificates.folder / "tokens.toml", "added-0123456789-Zk82jq"
    with channel(guarded_server.address, certificates.ca) as to:
        try:
            assert describe(to, bearer(added)) == "UNAUTHENTICATED"
            path.write_text(f'[[token]]\nname = "added"\ntoken = "{added}"\n')
            wait_until(lambda: describe(to, bearer(added)) == "OK", "the new token is not known")
            assert describe(to, bearer(TOKENS["laptop"])) == "UNAUTHENTICATED"
            for invalid in (
                f'[[token]]\nname = "x"\ntoken = {added}\n',
                '[[token]]\nname = "x"\ntoken = "short"\n',
                "",
            ):
                seen = len(guarded_server.log)
                path.write_text(invalid)
                wait_until(
                    lambda seen=seen: (
                        describe(to, bearer(added)) == "OK"  # type: ignore[misc]
                        and any("the change is invalid" in line for line in guarded_server.log[seen:])
                    ),
                    "an invalid file is not reported, or has removed the tokens",
                )
                lines = [line for line in guarded_server.log[seen:] if "the change is invalid" in line]
                assert len(lines) == 1
        finally:
            path.write_text(TOKENS_FILE)
        wait_until(lambda: describe(to, bearer(TOKENS["laptop"])) == "OK", "the old tokens are not back")
    secrets_are_kept(guarded_server, certificates, added, "short")


def test_the_sessions_of_a_removed_token_end(guarded_server: Server, certificates: Certificates, ss: Material) -> None:
    path = certificates.folder / "tokens.toml"
    added = TOKENS_FILE + '[[token]]\nname = "lost"\ntoken = "lost-0123456789-Zk82jq"\n'
    with channel(guarded_server.address, certificates.ca) as to:

        def session(token: str) -> Any:
            requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
            requests.put(ss.opening())
            return HintServiceStub(to).StreamHints(iter(requests.get, None), metadata=bearer(token), timeout=PATIENCE)

        try:
            path.write_text(added)
            wait_until(lambda: describe(to, bearer("lost-0123456789-Zk82jq")) == "OK", "the new token is not known")
            gone, stays = session("lost-0123456789-Zk82jq"), session(TOKENS["laptop"])
            assert next(gone).WhichOneof("response") == next(stays).WhichOneof("response") == "started"
        finally:
            path.write_text(TOKENS_FILE)
        with pytest.raises(grpc.RpcError):
            next(gone)
        assert gone.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "no longer accepts the token" in gone.details()
        ended = json.loads(guarded_server.wait_for_log("no longer accepts the token"))
        assert (ended["event"], ended["token"]) == ("session_closed", "revoked")
        assert stays.is_active()
        stays.cancel()


def test_bundles_are_hidden_from_callers_without_permission(
    guarded_server: Server, certificates: Certificates, ss: Material
) -> None:
    with channel(guarded_server.address, certificates.ca) as to:
        call = HintServiceStub(to).StreamHints(
            iter([ss.opening(bundle_id="fedcba9876543210")]), metadata=bearer(TOKENS["elsewhere"]), timeout=PATIENCE
        )
        with pytest.raises(grpc.RpcError):
            next(call)
    assert call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert ss.manifest.name not in call.details().replace(f"'{ss.manifest.name}' ('fedcba9876543210')", "")
    assert ss.manifest.id not in call.details()


def test_new_connections_get_a_renewed_certificate(guarded_server: Server, certificates: Certificates) -> None:
    def status(authority: Path) -> str:
        with channel(guarded_server.address, authority) as to:
            return describe(to, bearer(TOKENS["laptop"]))

    assert (status(certificates.ca), status(certificates.foreign_ca)) == ("OK", "UNAVAILABLE")
    pair = certificates.pair("server")
    before = [path.read_bytes() for path in pair]
    seen = len(guarded_server.log)
    try:
        pair[0].write_bytes(certificates.pair("device")[0].read_bytes())
        wait_until(
            lambda: (
                status(certificates.ca) == "OK"
                and any("is not the key of" in line for line in guarded_server.log[seen:])
            ),
            "a certificate without its key is not reported, or is used",
        )
        certificates.issue("server", "localhost", "127.0.0.1", authority=certificates.foreign)
        wait_until(lambda: status(certificates.foreign_ca) == "OK", "the new certificate is not used")
        assert status(certificates.ca) == "UNAVAILABLE"
    finally:
        for path, content in zip(pair, before, strict=True):
            path.write_bytes(content)
    wait_until(lambda: status(certificates.ca) == "OK", "the old certificate is not used again")


def test_a_client_needs_a_certificate_from_the_authority_of_the_server(
    mutual_server: Server, certificates: Certificates, ss: Material
) -> None:
    def status(name: str | None) -> str:
        identity = certificates.pair(name) if name is not None else None
        with channel(mutual_server.address, certificates.ca, identity) as to:
            return describe(to)

    assert {name: status(name) for name in (None, "foreign-device", "expired-device", "device")} == {
        None: "UNAVAILABLE",
        "foreign-device": "UNAVAILABLE",
        "expired-device": "UNAVAILABLE",
        "device": "OK",
    }
    with channel(mutual_server.address, certificates.ca, certificates.pair("device")) as to:
        results = calls(to, ss, ())
    assert results["StreamHints"] == ("OK", "")
    # The flag --reflection provides it, although other machines can connect.
    assert results["ServerReflectionInfo"] == ("OK", "")


def test_encrypted_and_unencrypted_ends_do_not_connect(
    guarded_server: Server, certificates: Certificates, ss_server: Server
) -> None:
    with grpc.insecure_channel(guarded_server.address) as to:
        assert describe(to, bearer(TOKENS["laptop"])) == "UNAVAILABLE"
    with channel(ss_server.address, certificates.ca) as to:
        assert describe(to) == "UNAVAILABLE"


def secrets_are_kept(server: Server, certificates: Certificates, *others: str) -> None:
    """Check that the log, which is the only further output of the server, contains no token and no part of a key."""
    key = certificates.pair("server")[1].read_text().splitlines()[1]
    log = "".join(server.log)
    assert "UNAUTHENTICATED" in log
    assert not [secret for secret in (*TOKENS.values(), key, *others) if secret in log]
    assert "Traceback" not in log


def test_the_log_contains_no_secrets(guarded_server: Server, certificates: Certificates) -> None:
    with channel(guarded_server.address, certificates.ca) as to:
        assert describe(to, bearer("stranger-0123456789")) == "UNAUTHENTICATED"
    line = json.loads(guarded_server.wait_for_log("DescribeModel.*UNAUTHENTICATED"))
    assert line["token"] == "unknown"
    assert abs(datetime.fromisoformat(line["time"]) - datetime.now(UTC)) < timedelta(minutes=10)
    secrets_are_kept(guarded_server, certificates, "stranger-0123456789", "0123456789")


def test_other_machines_need_tls(capsys: pytest.CaptureFixture[str], certificates: Certificates) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "gpu-host", "127.0.0.1.example"):
        line = refusal_here("kb-server", capsys, "--host", host)
        assert line.startswith(f"--host {host}: other machines could connect without encryption; give --tls-cert")
    certificate, key = certificates.pair("server")
    for flags in (["--tls-cert", certificate], ["--tls-key", key], ["--tls-client-ca", certificates.ca]):
        assert "needs both --tls-cert and --tls-key" in refusal_here("kb-server", capsys, *flags)
    line = refusal_here("kb-server", capsys, "--tls-cert", certificate, "--tls-key", key, "--insecure")
    assert "--insecure" in line


def test_invalid_certificates_are_refused(
    certificates: Certificates, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = certificates.pair("server")
    text = write_private(tmp_path / "text.pem", "this is no certificate")
    locked = write_private(tmp_path / "locked.key", "")
    private: Any = load_key(key.read_bytes(), None)
    passphrase = BestAvailableEncryption(b"passphrase")
    locked.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, passphrase))
    expired, device_key = certificates.pair("expired"), certificates.pair("device")[1]
    cases: list[tuple[Path, Path, Path | None, str]] = [
        (tmp_path / "none.pem", key, None, f"{tmp_path / 'none.pem'}: no such file; give the path of a certificate"),
        (tmp_path, key, None, f"{tmp_path}: is a folder"),
        (
            certificate,
            tmp_path / "none.key",
            None,
            f"{tmp_path / 'none.key'}: no such file; give the path of a private",
        ),
        (text, key, None, f"{text}: contains no certificate in PEM"),
        (key, key, None, f"{key}: contains no certificate in PEM"),
        (certificate, text, None, f"{text}: contains no private key in PEM"),
        (certificate, certificate, None, f"{certificate}: contains no private key in PEM"),
        (certificate, locked, None, f"{locked}: the key has a passphrase"),
        (certificate, device_key, None, f"{device_key}: is not the key of the certificate in {certificate}"),
        (*expired, None, f"{expired[0]}: the certificate expired on 2020-01-01; renew it"),
        (certificate, key, text, f"{text}: contains no certificate in PEM"),
        (certificate, key, expired[0], f"{expired[0]}: the certificate expired on 2020-01-01"),
    ]
    for cert_file, key_file, authority, message in cases:
        flags: list[object] = ["--tls-cert", cert_file, "--tls-key", key_file]
        flags += ["--tls-client-ca", authority] if authority is not None else []
        assert refusal_here("kb-server", capsys, *flags).startswith(message)


SECRET = "secret-0123456789-xYz"
TOKEN_FILES = {
    "": "must contain one or more [[token]]",
    "tokens = 3": "must contain one or more [[token]] and nothing else",
    f"{SECRET}": "is not valid TOML (at",
    f"[[token]]\ntoken = '{SECRET}": "is not valid TOML (at",
    f"[[token]]\ntoken = '{SECRET}'": "[[token]] number 1: name: Field required",
    f"[[token]]\nname = 'a b'\ntoken = '{SECRET}'": "name: String should match",
    "[[token]]\nname = 'a'\ntoken = 'secret-01234567'": "token: must have at least 16 ASCII characters",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET} and more'": "token: must have at least 16 ASCII characters",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\n{SECRET} = 1": "can have only name, token, sessions, bundles",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\nsessions = 0": "sessions: Input should be greater than or equal to 1",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\nbundles = '{SECRET}'": "bundles: Input should be a valid list",
    f"[[token]]\nname = 'a'\ntoken = ['{SECRET}']": "token: Input should be a valid string",
    f"a = {'1' * 5000}": "is not valid TOML (it has a value that cannot be read)",
    f"token = ['{SECRET}']": "[[token]] number 1: can have only name, token, sessions, bundles",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\n[[token]]\nname = 'a'\ntoken = '{SECRET}2'": "name a appears twice",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\n[[token]]\nname = 'b'\ntoken = '{SECRET}'": "b has the token of a",
}


@pytest.mark.parametrize(("content", "message"), TOKEN_FILES.items(), ids=range(len(TOKEN_FILES)))
def test_invalid_token_files_are_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_private(tmp_path / "tokens.toml", content)
    line = refusal_here("kb-server", capsys, "--auth-tokens", path)
    assert line.startswith(f"{path}: ")
    assert message in line
    assert SECRET[:15] not in line


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_secrets_that_all_users_can_read_cause_a_warning(
    certificates: Certificates, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    certificate, key = certificates.pair("server")
    tokens = write_private(tmp_path / "tokens.toml", TOKENS_FILE)
    for mode, warned in ((0o600, False), (0o640, False), (0o644, True)):
        tokens.chmod(mode)
        check_security("127.0.0.1", auth_tokens=tokens, tls_cert=certificate, tls_key=key)
        expected = f"warning: {tokens}: every user of this machine can read it; run chmod 600 on it\n" if warned else ""
        assert capfd.readouterr().err == expected
