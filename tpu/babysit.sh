#!/usr/bin/env bash
# Watches the run until it is done, and brings back what breaks: the TPU after a preemption, the processes after a crash.
#
#   tpu/babysit.sh [--delete-when-done] [--settings FILE] [--dry-run]
#
# Example:  tpu/babysit.sh --settings tpu/settings.env --delete-when-done
#
#   --delete-when-done   delete the TPU once the run is done, so that it is not billed any longer
#
# Works from nothing too: it creates the TPU, installs and starts. Ctrl-C ends the watching, not the run.
# Exit codes: 0 the run is done, 1 it failed or MAX_FAILURES recoveries in a row brought no new step, 2 wrong use.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
begin "$@"
DELETE=
case ${REST[*]-} in '') ;; --delete-when-done) DELETE=yes ;; *) wrong_use "unknown argument '${REST[*]}'; see --help" ;; esac

QUIET_LOOKS=5 # so many looks without a new step, and we ask the workers if they are alive
BLIND_LOOKS=30 # so many looks in a row without an answer from gcloud, and we stop
best=-1 quiet=0 blind=0 failures=0

# The same way back for every trouble: each script does only what is still missing.
recover() {
  failures=$((failures + 1))
  [ "$failures" -le "$MAX_FAILURES" ] ||
    fail "gave up: $MAX_FAILURES recoveries in a row without a step after $best; last trouble: $1"
  say "$1; recovery $failures of at most $MAX_FAILURES without progress"
  [ "$failures" = 1 ] || back_off "$((failures - 1))" 60 1800
  quiet=0
  # Twice on the same TPU; if that does not help, the machine may be what is broken.
  [ "$failures" -le 2 ] || "$HERE/delete.sh" --yes "${COMMON[@]}" || { say "cannot delete the TPU"; return 0; }
  if "$HERE/create.sh" "${COMMON[@]}" && "$HERE/setup.sh" "${COMMON[@]}" && "$HERE/run.sh" --restart "${COMMON[@]}"
  then say "recovery $failures: started"
  else say "recovery $failures did not work"; fi
}

all_alive() {
  WORKERS=$(node 'networkEndpoints.len()' "$EXPECTED")
  [[ $WORKERS =~ ^[1-9][0-9]*$ ]] || return 1
  on_workers all 'bash psyche/worker.sh alive' >"$TMP/answers" || true
  [ -z "$(missing "$TMP/answers")" ]
}

while :; do
  read_run_state
  tpu=$(queued_state ACTIVE)
  if [ -n "$DRY_RUN" ]; then recover "dry run: what a recovery does"; exit 0; fi

  if [ "$RUN_STATUS" = unknown ] || [ "$tpu" = UNKNOWN ]; then
    blind=$((blind + 1))
    why=$([ "$tpu" = UNKNOWN ] && last_error || printf '%s' "$RUN_DIR/state.json: $RUN_ERROR")
    [ "$blind" -lt "$BLIND_LOOKS" ] || fail "gave up: no answer $BLIND_LOOKS times in a row: $why"
    say "no answer ($why); looking again"
    pause 60
    continue
  fi
  blind=0 quiet=$((quiet + 1))
  if [ "$RUN_STEP" -gt "$best" ]; then
    say "step $RUN_STEP ($RUN_STATUS)"
    best=$RUN_STEP quiet=0 failures=0
  fi

  case $RUN_STATUS in
    done)
      say "the run is done at step $RUN_STEP: $RUN_DIR"
      if [ -n "$DELETE" ]; then "$HERE/delete.sh" --yes "${COMMON[@]}"
      elif [ "$tpu" != NONE ]; then say "the TPU is still billed; tpu/delete.sh ends that"; fi
      exit 0 ;;
    # Our mistake, not the TPU's: the same would happen again.
    failed) fail "the run failed at step $RUN_STEP: ${RUN_REASON:-no reason given}; see tpu/logs.sh. The TPU is still billed" ;;
  esac

  node_state=
  [ "$tpu" != ACTIVE ] || node_state=$(node state READY)
  if [ "$tpu" != ACTIVE ]; then
    recover "the TPU is $tpu"
  elif [[ $node_state =~ ^(PREEMPTED|TERMINATED)$ ]]; then
    # The queued resource follows a little later; create.sh would still call it ACTIVE.
    "$HERE/delete.sh" --yes "${COMMON[@]}" || true
    recover "the TPU VM is $node_state"
  elif [ "$RUN_STATUS" != running ] || [ "$quiet" -ge "$QUIET_LOOKS" ]; then
    if all_alive; then quiet=0; else recover "psyche does not run on every worker"; fi
  fi
  pause 120
done
