"""Tests for TLS and tokens in the client: valid ones are used, and an invalid one ends the command with one line."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import soundfile

from tests.certificates import TOKENS, Certificates, write_private
from tests.processes import Server, refusal, refusal_here, run

SS = "ss_delay6_compression2"
ENROLLMENT = Path(__file__).parents[2] / "samples" / "enrollment.flac"
Bundle = Callable[[str], Path]


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    path = tmp_path / "mixture.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.1, 0.1, (32000, 2)), 16000)
    return path


@pytest.fixture
def token(tmp_path: Path) -> Path:
    return write_private(tmp_path / "token", TOKENS["laptop"] + "\n")


@contextmanager
def tls_server(certificate: Path, key: Path) -> Iterator[str]:
    """Run a gRPC server without services and yield its address. kb-server would refuse such a certificate."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    )
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_replay_with_a_token_over_tls(
    golden_bundle: Bundle, guarded_server: Server, certificates: Certificates, mixture: Path, token: Path
) -> None:
    out = mixture.with_name("out.wav")
    security = ["--tls-ca", certificates.ca, "--token-file", token, "--require-server", "--output-format", "float"]
    result = run(
        *("kb-client", "replay", mixture, "-o", out, "--bundle", golden_bundle(SS)),
        *("--server", guarded_server.address, *security),
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    assert len(soundfile.read(out.with_name("out-speaker1.wav"))[0]) == 32000


def test_live_with_a_token_from_the_environment_and_the_certificates_of_the_system(
    golden_bundle: Bundle,
    guarded_server: Server,
    certificates: Certificates,
    mixture: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KB_TOKEN", TOKENS["laptop"])
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    result = run(
        *("kb-client", "live", "--input", mixture, "--output", mixture.with_name("out.wav"), "--json-lines"),
        *("--bundle", golden_bundle(SS), "--server", guarded_server.address, "--tls"),
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["connected"] for line in lines if line["event"] == "server"] == [True]


def test_a_client_presents_its_certificate(
    golden_bundle: Bundle,
    mutual_server: Server,
    certificates: Certificates,
    mixture: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = mixture.with_name("out.wav")

    def call(name: str | None) -> list[object]:
        flags: list[object] = ["replay", mixture, "-o", out, "--bundle", golden_bundle(SS), "--require-server"]
        flags += ["--server", mutual_server.address, "--tls-ca", certificates.ca]
        if name is not None:
            flags += ["--tls-cert", certificates.pair(name)[0], "--tls-key", certificates.pair(name)[1]]
        return flags

    where = f"--server {mutual_server.address}: "
    line = refusal_here("kb-client", capsys, *call(None))
    assert line == f"{where}requires a client certificate; give --tls-cert and --tls-key"
    line = refusal_here("kb-client", capsys, *call("foreign-device"))
    assert line.startswith(f"{where}rejects the certificate of --tls-cert")
    assert "expired on 2020-01-01" in refusal_here("kb-client", capsys, *call("expired-device"))
    assert not list(mixture.parent.glob("out*"))
    result = run("kb-client", *call("device"))
    assert result.returncode == 0, result.stderr


def test_client_and_server_that_do_not_accept_each_other(
    golden_bundle: Bundle,
    guarded_server: Server,
    ss_server: Server,
    certificates: Certificates,
    mixture: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = write_private(mixture.with_name("wrong"), "wrong-0123456789-9fGkq2")
    elsewhere = write_private(mixture.with_name("elsewhere"), TOKENS["elsewhere"])
    ca, server, plain = certificates.ca, guarded_server.address, ss_server.address
    files: list[object] = ["--input", mixture, "--output", mixture.with_name("out.wav"), "--bundle", golden_bundle(SS)]
    commands: list[list[object]] = [
        ["replay", mixture, "-o", mixture.with_name("out.wav"), "--bundle", golden_bundle(SS)],
        ["enroll", "anna", ENROLLMENT],
        ["live", *files],
    ]
    with (
        tls_server(*certificates.pair("expired")) as expired,
        tls_server(*certificates.pair("other-name")) as other_name,
    ):
        cases: list[tuple[list[object], str]] = [
            (["--server", server, "--tls-ca", ca], "UNAUTHENTICATED: this server requires a token"),
            (["--server", server, "--tls-ca", ca, "--token-file", wrong], "UNAUTHENTICATED: this server does not know"),
            (
                ["--server", server, "--tls-ca", certificates.foreign_ca],
                "its certificate is not trusted (unable to get",
            ),
            (["--server", server, "--tls"], "its certificate is not trusted (unable to get local issuer certificate)"),
            (["--server", expired, "--tls-ca", ca], "its certificate is not trusted (certificate has expired); renew"),
            (["--server", other_name, "--tls-ca", ca], "is not valid for '127.0.0.1'); give --server a name"),
            (["--server", server], f"--server {server}: speaks TLS; give --tls or --tls-ca FILE"),
            (["--server", plain, "--tls-ca", ca], f"--server {plain}: speaks no TLS; leave out the --tls flags"),
        ]
        # Enrollment does not depend on a bundle.
        denied: list[object] = ["--server", server, "--tls-ca", ca, "--token-file", elsewhere]
        for command in commands:
            more = [] if command[0] == "enroll" else [(denied, "PERMISSION_DENIED: the token of elsewhere is not for")]
            before = sorted(mixture.parent.iterdir())
            for flags, expected in [*cases, *more]:
                line = refusal_here("kb-client", capsys, *command, *flags)
                assert expected in line, (command, line)
            assert sorted(mixture.parent.iterdir()) == before


@pytest.mark.parametrize("fault", ["a wrong token", "an unknown certificate"])
def test_a_live_process_that_is_refused_ends(
    fault: str, golden_bundle: Bundle, guarded_server: Server, certificates: Certificates, mixture: Path
) -> None:
    wrong = write_private(mixture.with_name("wrong"), "wrong-0123456789-9fGkq2")
    authority = certificates.ca if fault == "a wrong token" else certificates.foreign_ca
    line = refusal(
        *("kb-client", "live", "--input", mixture, "--output", mixture.with_name("out.wav")),
        *("--bundle", golden_bundle(SS), "--server", guarded_server.address),
        *("--tls-ca", authority, "--token-file", wrong),
    )
    assert ("UNAUTHENTICATED" if fault == "a wrong token" else "not trusted") in line
    assert not list(mixture.parent.glob("out*"))


def test_live_uses_another_server_if_one_refuses(
    golden_bundle: Bundle, guarded_server: Server, ss_server: Server, mixture: Path
) -> None:
    result = run(
        *("kb-client", "live", "--input", mixture, "--output", mixture.with_name("out.wav")),
        *("--bundle", golden_bundle(SS), "--server", guarded_server.address, "--server", ss_server.address),
    )
    assert result.returncode == 0, result.stderr
    refused = f"warning: --server {guarded_server.address}: speaks TLS; give --tls or --tls-ca FILE"
    assert result.stderr.splitlines().count(refused) == 1
    assert f"hints come from {ss_server.address}" in result.stdout


def test_live_runs_without_hints_if_there_is_no_server(
    golden_bundle: Bundle, certificates: Certificates, mixture: Path, token: Path
) -> None:
    out = mixture.with_name("out.wav")
    result = run(
        *("kb-client", "live", "--input", mixture, "--output", out, "--bundle", golden_bundle(SS)),
        *("--server", "127.0.0.1:1", "--tls-ca", certificates.ca, "--token-file", token),
    )
    assert result.returncode == 0, result.stderr
    assert (
        "no answer; check that kb-server runs there and that the port is open; the small network runs without hints"
        in result.stderr
    )
    assert len(soundfile.read(out)[0]) == 32000


def test_invalid_credentials_are_refused(
    golden_bundle: Bundle,
    certificates: Certificates,
    mixture: Path,
    token: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = write_private(mixture.with_name("two"), "one-0123456789\ntwo-0123456789")
    empty = write_private(mixture.with_name("empty"), "")
    certificate, key = certificates.pair("device")
    here, there = ["--server", "127.0.0.1:1"], ["--server", "gpu-host:1"]
    unencrypted = "--server gpu-host:1: the token would be sent unencrypted; give --tls or --tls-ca FILE"
    cases: list[tuple[list[object], str]] = [
        (["--tls"], "--tls: needs a server; give --server HOST:PORT too"),
        (["--token-file", token], "--token-file: needs a server"),
        ([*here, "--tls-cert", certificate], "give both --tls-cert and --tls-key"),
        ([*here, "--tls-cert", certificate, "--tls-key", certificates.pair("server")[1]], "is not the key of"),
        ([*here, "--tls-ca", key], f"{key}: contains no certificate in PEM"),
        ([*here, "--tls-ca", mixture.with_name("none")], "no such file; give the path of a certificate in PEM"),
        ([*here, "--token-file", mixture.with_name("none")], "no such file; give the path of a token"),
        ([*here, "--token-file", two], f"{two}: must contain only the token"),
        ([*here, "--token-file", empty], f"{empty}: must contain only the token"),
        ([*there, "--token-file", token], unencrypted),
        (["--server", "127.0.0.1.example:1", "--token-file", token], "the token would be sent unencrypted"),
        # To this machine, the token can be sent unencrypted.
        ([*here, "--token-file", token], "no answer"),
        (["--server", "localhost:1", "--token-file", token], "no answer"),
        (["--server", "[::1]:1", "--token-file", token], "no answer"),
    ]
    call: list[object] = ["replay", mixture, "-o", mixture.with_name("out.wav"), "--bundle", golden_bundle(SS)]
    for flags, expected in cases:
        line = refusal_here("kb-client", capsys, *call, *flags)
        assert expected in line, line
        assert "0123456789" not in line
    monkeypatch.setenv("KB_TOKEN", TOKENS["laptop"])
    for command in (call, ["live", "--bundle", golden_bundle(SS)], ["enroll", "anna", ENROLLMENT]):
        assert refusal_here("kb-client", capsys, *command, *there) == unencrypted
    monkeypatch.setenv("KB_TOKEN", "two words")
    assert refusal_here("kb-client", capsys, *call, *here).startswith("KB_TOKEN: must contain only the token")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_token_that_all_users_can_read_causes_a_warning(golden_bundle: Bundle, mixture: Path, token: Path) -> None:
    token.chmod(0o644)
    result = run(
        *("kb-client", "replay", mixture, "-o", mixture.with_name("out.wav"), "--bundle", golden_bundle(SS)),
        *("--server", "127.0.0.1:1", "--token-file", token),
    )
    assert result.returncode == 2
    assert f"warning: {token}: every user of this machine can read it; run chmod 600 on it" in result.stderr
