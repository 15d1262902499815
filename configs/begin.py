"""The first thing that a command does: answer signals at once, import nothing from the working directory, and choose
the number of threads before numpy is imported."""

from __future__ import annotations

import os
import sys

from configs import signals, threads


def begin() -> None:
    """Call it before the imports that take a while."""
    signals.leave()
    leave_out_working_directory()
    threads.choose()


def leave_out_working_directory() -> None:
    """A user's pretrain.py or torch.py is not ours: `python -m` would import it, here and in child processes.

    A checkout that is used as it lies, without an installation, stays on the path.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # for child processes
    if sys.flags.safe_path or not sys.path or sys.path[0] not in ("", os.getcwd()):
        return
    checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.realpath(sys.path[0]) != os.path.realpath(checkout):
        del sys.path[0]
    else:
        paths = [checkout, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
