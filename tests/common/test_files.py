"""Files that are whole or not there."""

from pathlib import Path

import pytest

from common.errors import InputError
from common.files import atomic_directory, atomic_file


def test_a_file_appears_only_when_all_of_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".json"
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def _umask() -> int:
    import os

    value = os.umask(0)
    os.umask(value)
    return value


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "d") as directory:
        (directory / "part").write_text("half")
        raise ZeroDivisionError
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write there"), atomic_file(tmp_path / "no" / "a"):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(InputError, match="exists already"), atomic_directory(tmp_path / "full"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write there"), atomic_directory(tmp_path / "file" / "d"):
        pass
    with atomic_directory(tmp_path / "new" / "d") as directory:
        (directory / "a").touch()
    assert (tmp_path / "new" / "d" / "a").exists()
