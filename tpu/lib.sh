# Shared by the scripts in tpu/; sourced, not run. Written for bash 3.2 too (macOS).
# shellcheck shell=bash disable=SC2034  # the sourcing scripts use what is set here
set -euf -o pipefail # no globbing (-f): OVERRIDES is split at spaces, and may hold a * or [

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
ME=$(basename "$0")

# What is known of each accelerator, in one place:
# prefix    default zone   runtime version      a slice up to .. is one host, a larger one has a host for each ..
ACCELERATORS='
v5litepod   us-west4-a     v2-alpha-tpuv5-lite  8  4
v6e         us-east5-b     v2-alpha-tpuv6e      8  4
v5p         us-east5-a     v2-alpha-tpuv5       8  8
v4          us-central2-b  tpu-ubuntu2204-base  8  8
'
KEYS=' PROJECT NAME ACCELERATOR CAPACITY BUCKET VERB CONFIG ZONE RUNTIME_VERSION RUN_DIR OVERRIDES SOURCE REPO
 BRANCH ENV_FILE SERVICE_ACCOUNT LIBTPU_FLAGS PYTHON MAX_FAILURES '

# In a dry run what is said is a comment between the commands.
say() { printf '%s%s\n' "${DRY_RUN:+# }" "$*"; }
fail() { printf '%s: error: %s\n' "$ME" "$*" >&2; exit 1; }
wrong_use() { printf '%s: error: %s\n' "$ME" "$*" >&2; exit 2; }

# The comment at the top of a script is its help.
help() { awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^# shellcheck/ { sub(/^# ?/, ""); print }' "$0"; }

# begin ARGUMENTS: the common options, the settings, and a look at gcloud. What is left over goes to REST.
begin() {
  SETTINGS=$HERE/settings.env DRY_RUN='' REST=()
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) help; exit 0 ;;
      --dry-run) DRY_RUN=yes ;;
      --settings) [ $# -gt 1 ] || wrong_use "--settings needs a file"; SETTINGS=$2; shift ;;
      --settings=*) SETTINGS=${1#*=} ;;
      *) REST+=("$1") ;;
    esac
    shift
  done
  TMP=$(mktemp -d)
  trap 'rm -rf "$TMP"' EXIT
  : >"$TMP/err"
  exec 3>&1 # dry-run lines reach the user from inside $(...) too
  read_settings
  check_settings
  COMMON=(--settings "$SETTINGS")
  [ -z "$DRY_RUN" ] || COMMON+=(--dry-run)
  WHERE=(--project="$PROJECT" --zone="$ZONE" --quiet)
  check_gcloud
}

