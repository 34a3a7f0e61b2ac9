"""What a user can mend, and how an error is said."""


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
    text = str(error).rpartition(f"\n{kind.__module__}.{kind.__name__}: ")[2]
    return " ".join(text.split()) or type(error).__name__
