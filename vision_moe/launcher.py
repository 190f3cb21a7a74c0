"""Ties a rank's life to its launcher's."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Makes Linux kill this process when torchrun dies.

    torchrun starts its workers in sessions of their own: after kill -9 of the launcher they would go on training and
    write into the folder that the next run goes on from. Without torchrun, or on another system, nothing is done.

    Raises:
        OSError: the kernel refuses.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
