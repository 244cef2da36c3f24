"""Tests for writing files atomically and for checking the files of a command."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.files import atomic_directory, atomic_file, check_files


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
    value = os.umask(0)
    os.umask(value)
    return value


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
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


def test_an_unwritable_path_is_reported(tmp_path: Path) -> None:
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


def check(reads: list[Path], writes: list[Path], folders: dict[Path, list[str]] | None = None) -> str:
    """Return the error message for a command that reads and writes these files. It is empty if there is no error."""
    try:
        check_files(reads, writes, folders)
    except InputError as error:
        return str(error)
    return ""


def test_no_output_may_overwrite_an_input_or_another_output(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    a.write_text("a")
    (tmp_path / "soft.wav").symlink_to(a)
    (tmp_path / "dangling.wav").symlink_to(b)
    (tmp_path / "hard.wav").hardlink_to(a)
    (tmp_path / "folder").symlink_to(tmp_path)
    same = [
        a,
        tmp_path / "soft.wav",
        tmp_path / "hard.wav",
        tmp_path / "sub" / ".." / "a.wav",
        tmp_path / "folder/a.wav",
    ]
    for path in same:
        assert "would overwrite an input" in check([a], [path]), path
        assert "would overwrite an input" in check([path], [a]), path
        assert path == a or "two outputs have this name" in check([], [a, path]), path
    # None of these files exists yet.
    for path in (b, tmp_path / "dangling.wav", tmp_path / "sub" / ".." / "b.wav", tmp_path / "folder" / "b.wav"):
        assert "two outputs have this name" in check([], [b, path]), path
    # The folders arguments name files too.
    assert "would overwrite an input" in check([a], [], {tmp_path: ["a.wav"]})
    assert "two outputs have this name" in check([], [b], {tmp_path / "folder": ["c.wav", "b.wav"]})
    assert "two outputs have this name" in check(
        [], [], {tmp_path / "new": ["c.wav"], tmp_path / "sub" / ".." / "new": ["c.wav"]}
    )
    assert not check([a], [b, tmp_path / "c.wav"], {tmp_path / "new" / "deep": ["a.wav", "b.wav"]})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.wav",
        "dangling.wav",
        "folder",
        "hard.wav",
        "soft.wav",
        "sub",
    ]


def test_an_unwritable_path_is_found_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    long = "n" * 300
    cases = [
        ([tmp_path / "no" / "a.wav"], {}, "there is no folder"),
        ([tmp_path], {}, "is a folder"),
        ([tmp_path / f"{long}.wav"], {}, "File name too long"),
        ([tmp_path / "file" / "a.wav"], {}, "there is no folder"),
        ([], {tmp_path / "file" / "d": ["a"]}, "is a file"),
        ([], {tmp_path / "file": ["a"]}, "is a file"),
        ([], {tmp_path / long: ["a"]}, "File name too long"),
        ([Path("/proc/a.wav")], {}, "cannot write there"),
        ([], {Path("/proc/d"): ["a"]}, "cannot write there"),
    ]
    for writes, folders, expected in cases:
        assert expected in check([], writes, folders), writes or folders
    # This is the longest name that the file system accepts.
    longest = tmp_path / f"{'é' * 125}.wav"
    assert not check([], [longest], {tmp_path / ("n" * 255): ["a"]})
    with atomic_file(longest) as temporary:
        temporary.write_text("all of it")
    assert longest.read_text() == "all of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", longest.name]


def test_a_pipe_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as reader:
        content = reader.submit(pipe.read_bytes)
        with atomic_file(pipe) as temporary:
            temporary.write_bytes(b"whole")
        assert content.result() == b"whole"
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "a")
    with atomic_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "a").read_text() == "new"
