"""Becomes another program that the kernel ends when its parent dies; started by `child_processes` as a script.

Arguments: the parent's process number, then the program and its arguments. A process of its own, because code
between fork and exec (`preexec_fn`) can deadlock in a parent that runs threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; kept over exec


def _become(parent: int, arguments: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            sys.exit(1)
    os.execv(arguments[0], arguments)  # noqa: S606


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
