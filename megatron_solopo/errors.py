"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A one-line message: where (file:line, flag or rank), what is wrong, what to change.

    Commands print it as ``error: <message>`` and exit with status 2; a traceback would only
    hide the line that matters.
    """
