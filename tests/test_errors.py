"""Errors: the exception tree, its exit codes, and the docstring that draws them."""

from __future__ import annotations

import errno
import inspect
import re

import pytest

from mpsearch import errors
from mpsearch.errors import (
    EXIT_INTERRUPTED,
    CheckError,
    FactsError,
    InfeasibleError,
    ModelError,
    MpsearchError,
    ResourceError,
    RunError,
    SpaceError,
    UsageError,
    exhausted,
)

TREE: dict[type[MpsearchError], tuple[type[Exception], int]] = {
    MpsearchError: (Exception, 1),
    UsageError: (MpsearchError, 2),
    SpaceError: (UsageError, 2),
    FactsError: (UsageError, 2),
    ModelError: (UsageError, 2),
    RunError: (UsageError, 2),
    InfeasibleError: (MpsearchError, 3),
    CheckError: (MpsearchError, 4),
    ResourceError: (MpsearchError, 5),
}


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_each_error_has_its_parent_and_its_exit_code(error: type[MpsearchError]) -> None:
    parent, exit_code = TREE[error]
    assert error.__bases__ == (parent,)
    assert error.exit_code == exit_code


def test_the_module_defines_these_errors_and_no_others() -> None:
    defined = {value for _, value in inspect.getmembers(errors, inspect.isclass)}
    assert defined == set(TREE)


def test_an_interrupt_exits_as_shells_expect_and_as_no_error_does() -> None:
    assert EXIT_INTERRUPTED == 128 + 2  # SIGINT is signal 2
    assert EXIT_INTERRUPTED not in {error.exit_code for error in TREE}


def test_the_docstring_draws_every_error_with_its_exit_code() -> None:
    drawn: dict[str, int] = {}
    code_above = 0
    for indent, name, code in re.findall(r"^([ │├└─]*)(\w+Error)(?: +(\d)\b)?", _doc(), re.M):
        drawn[name] = code_above = int(code) if code else code_above
        assert bool(code) == (len(indent) <= 8), f"{name}: children inherit, branches carry a code"
    assert drawn == {error.__name__: error.exit_code for error in TREE}
    assert str(EXIT_INTERRUPTED) in _doc()


def test_the_message_is_what_was_given() -> None:
    assert str(SpaceError("s.yaml, line 3: no format 'x'")) == "s.yaml, line 3: no format 'x'"


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_the_message_is_one_line_whatever_it_quotes(error: type[MpsearchError]) -> None:
    assert str(error("no format 'a\nb\r\nc'")).splitlines() == [str(error("no format 'a b  c'"))]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
        (RuntimeError("could not create a primitive"), "memory"),
        (RuntimeError("CUDA out of memory."), "memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (OSError(errno.EFBIG, "File too large"), "disk"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError(errno.EACCES, "Permission denied"), ""),
        (RuntimeError("shapes differ"), ""),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), ""),
        (ImportError("libgomp.so.1: cannot allocate memory in static TLS block"), ""),
        (ValueError("no file 'out of memory'"), ""),
    ],
)
def test_what_ran_out_is_told_from_other_errors(error: Exception, said: str) -> None:
    found = exhausted(error)
    assert said in found
    assert bool(found) == bool(said)


def _doc() -> str:
    assert errors.__doc__ is not None
    return errors.__doc__
