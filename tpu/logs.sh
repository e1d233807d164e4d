#!/usr/bin/env bash
# Shows the end of the log of one worker, or of all.
#
#   tpu/logs.sh [--worker N|all] [--lines N] [--follow] [--bucket] [--settings FILE] [--dry-run]
#
# Example:  tpu/logs.sh --worker all --lines 20
#
#   --worker    0 by default
#   --lines     40 by default
#   --follow    go on showing new lines (of one worker); Ctrl-C ends it, not the run
#   --bucket    the copy in RUN_DIR/logs, which is there after the TPU is gone
#
# Exit codes: 0 shown, 1 failed, 2 wrong use.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
begin "$@"
WORKER=0 LINES_SHOWN=40 FOLLOW='' BUCKET_COPY=''
set -- ${REST[@]+"${REST[@]}"}
while [ $# -gt 0 ]; do
  case $1 in
    --worker) WORKER=${2-}; shift ;;
    --lines) LINES_SHOWN=${2-}; shift ;;
    --follow | -f) FOLLOW=yes ;;
    --bucket) BUCKET_COPY=yes ;;
    *) wrong_use "unknown argument '$1'; see --help" ;;
  esac
  shift || true
done
[[ $WORKER =~ ^([0-9]+|all)$ ]] || wrong_use "--worker is a number from 0, or all"
[[ $LINES_SHOWN =~ ^[1-9][0-9]{0,8}$ ]] || wrong_use "--lines is a number from 1"
[ -z "$FOLLOW" ] || [ "$WORKER" != all ] || wrong_use "--follow shows one worker, not all"
[ -z "$FOLLOW" ] || [ -z "$BUCKET_COPY" ] || wrong_use "--follow reads on the worker; --bucket shows the copy as it is"

if [ -n "$BUCKET_COPY" ]; then
  [ "$WORKER" != all ] || WORKER='*'
  ask '' gcloud storage cat "$RUN_DIR/logs/worker-$WORKER.log" --display-url --quiet >"$TMP/out" ||
    fail "no log in the bucket: $(last_error)"
  # The end of each worker's log, under its address.
  awk -v most="$LINES_SHOWN" '
    function show(  i) { for (i = n > most ? n - most : 0; i < n; i++) print kept[i % most]; n = 0 }
    /^==> gs:.* <==$/ { show(); print; next }
    { kept[n++ % most] = $0 }
    END { show() }' "$TMP/out"
else
  require_active
  on_workers "$WORKER" "bash psyche/worker.sh log $LINES_SHOWN${FOLLOW:+ follow}" ||
    fail_on_workers "cannot read the log (--bucket shows the copy in $RUN_DIR/logs)"
fi
