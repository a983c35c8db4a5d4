"""The exception tree. Every error a user can cause carries its exit code and one clear line.

    MpsearchError              1    our fault, unless a branch below says otherwise
    ├── UsageError             2    wrong usage, a bad file, a missing library
    │   ├── SpaceError              a search-space file
    │   ├── FactsError              a facts file
    │   ├── ModelError              a model that cannot be had or cannot be searched
    │   └── RunError                a run or export folder
    ├── InfeasibleError        3    nothing can satisfy the wish
    ├── CheckError             4    a check failed: NaN weights, a reference that knows nothing
    └── ResourceError          5    memory or disk ran out; what is finished is kept

Ctrl-C is Python's own KeyboardInterrupt and exits with 130.
"""

import re
from errno import EDQUOT, EFBIG, ENOSPC

# The last is oneDNN's; of a primitive descriptor it says so where an operation is not supported.
_NO_MEMORY = re.compile(
    "out of memory|can(?:'|no)t allocate memory|could not create a primitive(?! desc)",
    re.IGNORECASE,
)


class MpsearchError(Exception):
    """Base of all errors raised on purpose; the message is one line: what, value, allowed, fix."""

    exit_code = 1

    def __init__(self, message: str = ""):
        # A value that is quoted may hold line breaks; the message is one line all the same.
        super().__init__(" ".join(message.split("\n")).replace("\r", " "))


class UsageError(MpsearchError):
    exit_code = 2


class SpaceError(UsageError):
    pass


class FactsError(UsageError):
    pass


class ModelError(UsageError):
    pass


class RunError(UsageError):
    pass


class InfeasibleError(MpsearchError):
    exit_code = 3


class CheckError(MpsearchError):
    exit_code = 4


class ResourceError(MpsearchError):
    exit_code = 5


EXIT_INTERRUPTED = 130


def exhausted(error: BaseException) -> str:
    """What ran out, and the way out, if an error from below says that; else empty."""
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG):
        return "the disk is full; free some space"
    # torch's on a CPU are plain RuntimeErrors.
    told = isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or told:
        return "memory ran out; close other programs or use a smaller model"
    return ""
