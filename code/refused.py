"""What a user can mend."""


class Refused(ValueError):
    """The user's files, flags or machine do not allow what was asked for.

    The message is one line that names the thing, the place and the way out. A script prints it without a traceback and
    exits with a non-zero status; any other exception is a mistake of the program and keeps its traceback.
    """
