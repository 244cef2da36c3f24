"""A server that other machines can reach: TLS, tokens, and what each is refused without."""

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

WANTS_TOKEN = "this server wants a token, in the metadata 'authorization: Bearer TOKEN'"
UNKNOWN = "this server does not know the token"


def describe(to: grpc.Channel, metadata: Metadata = ()) -> str:
    return status_of(
        lambda: HintServiceStub(to).DescribeModel(pb.DescribeModelRequest(), metadata=metadata, timeout=PATIENCE)
    )[0]


def status_of(call: Any) -> tuple[str, str]:
    """The status and details in which a call ends, all of its answers read."""
    try:
        answers = call()
        if isinstance(answers, grpc.Call):
            list(answers)  # type: ignore[call-overload] # grpc's own types do not say that it is an iterator too
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return error.code().name, error.details() or ""
    return "OK", ""


def calls(to: grpc.Channel, ss: Material, metadata: Metadata) -> dict[str, tuple[str, str]]:
    """What every method of a server makes of the metadata."""
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
    ("metadata", "why"),
    [
        ((), WANTS_TOKEN),
        ((("authorization", TOKENS["laptop"]),), WANTS_TOKEN),
        ((("authorization", f"Basic {TOKENS['laptop']}"),), WANTS_TOKEN),
        (bearer(TOKENS["laptop"]) + bearer(TOKENS["laptop"]), WANTS_TOKEN),
        (bearer(""), UNKNOWN),
        (bearer("wrong-0123456789-9fGkq2"), UNKNOWN),
        (bearer(TOKENS["laptop"][:-1]), UNKNOWN),
        (bearer(TOKENS["laptop"] + "2"), UNKNOWN),
    ],
    ids=["none", "no scheme", "another scheme", "two", "empty", "wrong", "cut short", "longer"],
)
def test_every_call_needs_a_known_token(
    metadata: Metadata, why: str, guarded_server: Server, certificates: Certificates, ss: Material
) -> None:
    with channel(guarded_server.address, certificates.ca) as to:
        assert set(calls(to, ss, metadata).values()) == {("UNAUTHENTICATED", why)}


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
    # It goes as far as without tokens.
    assert results["Enroll"][0] == "INVALID_ARGUMENT"
    # Not loopback: the interface is not described.
    assert results["ServerReflectionInfo"][0] == "UNIMPLEMENTED"
    assert any('"session_opened"' in line and '"caller": "laptop"' in line for line in guarded_server.log[seen:])


def test_a_token_for_another_bundle(guarded_server: Server, certificates: Certificates, ss: Material) -> None:
    with channel(guarded_server.address, certificates.ca) as to:
        results = calls(to, ss, bearer(TOKENS["elsewhere"]))
    why = f"the token of elsewhere is not for the bundle {ss.manifest.name}; ask whoever runs this server"
    assert results["StreamHints"] == results["DescribeModel"] == ("PERMISSION_DENIED", why)


@contextmanager
def session(to: grpc.Channel, ss: Material, token: str) -> Iterator[Any]:
    """A session that is open until the block ends."""
    outbox: SimpleQueue[pb.StreamHintsRequest | None] = SimpleQueue()
    outbox.put(ss.opening())
    call: Any = HintServiceStub(to).StreamHints(iter(outbox.get, None), metadata=bearer(token), timeout=PATIENCE)
    try:
        yield call
    finally:
        outbox.put(None)
        call.cancel()


def test_a_tokens_sessions_are_counted(guarded_server: Server, certificates: Certificates, ss: Material) -> None:
    opening: Any = [ss.opening()]

    def attempt(token: str) -> tuple[str, str]:
        return status_of(
            lambda: HintServiceStub(to).StreamHints(iter(opening), metadata=bearer(token), timeout=PATIENCE)
        )

    with channel(guarded_server.address, certificates.ca) as to:
        with session(to, ss, TOKENS["single"]) as call:
            next(call)
            status, why = attempt(TOKENS["single"])
            assert status == "RESOURCE_EXHAUSTED"
            assert why == "all sessions of the token of single (1) are taken; end one, or try again later"
            # Other tokens have their own, and this one other calls.
            assert attempt(TOKENS["laptop"]) == ("OK", "")
            assert describe(to, bearer(TOKENS["single"])) == "OK"
        wait_until(lambda: attempt(TOKENS["single"])[0] == "OK", "the place of a session that ended stays taken")


def test_a_changed_file_of_tokens_counts_at_once_and_a_broken_one_does_not(
    guarded_server: Server, certificates: Certificates
) -> None:
    path, added = certificates.folder / "tokens.toml", "added-0123456789-Zk82jq"
    with channel(guarded_server.address, certificates.ca) as to:
        try:
            assert describe(to, bearer(added)) == "UNAUTHENTICATED"
            path.write_text(f'[[token]]\nname = "added"\ntoken = "{added}"\n')
            wait_until(lambda: describe(to, bearer(added)) == "OK", "the new token is not known")
            assert describe(to, bearer(TOKENS["laptop"])) == "UNAUTHENTICATED"
            for broken in (f'[[token]]\nname = "x"\ntoken = {added}\n', '[[token]]\nname = "x"\ntoken = "short"\n', ""):
                seen = len(guarded_server.log)
                path.write_text(broken)
                wait_until(
                    lambda seen=seen: (
                        describe(to, bearer(added)) == "OK"  # type: ignore[misc]
                        and any("what was read before stays" in line for line in guarded_server.log[seen:])
                    ),
                    "a broken file is not told, or has taken the tokens away",
                )
                lines = [line for line in guarded_server.log[seen:] if "what was read before stays" in line]
                assert len(lines) == 1
        finally:
            path.write_text(TOKENS_FILE)
        wait_until(lambda: describe(to, bearer(TOKENS["laptop"])) == "OK", "the old tokens are not back")
    secrets_are_kept(guarded_server, certificates, added, "short")


