"""What a user can mend, and how an error or a lack is said."""

import functools
import sys


class Refused(ValueError):
    """The user's files, flags or machine do not allow what was asked for.

    The message is one line that names the thing, the place and the way out. A script prints it without a traceback and
    exits with a non-zero status; any other exception is a mistake of the program and keeps its traceback.
    """


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    # torch puts the whole traceback of a loader's worker process before what it says
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    text = str(error).rpartition(f"\n{name}: ")[2]
    return " ".join(text.split()) or type(error).__name__


@functools.cache
def warn_once(line: str) -> None:
    """A warning, however often what it is about is met."""
    print(f"warning: {line}", file=sys.stderr)
