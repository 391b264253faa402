"""The one exception a user is meant to see."""

from __future__ import annotations


class QuantkitError(Exception):
    """Bad input or usage: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 2.
    """


class WriteError(QuantkitError):
    """The output cannot be written (a full disk, say): no fault of the input, and the run can go on later."""


class InternalError(Exception):
    """A failure of ours (an output that does not verify, say); the command line exits with 1."""
