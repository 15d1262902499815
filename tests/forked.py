"""Commands as `python -m` runs them, each in its own process that is forked from a server with the libraries loaded.

A new interpreter spends one to six seconds on importing torch, timm and scikit-learn before a command begins.
"""

import contextlib
import functools
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = [
    "finetune.__main__",
    "finetune.probe.main",
    "finetune.fusion.train",
    "finetune.report.page",
    "finetune.embed",
    "pretrain.store.write",
    "pretrain.train",
    "pretrain.text.knowledge",
    "ehr_features.build",
    "ehr_features.notes.write",
    "ehr_features.audit.claims",
    "ehr_features.demo.generate",
    "ehr_features.check",
    "sentence_transformers",
]
COMMAND = """
import gc, os; os.setsid()
gc.freeze()  # no collection goes through the libraries' objects, whose memory is the server's
gc.set_threshold(20_000, 20, 100)  # as in conftest.py
import multiprocessing, runpy, sys, torch, types, warnings
warnings.filterwarnings("ignore", message=".*found in sys.modules")  # by runpy: loaded before, for speed
multiprocessing.set_start_method(None, force=True)
os.chdir(folder)
os.environ.clear(), os.environ.update(environment)
if "OMP_NUM_THREADS" in environment:
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
for number, path in ((1, out), (2, err)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
sys.argv, sys.orig_argv = words, [sys.executable, *["-m"] * (words[0] != "-c"), *words]
if words[0] == "-c":
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(words[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
else:
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
"""


@functools.cache
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def begin(
    words: list[str], folder: Path, out: Path, err: Path | None = None, env: Mapping[str, str] = os.environ
) -> ForkServerProcess:
    """Start `python -m words` or `python -c code` in a folder; its output goes to the end of `out` (and `err`)."""
    given = {"words": list(words), "folder": folder, "out": out, "err": err or out, "environment": dict(env)}
    process = server().Process(target=exec, args=(COMMAND, given))
    process.start()
    return process


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(words: list[object], folder: Path = ROOT, env: Mapping[str, str] = os.environ, timeout: float = 600) -> Done:
    """What `subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)` gives.

    Raises: TimeoutError: it has not ended by then; it is killed.
    """
    with tempfile.TemporaryDirectory() as logs:
        out, err = Path(logs, "out"), Path(logs, "err")
        out.touch(), err.touch()
        process = begin(list(map(str, words)), folder, out, err, env)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{words}: still there after {timeout} s\n{err.read_text()}")
        return Done(process.exitcode, out.read_text(), err.read_text())


class Popen:
    """The part of `subprocess.Popen` that the tests of signals use, for a forked command."""

    def __init__(self, words: list[str], folder: Path, log: Path, env: Mapping[str, str] = os.environ) -> None:
        self._words, self._process = words, begin(words, folder, log, env=env)
        assert self._process.pid is not None
        self.pid = self._process.pid
        with contextlib.suppress(ProcessLookupError):  # it has ended
            while os.getpgid(self.pid) != self.pid:  # from then on its group can be killed
                time.sleep(0.001)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._words, timeout or 0)
        return self._process.exitcode
