"""The one exception a user is meant to read: it names the value, the valid choices and the command that fixes it."""


class CompactMindError(Exception):
    """A problem with input, settings or files that the user can fix. Scripts print it without a traceback."""
