"""The C++ library of training is kept where nobody else can write, and training works without it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.models.compiled import needs_compiler

TRAIN = """
import torch
from knowledge_boosting.models.config import NetworkSize
from knowledge_boosting.models.layers import window_of
from knowledge_boosting.models.tfgridnet import GridNetBlock
block = GridNetBlock(NetworkSize(channels=16, hidden=16), 97)
for _ in range(2):
    y, _ = block(torch.randn(1, 4, 97, 16), block.initial_state(1, 97), window_of(torch.zeros(1), 4, 50))
    y.sum().backward()
assert block.intra_lstm.weight_ih_l0.grad.abs().sum() > 0
"""
LOADED = """
from knowledge_boosting.models.compiled import library
assert library() is not None
print(next(line.split()[5] for line in open('/proc/self/maps') if "training-" in line))
"""


def run(script: str, **environment: object) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "CXXFLAGS": "-O0", **{name: str(value) for name, value in environment.items()}}
    return subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, check=False)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("training-*.so"))


@pytest.mark.parametrize(
    ("compiler", "fault"),
    [
        ("", "there is no C++ compiler /none (No such file or directory); install one, or set CXX"),
        ("#!/bin/sh\necho 'x.cpp:1: fatal error: no vectors' >&2\nexit 1\n", "fatal error: no vectors"),
        ("#!/bin/sh\nwhile [ $# -gt 1 ]; do [ $1 = -o ] && echo rubbish > $2; shift; done\n", "file too short"),
    ],
)
def test_training_without_the_library_warns_once_that_it_is_slower(compiler: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "c++"
    if compiler:
        path.write_text(compiler)
        path.chmod(0o755)
    result = run(TRAIN, CXX=path if compiler else "/none", XDG_CACHE_HOME=tmp_path)
    assert result.returncode == 0, result.stderr
    line, *rest = result.stderr.splitlines()
    assert not rest
    assert line.startswith("warning: training and evaluation take two to four times as long without the C++ library: ")
    assert fault in line


@needs_compiler
def test_without_supported_vector_instructions_torch_is_used(tmp_path: Path) -> None:
    flags = "-O0 -U__AVX512F__ -U__AVX2__ -U__SSE2__ -U__ARM_NEON"
    result = run(TRAIN, CXXFLAGS=flags, XDG_CACHE_HOME=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no supported vector instructions" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@needs_compiler
def test_a_cache_folder_without_write_access_is_reported_and_not_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(TRAIN, XDG_CACHE_HOME=tmp_path / "file")
    assert result.returncode == 0, result.stderr
    line, *rest = result.stderr.splitlines()
    assert not rest
    assert "cannot write there" in line
    assert "set XDG_CACHE_HOME to a folder you can write to" in line


@needs_compiler
def test_the_cached_library_is_private_with_any_umask(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    with umask(0):
        result = run(LOADED, XDG_CACHE_HOME=cache)
    assert not result.stderr
    folder = cache / "knowledge-boosting"
    (kept,) = libraries(cache)
    assert kept.parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert kept.stat().st_mode & 0o077 == 0
    assert result.stdout.strip() == str(kept)
    made = kept.stat().st_mtime_ns
    folder.chmod(0o777)  # as if an earlier version or the user had made it
    assert run(LOADED, XDG_CACHE_HOME=cache).stdout.strip() == str(kept)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert kept.stat().st_mtime_ns == made


@needs_compiler
@pytest.mark.parametrize("planted", ["writable", "link", "others"])
def test_a_library_that_others_could_have_written_is_not_loaded(planted: str, tmp_path: Path) -> None:
    assert not run(LOADED, XDG_CACHE_HOME=tmp_path).stderr
    (kept,) = libraries(tmp_path)
    whole = kept.read_bytes()
    kept.unlink()
    # This library prints a word when it is loaded.
    source = tmp_path / "planted.c"
    source.write_text('#include <stdio.h>\n__attribute__((constructor)) void f(void) { puts("planted"); }\n')
    other = tmp_path / "planted.so"
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", other], check=True)
    if planted == "link":
        kept.symlink_to(other)
    else:
        other.rename(kept)
        kept.chmod(0o620 if planted == "writable" else 0o600)
        if planted == "others":
            if os.getuid() != 0:
                pytest.skip("only root can give files away")
            os.chown(kept, 12345, -1)
    result = run(LOADED, XDG_CACHE_HOME=tmp_path)
    assert result.stdout.strip() == str(kept)
    assert not result.stderr
    assert kept.read_bytes() == whole
    assert not kept.is_symlink()


@needs_compiler
@pytest.mark.parametrize("unsafe", ["cache", "others"])
def test_nothing_is_cached_in_a_folder_that_others_can_write(unsafe: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = cache / "knowledge-boosting"
    folder.mkdir(parents=True)
    if unsafe == "cache":
        cache.chmod(0o777)
    else:
        if os.getuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(folder, 12345, -1)
    temporary = tmp_path / "temporary"
    temporary.mkdir(mode=0o700)
    result = run(LOADED, XDG_CACHE_HOME=cache, TMPDIR=temporary)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(temporary))
    assert result.stderr.count("others can write there, so the library is not kept") == 1
    assert len(result.stderr.splitlines()) == 1
    assert not libraries(tmp_path)  # the temporary library is deleted too
    cache.chmod(0o1777)  # a sticky folder like /tmp, in which users cannot replace files of others
    os.chown(folder, os.getuid(), -1)
    assert not run(LOADED, XDG_CACHE_HOME=cache).stderr
    assert libraries(cache)