def test_sessions_of_a_token_that_was_taken_away_end(
    guarded_server: Server, certificates: Certificates, ss: Material
) -> None:
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
        assert "does not know the token any more" in gone.details()
        ended = json.loads(guarded_server.wait_for_log("does not know the token any more"))
        assert (ended["event"], ended["token"]) == ("session_closed", "revoked")
        assert stays.is_active()
        stays.cancel()


def test_nobody_hears_of_bundles_that_are_not_for_him(
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


def test_a_renewed_certificate_is_shown_to_new_connections(guarded_server: Server, certificates: Certificates) -> None:
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
            "half of a new pair is not told, or is used",
        )
        certificates.issue("server", "localhost", "127.0.0.1", authority=certificates.foreign)
        wait_until(lambda: status(certificates.foreign_ca) == "OK", "the new certificate is not shown")
        assert status(certificates.ca) == "UNAVAILABLE"
    finally:
        for path, content in zip(pair, before, strict=True):
            path.write_bytes(content)
    wait_until(lambda: status(certificates.ca) == "OK", "the old certificate is not shown again")


def test_a_device_needs_a_certificate_that_the_server_knows(
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
    # As --reflection says, though others than this machine can connect.
    assert results["ServerReflectionInfo"] == ("OK", "")


def test_what_is_not_encrypted_does_not_get_through(
    guarded_server: Server, certificates: Certificates, ss_server: Server
) -> None:
    with grpc.insecure_channel(guarded_server.address) as to:
        assert describe(to, bearer(TOKENS["laptop"])) == "UNAVAILABLE"
    with channel(ss_server.address, certificates.ca) as to:
        assert describe(to) == "UNAVAILABLE"


def secrets_are_kept(server: Server, certificates: Certificates, *others: str) -> None:
    """No token and no line of a key is in the log. The server prints one line to standard output, which was read."""
    key = certificates.pair("server")[1].read_text().splitlines()[1]
    log = "".join(server.log)
    assert "UNAUTHENTICATED" in log
    assert not [secret for secret in (*TOKENS.values(), key, *others) if secret in log]
    assert "Traceback" not in log


def test_secrets_are_in_no_log(guarded_server: Server, certificates: Certificates) -> None:
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


def test_certificates_that_cannot_be_used(
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
    for cert_file, key_file, authority, why in cases:
        flags: list[object] = ["--tls-cert", cert_file, "--tls-key", key_file]
        flags += ["--tls-client-ca", authority] if authority is not None else []
        assert refusal_here("kb-server", capsys, *flags).startswith(why)


SECRET = "secret-0123456789-xYz"
TOKEN_FILES = {
    "": "must hold one or more [[token]]",
    "tokens = 3": "must hold one or more [[token]] and nothing else",
    f"{SECRET}": "is no TOML (at",
    f"[[token]]\ntoken = '{SECRET}": "is no TOML (at",
    f"[[token]]\ntoken = '{SECRET}'": "[[token]] number 1: name: Field required",
    f"[[token]]\nname = 'a b'\ntoken = '{SECRET}'": "name: String should match",
    "[[token]]\nname = 'a'\ntoken = 'secret-01234567'": "token: must have 16 characters or more, of ASCII",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET} and more'": "token: must have 16 characters or more, of ASCII",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\n{SECRET} = 1": "may have name, token, sessions, bundles",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\nsessions = 0": "sessions: Input should be greater than or equal to 1",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\nbundles = '{SECRET}'": "bundles: Input should be a valid list",
    f"[[token]]\nname = 'a'\ntoken = ['{SECRET}']": "token: Input should be a valid string",
    f"token = ['{SECRET}']": "[[token]] number 1: may have name, token, sessions, bundles",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\n[[token]]\nname = 'a'\ntoken = '{SECRET}2'": "name a is there twice",
    f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\n[[token]]\nname = 'b'\ntoken = '{SECRET}'": "b has the token of a",
}


@pytest.mark.parametrize(("content", "why"), TOKEN_FILES.items(), ids=range(len(TOKEN_FILES)))
def test_token_files_that_cannot_be_used(
    content: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_private(tmp_path / "tokens.toml", content)
    line = refusal_here("kb-server", capsys, "--auth-tokens", path)
    assert line.startswith(f"{path}: ")
    assert why in line
    assert SECRET[:15] not in line


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_secrets_that_everybody_can_read_are_warned_of(
    certificates: Certificates, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    certificate, key = certificates.pair("server")
    tokens = write_private(tmp_path / "tokens.toml", TOKENS_FILE)
    for mode, warned in ((0o600, False), (0o640, False), (0o644, True)):
        tokens.chmod(mode)
        check_security("127.0.0.1", auth_tokens=tokens, tls_cert=certificate, tls_key=key)
        expected = f"warning: {tokens}: every user of this machine can read it; run chmod 600 on it\n" if warned else ""
        assert capfd.readouterr().err == expected
