#!/usr/bin/env bash
# Says how the TPU is and how the run is.
#
#   tpu/status.sh [--settings FILE] [--dry-run]
#
# Example:  tpu/status.sh --settings tpu/settings.env
#
# Exit codes: 0 said, 1 gcloud could not tell, 2 wrong use.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
begin "$@"
no_more_arguments

state=$(queued_state ACTIVE)
tpu_error=$(last_error)
detail=
[ "$state" != ACTIVE ] || detail=$(node 'state,health,networkEndpoints.len()' 'READY' | tr '\t' ' ')
read_run_state
[ -z "$DRY_RUN" ] || exit 0
say "tpu  $state${detail:+ ($detail workers)}  $NAME $ACCELERATOR $CAPACITY $ZONE"
say "run  $RUN_STATUS$([ "$RUN_STEP" = -1 ] || printf ' at step %s' "$RUN_STEP")${RUN_REASON:+ ($RUN_REASON)}  $RUN_DIR"
case $state/$RUN_STATUS in
  UNKNOWN/*) fail "cannot ask about $NAME: $tpu_error" ;;
  */unknown) fail "cannot read $RUN_DIR/state.json: $RUN_ERROR" ;;
  */done | */failed) [ "$state" = NONE ] || say "hint: the run has ended and the TPU is still billed; tpu/delete.sh" ;;
  ACTIVE/none) say "hint: nothing has run yet; tpu/setup.sh, then tpu/run.sh" ;;
  ACTIVE/*) ;;
  */running | */preempted) say "hint: the run is not over and its TPU is not there; tpu/babysit.sh brings both back" ;;
esac
