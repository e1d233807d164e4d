#!/usr/bin/env bash
# The part that runs on the TPU's workers; the other scripts copy it there and call it over ssh. Not for use by hand.
#
#   worker.sh install [--python NAME] [--repo URL --branch NAME]
#   worker.sh start --run-dir URL --libtpu FLAGS -- PSYCHE_ARGUMENTS
#   worker.sh stop | alive | log LINES [follow]
#
# Example:  bash psyche/worker.sh log 40
#
# All is in ~/psyche: source/ venv/ log pid exit env. A line "worker N: ok ..." tells the caller that worker N did it.
set -euo pipefail

BASE=$HOME/psyche
UPLOAD=$HOME/psyche_upload
number() { # of this worker; TPU hosts are called ..-w-N
  local name
  name=$(hostname)
  [[ $name =~ -w-([0-9]+)$ ]] && printf '%s' "${BASH_REMATCH[1]}" || printf 0
}
tell() { printf 'worker %s: %s\n' "$(number)" "$*"; }
fail() { tell "error: $*"; exit 1; }
running() { # the number in the pid file may be another process's, after a reboot
  [ -s "$BASE/pid" ] && grep -qs supervise "/proc/$(cat "$BASE/pid")/cmdline"
}

install() {
  local python=python3.11 repo='' branch=main
  while [ $# -gt 0 ]; do
    case $1 in
      --python) python=$2 ;;
      --repo) repo=$2 ;;
      --branch) branch=$2 ;;
      *) fail "unknown argument $1" ;;
    esac
    shift 2
  done
  exec 2>&1
  mkdir -p "$BASE"
  cp "$UPLOAD/worker.sh" "$BASE/worker.sh"
  chmod 600 "$UPLOAD/env"
  mv "$UPLOAD/env" "$BASE/env"
  rm -rf "$BASE/source.new"
  if [ -n "$repo" ]; then
    git clone --quiet --depth 1 --branch "$branch" "$repo" "$BASE/source.new" || fail "cannot clone $repo"
  else
    mkdir "$BASE/source.new"
    tar -xzf "$UPLOAD/source.tar.gz" -C "$BASE/source.new" || fail "cannot unpack the source"
  fi
  rm -rf "$BASE/source"
  mv "$BASE/source.new" "$BASE/source"
  cd "$BASE/source"

  local wanted pip=("$BASE/venv/bin/pip" --quiet --disable-pip-version-check --no-input)
  wanted="$python $(cksum <requirements.lock)"
  if [ "$(cat "$BASE/installed" 2>/dev/null)" != "$wanted" ]; then
    # The images come with Ubuntu's own Python, which may be another, and without venv.
    if ! "$python" -m ensurepip --version >/dev/null 2>&1; then
      tell "installing $python"
      # A new VM updates itself first and holds apt's lock meanwhile.
      local apt=(sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600)
      { "${apt[@]}" update && "${apt[@]}" install -y "$python" "$python-venv"; } >/dev/null ||
        fail "apt has no $python for this image; set PYTHON to one it has, from python3.11 on"
    fi
    rm -rf "$BASE/venv" "$BASE/installed"
    "$python" -m venv "$BASE/venv"
    tell "installing requirements.lock"
    "${pip[@]}" install --require-hashes -r requirements.lock || fail "pip failed on requirements.lock"
    # libtpu is for TPU VMs only and so not in the lock; jax, which is there already, says which libtpu it wants.
    tell "installing jax[tpu]"
    "${pip[@]}" install "jax[tpu]" || fail "pip failed on jax[tpu]"
    printf '%s\n' "$wanted" >"$BASE/installed"
  fi
  "${pip[@]}" install --no-deps --no-build-isolation --editable . || fail "pip failed on the package"
  tell "ok installed"
}

start() {
  local run_dir=$2 libtpu=$4
  shift 5
  if running; then tell "psyche runs already (process $(cat "$BASE/pid"))"; exit 1; fi
  [ -x "$BASE/venv/bin/psyche" ] || fail "psyche is not installed; run tpu/setup.sh"
  rm -f "$BASE/exit"
  # A session of its own (setsid) outlives the ssh connection; its leader's id is the group to signal.
  setsid nohup bash "$BASE/worker.sh" supervise "$run_dir" "$libtpu" "$@" >>"$BASE/log" 2>&1 </dev/null &
  printf '%s\n' $! >"$BASE/pid"
  tell "ok started (process $!)"
}

supervise() {
  local run_dir=$1 libtpu=$2 target copier status=0
  shift 2
  target=$run_dir/logs/worker-$(number).log
  copy_log() { gcloud storage cp "$BASE/log" "$target" --quiet >/dev/null 2>&1 || true; }
  # shellcheck disable=SC1091  # it is on the worker only; tpu/setup.sh made it
  . "$BASE/env"
  export PYTHONUNBUFFERED=1
  # psyche has flags of its own for the TPU compiler where this is not set; set to nothing, there are none.
  case $libtpu in '') ;; none) export LIBTPU_INIT_ARGS= ;; *) export LIBTPU_INIT_ARGS=$libtpu ;; esac
  # Named, a TPU that cannot be used is an error; unnamed, JAX would train on the CPU.
  export JAX_PLATFORMS=tpu,cpu
  printf '=== %s psyche %s\n' "$(date -u +%FT%TZ)" "$*"
  while sleep "${PSYCHE_LOG_SECONDS:-60}"; do copy_log; done 2>/dev/null &
  copier=$!
  # A signal (stop, or the VM being taken away) goes to the whole group: psyche writes its checkpoint,
  # and this shell has to outlive it, for its exit code and the last copy of the log.
  trap : TERM INT HUP
  cd "$BASE/source"
  "$BASE/venv/bin/psyche" "$@" || status=$?
  kill "$copier" 2>/dev/null || true
  printf '%s\n' "$status" >"$BASE/exit"
  printf '=== %s psyche ended with exit code %s\n' "$(date -u +%FT%TZ)" "$status"
  copy_log
}

stop() {
  local pid seconds=0
  if running; then
    pid=$(cat "$BASE/pid")
    kill -TERM -- "-$pid" 2>/dev/null || true
    # A checkpoint of 7B parameters takes a while to reach the bucket.
    while running && [ "$seconds" -lt "${PSYCHE_STOP_SECONDS:-300}" ]; do sleep 1; seconds=$((seconds + 1)); done
    if running; then kill -KILL -- "-$pid" 2>/dev/null || true; fi
  fi
  rm -f "$BASE/pid"
  tell "ok stopped"
}

alive() {
  if running; then tell "ok runs"; else tell "does not run (exit code $(cat "$BASE/exit" 2>/dev/null || echo unknown))"; fi
}

show_log() {
  local n
  n=$(number)
  [ -f "$BASE/log" ] || fail "no log yet"
  if [ "${2-}" = follow ]; then exec tail -n "$1" -F "$BASE/log"; fi
  tail -n "$1" "$BASE/log" | sed "s/^/[worker $n] /"
}

case ${1-} in
  install | start | supervise | stop | alive) "$@" ;;
  log) shift; show_log "$@" ;;
  -h | --help) awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0" ;;
  *) printf 'worker.sh: error: see --help\n' >&2; exit 2 ;;
esac
