#!/usr/bin/env bash
# Deletes the TPU and its queued resource. The run in the bucket stays.
#
#   tpu/delete.sh [--yes] [--settings FILE] [--dry-run]
#
# Example:  tpu/delete.sh --settings tpu/settings.env --yes
#
#   --yes   do not ask
#
# Exit codes: 0 deleted (or there was none), 1 failed or not confirmed, 2 wrong use.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
begin "$@"
YES=$DRY_RUN
case ${REST[*]-} in '') ;; --yes) YES=yes ;; *) wrong_use "unknown argument '${REST[*]}'; see --help" ;; esac

state=$(queued_state ACTIVE)
[ "$state" != NONE ] || { say "there is no $NAME in $ZONE"; exit 0; }
[ "$state" != UNKNOWN ] || fail "cannot ask about $NAME: $(last_error)"
if [ -z "$YES" ]; then
  printf 'Delete %s (%s, %s) in %s, with its TPU VM and all on its disks? [y/N] ' "$NAME" "$ACCELERATOR" "$state" "$ZONE"
  read -r answer || { say ''; wrong_use "no terminal to ask on; --yes deletes without asking"; }
  [[ $answer =~ ^[Yy]([Ee][Ss])?$ ]] || fail "not deleted"
fi
remove_queued
[ -n "$DRY_RUN" ] || say "deleted $NAME"