no_more_arguments() { [ ${#REST[@]} -eq 0 ] || wrong_use "unknown argument '${REST[0]}'; see --help"; }

# parse LINE: sets key and value of a line KEY=value, which is never executed; of an empty line or a comment, both empty.
parse() {
  local line=${1%$'\r'} quoted='^("([^"]*)"|'"'([^']*)'"')[[:space:]]*([[:space:]]#.*)?$'
  key='' value=''
  [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && return 0
  [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || return 1
  key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
  if [[ $value =~ $quoted ]]; then
    value=${BASH_REMATCH[2]}${BASH_REMATCH[3]}
  else
    value=${value%%[[:space:]]#*}
    value=${value%"${value##*[![:space:]]}"}
  fi
}

read_settings() {
  { [ -r "$SETTINGS" ] && [ ! -d "$SETTINGS" ]; } ||
    wrong_use "no settings at $SETTINGS; copy tpu/settings.env.example and edit it"
  local line key value number=0 seen=' '
  for key in $KEYS; do printf -v "$key" ''; done
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    parse "$line" || wrong_use "$SETTINGS line $number is not KEY=value"
    [ -n "$key" ] || continue
    [[ $KEYS =~ [[:space:]]${key}[[:space:]] ]] || wrong_use "$SETTINGS line $number: unknown setting $key"
    [[ $seen != *" $key "* ]] || wrong_use "$SETTINGS line $number: $key stands twice; keep one"
    seen="$seen$key "
    printf -v "$key" '%s' "$value"
  done <"$SETTINGS"
}

# What ENV_FILE sets, as commands for the worker's shell. A line that is none is named by its number: it may be a secret.
environment() {
  local line key value number=0
  [ -n "$ENV_FILE" ] || return 0
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    parse "${line#export }" || wrong_use "$ENV_FILE line $number is not KEY=value"
    [ -z "$key" ] || printf 'export %s\n' "$(quote "$key=$value")"
  done <"$ENV_FILE"
}

# need KEY PATTERN WHAT: KEY's value matches PATTERN, or one line says what belongs there.
need() {
  local value=${!1}
  [ -n "$value" ] || wrong_use "$SETTINGS: $1 is missing; it is $3"
  [[ $value =~ ^($2)$ ]] || wrong_use "$SETTINGS: $1 is malformed; it is $3"
}

check_settings() {
  local pair prefix zone runtime one_host per_host size
  need PROJECT '[a-z0-9.:-]+' "a project id, such as my-gcp-project"
  need NAME '[a-z]([a-z0-9-]{0,61}[a-z0-9])?' "lower-case letters, digits and hyphens, starting with a letter"
  need ACCELERATOR '(v5litepod|v6e|v5p|v4)-[1-9][0-9]{0,5}' "v5litepod-N, v6e-N, v5p-N or v4-N"
  while read -r prefix zone runtime one_host per_host; do
    # shellcheck disable=SC2153  # ACCELERATOR is a setting, ACCELERATORS the table
    [ "$prefix" = "${ACCELERATOR%-*}" ] || continue
    : "${ZONE:=$zone}" "${RUNTIME_VERSION:=$runtime}"
    size=${ACCELERATOR##*-} EXPECTED=1
    [ "$size" -le "$one_host" ] || EXPECTED=$(((size + per_host - 1) / per_host))
  done <<<"$ACCELERATORS"
  : "${CAPACITY:=spot}" "${BRANCH:=main}" "${PYTHON:=python3.11}" "${MAX_FAILURES:=5}"
  need ZONE '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' "a zone, such as us-west4-a"
  need RUNTIME_VERSION '[a-z0-9.-]+' "a TPU software version, such as v2-alpha-tpuv5-lite"
  need CAPACITY 'spot|on-demand|reserved' "spot, on-demand or reserved"
  need BUCKET 'gs://[a-z0-9][a-z0-9._-]+/?' "a bucket, such as gs://my-bucket"
  : "${RUN_DIR:=${BUCKET%/}/runs/$NAME}"
  RUN_DIR=${RUN_DIR%/}
  need RUN_DIR 'gs://[a-z0-9][a-z0-9._-]+/[A-Za-z0-9._/=-]+' "a folder in a bucket, such as gs://my-bucket/runs/first"
  need VERB 'sft|grpo' "sft or grpo"
  need CONFIG '[A-Za-z0-9._/-]+\.ya?ml' "a YAML file, relative to the source's root"
  need PYTHON 'python3(\.[0-9]+)?' "the name of a Python, such as python3.11"
  need MAX_FAILURES '[1-9][0-9]{0,5}' "a number from 1"
  for pair in $OVERRIDES; do
    [[ $pair =~ ^[a-z0-9_.]+=.+$ ]] || wrong_use "$SETTINGS: OVERRIDES is malformed; it is a.b=c pairs separated by spaces"
    [ "${pair%%=*}" != run.dir ] || wrong_use "$SETTINGS: OVERRIDES sets run.dir; RUN_DIR is the setting for that"
  done
  if [ -n "$REPO" ]; then
    [ -z "$SOURCE" ] || wrong_use "$SETTINGS: set SOURCE or REPO, not both"
    # No user:token@ in the address: it would stand in process lists and logs.
    need REPO 'https://[^@[:space:]]+' "a public https:// address without a password; for a private one use SOURCE"
    need BRANCH '[A-Za-z0-9._/-]+' "a branch or tag"
  else
    SOURCE=${SOURCE/#\~/$HOME}
    SOURCE=$(cd "$ROOT" && cd "${SOURCE:-.}" 2>/dev/null && pwd) || wrong_use "$SETTINGS: SOURCE is not a folder"
    [ -f "$SOURCE/$CONFIG" ] || wrong_use "$SETTINGS: CONFIG: no file $SOURCE/$CONFIG"
    if [[ /$CONFIG == */../* ]] || git -C "$SOURCE" check-ignore -q -- "$CONFIG" 2>/dev/null; then
      wrong_use "$SETTINGS: CONFIG: $CONFIG is outside the source or ignored by git, and would not be copied"
    fi
  fi
  [ -z "$SERVICE_ACCOUNT" ] || need SERVICE_ACCOUNT '[^@[:space:]]+@[^@[:space:]]+' "an e-mail address"
  case ${ENV_FILE:=} in '' | /*) ;; '~'*) ENV_FILE=$HOME${ENV_FILE#?} ;; *) ENV_FILE=$ROOT/$ENV_FILE ;; esac
  [ -z "$ENV_FILE" ] || { [ -r "$ENV_FILE" ] && [ ! -d "$ENV_FILE" ]; } ||
    wrong_use "$SETTINGS: ENV_FILE: no file $ENV_FILE"
  ENVIRONMENT=$(environment)
}

check_gcloud() {
  local account
  [ -z "$DRY_RUN" ] || return 0
  command -v gcloud >/dev/null || fail "gcloud is missing; install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
  account=$(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>"$TMP/err") ||
    fail "gcloud does not work: $(last_error)"
  [ -n "$account" ] || fail "gcloud is not logged in; run: gcloud auth login"
}

# --- running commands ---------------------------------------------------------------------------

# Arguments as a shell would need them, in single quotes where there is need of any.
quote() {
  local word flag out='' safe='^[A-Za-z0-9_./:=@%+,-]+$' mark="'" escaped="'\\''"
  for word in "$@"; do
    flag=''
    if [[ $word =~ ^--[a-z-]+= ]]; then flag=${BASH_REMATCH[0]} word=${word#*=}; fi
    [[ $word =~ $safe ]] || word="'${word//$mark/$escaped}'"
    out="$out $flag$word"
  done
  printf '%s' "${out# }"
}
run() { if [ -n "$DRY_RUN" ]; then printf '+ %s\n' "$(quote "$@")" >&3; else "$@"; fi; }
# ask DEFAULT COMMAND...: the command's answer, its errors in $TMP/err; in a dry run DEFAULT.
ask() {
  local default=$1; shift
  if [ -n "$DRY_RUN" ]; then run "$@"; printf '%s\n' "$default"; else "$@" 2>"$TMP/err"; fi
}
# What the last command complained of, in one line.
last_error() {
  local line
  line=$({ grep '^ERROR' "$TMP/err" || grep -v '^[[:space:]]*$' "$TMP/err" || true; } | tail -n 1)
  line=${line#ERROR: }
  printf '%.400s' "${line:-no reason given}"
}
complained_of() { grep -qiE "$1" "$TMP/err"; }
pause() { [ -n "$DRY_RUN" ] || sleep "${PSYCHE_TPU_POLL_SECONDS:-$1}"; }
# back_off TRY FIRST MOST: waits FIRST seconds, then twice that, and so on up to MOST.
back_off() { local s=$(($2 << ($1 > 10 ? 10 : $1 - 1))); pause $((s < $3 ? s : $3)); }

# --- the TPU ------------------------------------------------------------------------------------

# queued_state DRY_RUN_ANSWER: the queued resource's state, NONE if there is none, UNKNOWN if gcloud cannot tell.
queued_state() {
  local state
  if state=$(ask "$1" gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)'); then
    echo "${state:-UNKNOWN}"
  elif complained_of 'NOT_FOUND|was not found'; then echo NONE
  else echo UNKNOWN; fi
}
# node FIELD: a field of the TPU VM itself, empty if there is none.
node() { ask "$2" gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" --format="value($1)" || true; }

require_active() {
  local state
  state=$(queued_state ACTIVE)
  case $state in
    ACTIVE) ;;
    NONE) fail "there is no TPU called $NAME in $ZONE; run tpu/create.sh" ;;
    UNKNOWN) fail "cannot ask about $NAME: $(last_error)" ;;
    *) fail "the TPU $NAME is $state, not ACTIVE; run tpu/create.sh (or tpu/babysit.sh, which does it all)" ;;
  esac
}

# Deletes the queued resource and its TPU VM, and waits until the name is free.
remove_queued() {
  local try state
  say "deleting $NAME"
  for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    state=$(queued_state ACTIVE)
    [ "$state" != NONE ] || return 0
    # Refused while it is still SUSPENDING: hence the loop.
    [ "$state" = DELETING ] || run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force 2>"$TMP/err" || true
    [ -z "$DRY_RUN" ] || return 0
    pause 15
  done
  fail "$NAME is still $state after $try attempts to delete it: $(last_error)"
}

# on_workers N|all COMMAND: over ssh. gcloud itself tries ten times to connect; its chatter goes to $TMP/err.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$1" \
    --ssh-flag=-oConnectTimeout=15 --ssh-flag=-oServerAliveInterval=30 --command="$2" </dev/null 2>"$TMP/err"
}
# missing FILE: the workers without a line "worker N: ok" in FILE, separated by spaces.
missing() {
  local n out=''
  for ((n = 0; n < WORKERS; n++)); do grep -q "^worker $n: ok" "$1" || out="$out $n"; done
  printf '%s' "${out# }"
}

# Says why a command on the workers failed, and ends.
fail_on_workers() {
  complained_of 'psyche/worker.sh: No such file' && fail "nothing is installed on the TPU yet; run tpu/setup.sh"
  fail "$1: $(last_error)"
}

# Waits until every worker answers: a new VM needs a while before sshd is up and the key has arrived.
# Sets WORKERS. Nothing may start on some of the hosts only: the others would wait for them until the time-out.
wait_for_workers() {
  # shellcheck disable=SC2016  # the worker's shell expands it; TPU hosts are called ..-w-0, ..-w-1 and so on
  local try absent='' hello='echo worker $(hostname | sed s/.*-w-//): ok'
  WORKERS=$(node 'networkEndpoints.len()' "$EXPECTED")
  [[ $WORKERS =~ ^[1-9][0-9]*$ ]] || fail "the TPU VM $NAME lists no workers: $(last_error)"
  [ "$WORKERS" = "$EXPECTED" ] || say "note: $ACCELERATOR was expected to have $EXPECTED workers, $NAME has $WORKERS"
  [ "$WORKERS" != 1 ] || hello='echo worker 0: ok'
  for try in 1 2 3 4 5 6; do
    on_workers all "$hello" >"$TMP/answers" || true
    [ -z "$DRY_RUN" ] || return 0
    absent=$(missing "$TMP/answers")
    [ -n "$absent" ] || { say "$WORKERS of $WORKERS workers answer"; return 0; }
    complained_of 'SSH agent' && fail "$(last_error)"
    complained_of 'terminal state|PREEMPTED|TERMINATED' && fail "the TPU $NAME was taken away; run tpu/create.sh"
    [ "$try" = 6 ] || { say "no answer yet from worker $absent (of $WORKERS); trying again"; back_off "$try" 10 120; }
  done
  fail "worker $absent of $WORKERS does not answer over ssh: $(last_error); see docs/tpu.md, \"A worker does not answer\""
}

# --- the run ------------------------------------------------------------------------------------

# Sets RUN_STATUS (of state.json; none before the first start, unknown if it cannot be read: RUN_ERROR), RUN_STEP, RUN_REASON.
read_run_state() {
  local json
  RUN_STATUS=unknown RUN_STEP=-1 RUN_REASON='' RUN_ERROR="there is no status in it"
  if json=$(ask '{"status": "running", "step": 0}' gcloud storage cat "$RUN_DIR/state.json" --quiet); then
    json=$(printf '%s' "$json" | tr '\n' ' ')
    RUN_STATUS=$(printf '%s\n' "$json" | sed -nE 's/.*"status"[[:space:]]*:[[:space:]]*"([a-z]+)".*/\1/p')
    RUN_STEP=$(printf '%s\n' "$json" | sed -nE 's/.*"step"[[:space:]]*:[[:space:]]*([0-9]+).*/\1/p')
    RUN_REASON=$(printf '%s\n' "$json" | sed -nE 's/.*"reason"[[:space:]]*:[[:space:]]*"(([^"\\]|\\.)*)".*/\1/p')
    : "${RUN_STATUS:=unknown}" "${RUN_STEP:=-1}"
  elif complained_of 'matched no objects'; then RUN_STATUS=none
  else RUN_ERROR=$(last_error); fi
}
