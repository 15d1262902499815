#!/usr/bin/env bash
# ./launch.sh COMMAND ...   sets up a virtual environment on the first call, then runs ehr-msn COMMAND ... in it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() { echo "error: $*" >&2; exit 2; }

# ---- the environment ------------------------------------------------------------------------------------------------
find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3 python3.14 python; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"; return
    fi
  done
  die "Python 3.11 or newer is needed and none was found on the PATH; install one and run the same command again"
}

commands() { # the help, from the source: nothing needs to be installed. `help NAME` fails where there is no such command
  local base
  base=$(find_python)
  PYTHONPATH=$here EHR_MSN_PROGRAM=$EHR_MSN_PROGRAM "$base" -P -m configs "$@"
}

show_progress() { # pip's lines, one over the other on a terminal with the seconds spent, else a dot for each package
  local line width
  width=$(tput cols 2>/dev/null) || width=80
  while IFS= read -r line; do
    line=${line#"${line%%[![:space:]]*}"}
    case $line in
      Collecting* | Downloading* | Building* | Installing*)
        if [[ -t 1 ]]; then printf '\r\033[K  %3d s  %.*s' "$SECONDS" $((width - 10)) "$line"; else printf .; fi ;;
    esac
  done
  echo
}

setup() { # $1: the extras to install, "" or dev
  local extras=$1 active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  if [[ -n $active && $active != "$here/.venv" ]]; then
    python=$active/bin/python
    [[ -x $python ]] || python=$(command -v python) || die "the active environment $active has no python"
    local need=${extras:+pytest}
    "$python" -P - "$here" "${need:-pretrain}" <<'PY' || die "the active environment $active lacks ehr-msn${extras:+ with its extra $extras}.
  Install it there:   $python -m pip install -e '$here${extras:+[$extras]}'
  or deactivate that environment and run the same command: it then makes $here/.venv. Nothing was installed."
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("pretrain")
ours = spec and spec.origin and pathlib.Path(spec.origin).resolve().parents[1] == pathlib.Path(sys.argv[1]).resolve()
sys.exit(not (ours and importlib.util.find_spec(sys.argv[2])))
PY
    return
  fi
  python=$here/.venv/bin/python
  local stamp=$here/.venv/ehr-msn-${extras:-run}.stamp want
  want=$(cksum <"$here/pyproject.toml")
  if [[ -x $python ]]; then
    [[ -f $stamp && $(<"$stamp") == "$want" ]] && return
    # an environment with the extra `dev` serves the commands that need less
    [[ -z $extras && -f $here/.venv/ehr-msn-dev.stamp && $(<"$here/.venv/ehr-msn-dev.stamp") == "$want" ]] && return
  fi
  [[ $extras == dev ]] || commands help "$command" >/dev/null # a mistyped name installs nothing
  if command -v flock >/dev/null; then # two first calls at once: the second waits, then finds the work done
    exec 9>"$here/.setup.lock"
    flock 9
    if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then exec 9>&-; return; fi
  fi
  if [[ ! -x $python ]] || ! "$python" -P -m pip --version >/dev/null 2>&1; then
    local base
    base=$(find_python)
    echo "setting up: a virtual environment in $here/.venv ($("$base" --version))"
    "$base" -P -m venv --clear "$here/.venv" || die "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  echo "setting up: installing ehr-msn${extras:+ with its extra '$extras'} and what it needs with pip into $here/.venv"
  echo "a first time downloads 0.4 GB with a CPU build of torch, or 3 GB with the CUDA"
  echo "build that pip takes on Linux (7 GB on disk): minutes. Later calls skip this."
  local log=$here/.venv/setup.log
  "$python" -P -m pip install --disable-pip-version-check --progress-bar off --editable "$here${extras:+[$extras]}" 2>&1 |
    tee "$log" | show_progress || {
    tail -n 15 "$log" >&2
    die "pip could not install the package (above, and in $log); once that is mended, run the same command again"
  }
  echo "$want" >"$stamp"
  if command -v flock >/dev/null; then exec 9>&-; fi
  echo "setting up: done"
}

pyspark() { # 0.4 GB, for the tests on Spark: only where there is Java, and only into an environment of our own
  command -v java >/dev/null && [[ $python == "$here/.venv/bin/python" ]] || return 0
  "$python" -P -c 'import pyspark' 2>/dev/null && return
  local log=$here/.venv/spark.log
  echo "setting up: Java is there, so pyspark (0.4 GB) is installed too, for the tests on Spark"
  "$python" -P -m pip install --disable-pip-version-check --progress-bar off --retries 2 --editable "$here[spark]" >"$log" 2>&1 ||
    echo "setting up: no pyspark to be had (see $log): the tests on Spark are skipped"
}

tests() {
  cd "$here"
  "$python" -m ruff format --check .
  "$python" -m ruff check .
  "$python" -m codespell_lib
  "$python" -m mypy
  OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist worksteal --durations=10 "$@"
}

command=${1:-help}
EHR_MSN_PROGRAM=$0 # for the `next:` lines
[[ $0 == */* || ! -f $0 ]] || EHR_MSN_PROGRAM=./$0
case $command in
  help | -h | --help) commands "$@" ;;
  test) setup dev; pyspark; tests "${@:2}" ;;
  python) setup ""; exec "$python" "${@:2}" ;;
  *) setup ""; EHR_MSN_PROGRAM=$EHR_MSN_PROGRAM exec "$python" -P -m configs "$@" ;;
esac
