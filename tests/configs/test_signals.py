"""What SIGHUP does: as SIGTERM, but nothing to a command that was started to ignore it."""

import fcntl
import os
import subprocess
import sys
import termios
from pathlib import Path

WAITS = """
import os, signal, sys, time
from pathlib import Path
from configs import signals
signals.leave()
signals.listen()
try:
    os.write(1, b"ready\\n")
    while True:
        time.sleep(0.05)
except signals.Stopped as stopped:
    print(stopped, flush=True)  # an error where the terminal is gone
    Path(sys.argv[1]).write_text(str(stopped))
    sys.exit(75)
"""
NOHUP = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from configs import signals
signals.leave()
signals.listen()
with signals.held():
    os.kill(os.getpid(), signal.SIGHUP)
signals.ignore()
"""


def test_a_closed_terminal_stops_a_command_that_may_still_print(tmp_path: Path) -> None:
    ours, theirs = os.openpty()

    def sit_at_it() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    child = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(tmp_path / "said")], stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=sit_at_it,
    )  # fmt: skip
    os.close(theirs)
    assert os.read(ours, 5) == b"ready"
    os.close(ours)
    assert child.wait(60) == 75
    assert (tmp_path / "said").read_text() == "stopped by SIGHUP"


def test_a_command_under_nohup_goes_on() -> None:
    assert subprocess.run([sys.executable, "-c", NOHUP]).returncode == 0


def test_a_hang_up_before_the_work_ends_the_command_with_75() -> None:
    code = "import os, signal; from configs import signals; signals.leave(); os.kill(os.getpid(), signal.SIGHUP)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 75 and done.stderr.startswith("stopped by SIGHUP before it began")
