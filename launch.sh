#!/usr/bin/env bash
# ./launch.sh COMMAND ...   sets up a virtual environment on the first call, then starts the command's processes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'TEXT'
EHR-MSN: raw MIMIC tables and films -> features -> EHR-conditioned MSN -> encoder -> probe / ICU fusion -> report

  ./launch.sh demo [OUT]                       raw synthetic tables to report.html, on two CPU cores
  ./launch.sh test                             lint, types and all tests
  ./launch.sh features  CONFIG [key=value ...] raw tables -> features/     (also: check, audit, notes)
  ./launch.sh images    CONFIG [key=value ...] films -> store/
  ./launch.sh pretrain  CONFIG [key=value ...] features/ + store/ -> runs/X/encoder/     (also: export)
  ./launch.sh probe     CONFIG [key=value ...] encoder/ -> linear evaluation
  ./launch.sh fuse      CONFIG [key=value ...] encoder/ + features/ -> ICU fusion
  ./launch.sh grid      CONFIG [key=value ...] all combinations of some choices -> pretrain, probe, fuse
  ./launch.sh report    RUN [RUN ...] [--out FILE]     (also: runs, score, compare, embed, nearest)

  ./launch.sh COMMAND --help                   one command's options
  pretrain, probe, fuse take --processes N (on each machine) --machines M --machine-rank I --main-address HOST[:PORT]
  or --accelerate-config FILE; under SLURM (one task a machine) all of these are derived.
TEXT
}

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

show_progress() { # pip's lines, one over the other on a terminal, else a dot for each package
  local line
  while IFS= read -r line; do
    line=${line#"${line%%[![:space:]]*}"}
    case $line in
      Collecting* | Downloading* | Building* | Installing*) if [[ -t 1 ]]; then printf '\r\033[K  %.100s' "$line"; else printf .; fi ;;
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
    "$python" - "$here" "${need:-pretrain}" <<'PY' || die "the active environment $active lacks ehr-msn${extras:+ with its extra $extras}.
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
  if command -v flock >/dev/null; then # two first calls at once: the second waits, then finds the work done
    exec 9>"$here/.setup.lock"
    flock 9
    if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then exec 9>&-; return; fi
  fi
  if [[ ! -x $python ]] || ! "$python" -m pip --version >/dev/null 2>&1; then
    local base
    base=$(find_python)
    echo "setting up: a virtual environment in $here/.venv ($("$base" --version))"
    "$base" -m venv --clear "$here/.venv" || die "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  echo "setting up: installing ehr-msn${extras:+ with its extra '$extras'} and what it needs with pip into $here/.venv"
  echo "            a first time downloads about 0.4 GB with a CPU build of torch, about 3 GB with the CUDA build that pip"
  echo "            takes on Linux (7 GB on disk); minutes on a fast line. Later calls skip this."
  local log=$here/.venv/setup.log
  "$python" -m pip install --disable-pip-version-check --progress-bar off --editable "$here${extras:+[$extras]}" 2>&1 |
    tee "$log" | show_progress || {
    tail -n 15 "$log" >&2
    die "pip could not install the package (above, and in $log); once that is mended, run the same command again"
  }
  echo "$want" >"$stamp"
  if command -v flock >/dev/null; then exec 9>&-; fi
  echo "setting up: done"
}

# ---- the processes --------------------------------------------------------------------------------------------------
distributed() { # MODULE SUBCOMMAND ARGS...: plain python for one process, configs.launch for several
  local processes= machines= rank= address= file= words=("$@") i
  for ((i = 2; i < ${#words[@]}; i++)); do
    local word=${words[i]} value=${words[i + 1]-}
    [[ $word == --*=* ]] && { value=${word#*=}; word=${word%%=*}; }
    case $word in
      --processes) processes=$value ;;
      --machines) machines=$value ;;
      --machine-rank) rank=$value ;;
      --main-address) address=$value ;;
      --accelerate-config) file=$value ;;
      -h | --help | --print-config) exec "$python" -m "$@" ;;
    esac
  done
  for word in "$processes" "$machines" "$rank"; do
    [[ $word =~ ^[0-9]*$ ]] || die "--processes, --machines and --machine-rank take whole numbers, got '$word'"
  done
  if [[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_STEP_ID:-} ]]; then # inside srun, one task a machine
    [[ ${SLURM_NTASKS:-1} == "${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}" ]] ||
      die "SLURM started ${SLURM_NTASKS:-1} tasks on ${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}} machines; use --ntasks-per-node=1, launch.sh starts a process a GPU itself"
    rank=${rank:-${SLURM_NODEID:-0}}
    if [[ -z $file ]]; then
      machines=${machines:-${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}} processes=${processes:-${SLURM_GPUS_ON_NODE:-1}}
    fi
    if [[ -z $address && ${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}} -gt 1 ]]; then
      address=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}") # its first line; `| head` would break the pipe
      address=${address%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))
    fi
  fi
  if [[ -n $file ]]; then # what stands in the file; flags go before
    exec "$python" -m configs.launch --accelerate-config "$file" ${processes:+--processes "$processes"} \
      ${machines:+--machines "$machines"} ${rank:+--machine-rank "$rank"} ${address:+--main-address "$address"} -- "$@"
  fi
  processes=${processes:-1} machines=${machines:-1} rank=${rank:-0}
  if ((processes == 1 && machines == 1)); then exec "$python" -m "$@"; fi
  local told=()
  [[ " $* " == *" --processes"* ]] || told+=(--processes "$processes")
  [[ " $* " == *" --machines"* ]] || told+=(--machines "$machines")
  exec "$python" -m configs.launch --processes "$processes" --machines "$machines" --machine-rank "$rank" \
    ${address:+--main-address "$address"} -- "$@" ${told[@]+"${told[@]}"}
}

tests() {
  cd "$here"
  "$python" -m ruff format --check . && "$python" -m ruff check . && "$python" -m mypy
  OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --durations=10 "$@"
}

command=${1:-help}
shift || true
case $command in
  help | -h | --help) usage ;;
  demo) setup ""; exec "$python" -m finetune demo "$@" ;;
  test) setup dev; tests "$@" ;;
  features)
    setup ""
    case ${1:-} in check | audit | notes) exec "$python" -m ehr_features "$@" ;; esac
    exec "$python" -m ehr_features build "$@" ;;
  check | audit | notes) setup ""; exec "$python" -m ehr_features "$command" "$@" ;;
  images) setup ""; exec "$python" -m pretrain images "$@" ;;
  export) setup ""; exec "$python" -m pretrain export "$@" ;;
  pretrain) setup ""; distributed pretrain train "$@" ;;
  probe | fuse) setup ""; distributed finetune "$command" "$@" ;;
  grid | report | runs | score | compare | embed | nearest) setup ""; exec "$python" -m finetune "$command" "$@" ;;
  *) usage >&2; die "unknown command '$command'" ;;
esac
