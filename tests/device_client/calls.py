"""kb-client called in this process, which is faster than a process of its own."""

import signal
from pathlib import Path

import pytest

import device_client.main


def client_refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that kb-client refuses a call with, its exit code checked."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["kb-client", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            device_client.main.main()
    signal.signal(signal.SIGTERM, handler)
    printed = capsys.readouterr()
    assert left.value.code == 2, printed.err
    lines = [line for line in printed.err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, printed.err
    assert not printed.out
    return lines[0].removeprefix("kb-client: error: ")


def leftovers(folder: Path) -> list[str]:
    """Names of files in a folder, hidden temporary ones included."""
    return sorted(path.name for path in folder.iterdir())
