"""Ctrl-C for a child process, also where the tests run in the background of a shell."""

import signal


def hear_interrupts() -> None:
    """For `preexec_fn`: a shell's background jobs ignore SIGINT, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
