#!/usr/bin/env bash
# Starts psyche on all workers of the TPU, in sessions that outlive the ssh connection.
#
#   tpu/run.sh [--restart] [--settings FILE] [--dry-run]
#
# Example:  tpu/run.sh --settings tpu/settings.env
#
#   --restart   first stop what runs there (it may write a checkpoint); without it, a running psyche is an error
#
# It continues the run in RUN_DIR if there is one. The log is ~/psyche/log on each worker, copied every minute
# to RUN_DIR/logs/worker-N.log.
# Exit codes: 0 started on every worker, 1 failed, 2 wrong use.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
begin "$@"
RESTART=
case ${REST[*]-} in '') ;; --restart) RESTART=yes ;; *) wrong_use "unknown argument '${REST[*]}'; see --help" ;; esac

require_active
wait_for_workers
PSYCHE=("$VERB" --config "$CONFIG" --set "run.dir=$RUN_DIR")
# Never by itself: four hosts that train apart, each thinking it is alone, would write over one another.
[ "$WORKERS" = 1 ] || PSYCHE+=(--set distributed.initialize=always)
for pair in $OVERRIDES; do PSYCHE+=(--set "$pair"); done

if [ -n "$RESTART" ]; then
  say "stopping what runs"
  on_workers all 'bash psyche/worker.sh stop' || fail_on_workers "cannot stop what runs"
fi
START=(bash psyche/worker.sh start --run-dir "$RUN_DIR" --libtpu "$LIBTPU_FLAGS" -- "${PSYCHE[@]}")
# All at once: JAX waits on every host for all the others.
on_workers all "$(quote "${START[@]}")" >"$TMP/answers" || true
[ -n "$DRY_RUN" ] || cat "$TMP/answers"
absent=$(missing "$TMP/answers")
if [ -z "$DRY_RUN" ] && [ -n "$absent" ]; then
  grep -q 'runs already' "$TMP/answers" && fail "psyche runs already on worker $absent; tpu/run.sh --restart stops it first"
  fail_on_workers "started on $((WORKERS - $(wc -w <<<"$absent"))) of $WORKERS workers, not on $absent (next time with --restart)"
fi

pause 15 # long enough for a wrong config or a missing package to show
on_workers all 'bash psyche/worker.sh alive' >"$TMP/answers" || true
[ -z "$DRY_RUN" ] || exit 0
absent=$(missing "$TMP/answers")
if [ -n "$absent" ]; then
  on_workers "${absent%% *}" 'bash psyche/worker.sh log 15' >&2 || true
  fail "psyche ended at once on worker $absent of $WORKERS; the end of a log is above"
fi
say "psyche $VERB runs on $WORKERS of $WORKERS workers; run: $RUN_DIR; next: tpu/babysit.sh or tpu/logs.sh --follow"
