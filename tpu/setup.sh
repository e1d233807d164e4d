#!/usr/bin/env bash
# Copies the source to all workers of the TPU and installs it there, in ~/psyche.
#
#   tpu/setup.sh [--settings FILE] [--dry-run]
#
# Example:  tpu/setup.sh --settings tpu/settings.env
#
# The source is SOURCE (what git does not ignore, uncommitted changes too) or REPO and BRANCH. Running it again
# copies the source again, and installs the requirements only if requirements.lock changed.
# Exit codes: 0 installed everywhere, 1 failed, 2 wrong use.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
begin "$@"
no_more_arguments

# git's list leaves out .venv, runs and models; tar takes what is on disk, committed or not.
pack_source() {
  export COPYFILE_DISABLE=1 # macOS's tar would add a ._ file for each
  cd "$SOURCE"
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
      tar -czf "$1" --null -T -
  else
    tar -czf "$1" --exclude=.git --exclude=.venv --exclude=runs .
  fi
}

require_active
UPLOAD=$TMP/psyche_upload
mkdir -p "$UPLOAD"
chmod 700 "$UPLOAD"
run cp "$HERE/worker.sh" "$UPLOAD/"
# Empty without ENV_FILE: what an earlier one set on the workers ends.
(umask 077 && printf '%s\n' "$ENVIRONMENT" >"$UPLOAD/env")
INSTALL=(bash psyche_upload/worker.sh install --python "$PYTHON")
if [ -n "$REPO" ]; then
  INSTALL+=(--repo "$REPO" --branch "$BRANCH")
elif [ -n "$DRY_RUN" ]; then
  run tar -czf "$UPLOAD/source.tar.gz" -C "$SOURCE" .
else
  (pack_source "$UPLOAD/source.tar.gz") || fail "cannot pack $SOURCE"
  say "source: $(($(wc -c <"$UPLOAD/source.tar.gz") / 1024)) KiB packed"
fi

wait_for_workers
say "copying to $WORKERS workers"
run gcloud compute tpus tpu-vm scp "$UPLOAD" "$NAME:" "${WHERE[@]}" --worker=all --recurse \
  --scp-flag=-oConnectTimeout=15 </dev/null >"$TMP/out" 2>"$TMP/err" || fail "copying failed: $(last_error)"
say "installing on $WORKERS workers (some minutes the first time)"
on_workers all "$(quote "${INSTALL[@]}")" | tee "$TMP/answers" || true
[ -z "$DRY_RUN" ] || exit 0
absent=$(missing "$TMP/answers")
[ -z "$absent" ] || fail "not installed on worker $absent of $WORKERS: $(last_error)"
say "installed on $WORKERS of $WORKERS workers; next: tpu/run.sh"
