"""Tests for error messages."""

import pickle

import pytest

from knowledge_boosting.common.errors import Failure, InputError


@pytest.mark.parametrize("kind", [InputError, Failure])
def test_a_message_is_one_line_that_keeps_its_beginning_and_its_end(kind: type[Exception]) -> None:
    text = str(kind(f"a.json: schema_version is\n'{'x' * 100_000}'\r\nthis program reads 1"))
    assert len(text.splitlines()) == 1
    assert len(text) < 1010
    assert text.startswith("a.json: schema_version is 'xxx")
    assert text.endswith("xxx' this program reads 1")
    assert str(kind("a name  with two spaces")) == "a name  with two spaces"


def test_errors_can_be_passed_between_processes() -> None:
    error = pickle.loads(pickle.dumps(InputError("a.wav: no such file")))
    assert (type(error), str(error)) == (InputError, "a.wav: no such file")
