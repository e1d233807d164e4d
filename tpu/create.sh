#!/usr/bin/env bash
# Asks for the TPU (as a queued resource) and waits until it is ACTIVE.
#
#   tpu/create.sh [--settings FILE] [--dry-run]
#
# Example:  tpu/create.sh --settings tpu/settings.env
#
# A queued resource that failed or was preempted is deleted first: it keeps the name, and its quota too.
# Ctrl-C leaves the request in the queue; running this again goes on waiting for it.
# Exit codes: 0 ACTIVE, 1 failed (quota, no capacity after 5 attempts, ...), 2 wrong use.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
begin "$@"
no_more_arguments
TRIES=5
BLIND_LOOKS=40 # so many looks in a row without an answer from gcloud (ten minutes), and we stop

request() {
  local flags=()
  case $CAPACITY in spot) flags+=(--spot) ;; reserved) flags+=(--reserved) ;; esac
  [ -z "$SERVICE_ACCOUNT" ] || flags+=(--service-account="$SERVICE_ACCOUNT")
  say "asking for $ACCELERATOR ($CAPACITY) in $ZONE as $NAME"
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${WHERE[@]}" --async \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME_VERSION" ${flags[@]+"${flags[@]}"} 2>"$TMP/err"
}

out_of_quota() {
  fail "out of quota: $1 (failed and suspended queued resources count too: gcloud compute tpus queued-resources list --project=$PROJECT --zone=$ZONE)"
}

# 0 once ACTIVE, 1 when this request is dead (REASON says why); prints each new state, and a line every 20 looks.
wait_until_active() {
  local state last='' looks=0 gone=0 blind=0 start=$SECONDS
  while :; do
    state=$(queued_state ACTIVE)
    if [ "$state" != "$last" ] || [ $((looks % 20)) = 0 ]; then say "$NAME: $state ($(((SECONDS - start) / 60)) min)"; fi
    [ "$state" = UNKNOWN ] || blind=0
    case $state in
      ACTIVE) return 0 ;;
      UNKNOWN)
        blind=$((blind + 1))
        [ "$blind" -lt "$BLIND_LOOKS" ] ||
          fail "no answer about $NAME $blind times in a row: $(last_error); the request stays: run this again" ;;
      FAILED)
        REASON=$(ask '' gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
          --format='value(state.failedData.error.message)' | tr '\n' ' ') || REASON=
        REASON="FAILED: ${REASON:-no reason given}"
        [[ $REASON =~ [Qq]uota ]] && out_of_quota "$REASON"
        return 1 ;;
      SUSPENDING | SUSPENDED) REASON="preempted while it was being created"; return 1 ;;
      # Right after the request it may not be listed yet.
      NONE) gone=$((gone + 1)); REASON="the request disappeared"; [ $gone -lt 10 ] || return 1 ;;
    esac
    last=$state looks=$((looks + 1))
    pause 15
  done
}

for ((try = 1; try <= TRIES; try++)); do
  REASON=''
  state=$(queued_state NONE)
  case $state in
    ACTIVE) say "$NAME is ACTIVE already"; exit 0 ;;
    UNKNOWN) fail "cannot ask about $NAME: $(last_error)" ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      say "$NAME is $state; it has to go before a new request"
      remove_queued
      state=NONE ;;
  esac
  if [ "$state" = NONE ] && ! request; then
    REASON=$(last_error)
    # "Quota" and "no capacity" both arrive as RESOURCE_EXHAUSTED: only the second passes with time.
    if complained_of quota; then out_of_quota "$REASON"
    elif ! complained_of 'capacity|stock|RESOURCE_EXHAUSTED|UNAVAILABLE|already ?exists|ALREADY_EXISTS'; then fail "$REASON"; fi
  fi
  if [ -n "$REASON" ] && ! complained_of 'already ?exists|ALREADY_EXISTS'; then REASON="no capacity: $REASON"
  elif wait_until_active; then
    say "$NAME is ACTIVE: $ACCELERATOR in $ZONE, billed until tpu/delete.sh; next: tpu/setup.sh"
    exit 0
  fi
  say "attempt $try of $TRIES: $REASON"
  [ "$try" = "$TRIES" ] || back_off "$try" 60 900
done
fail "no TPU after $TRIES attempts; last: $REASON. Try another zone, another CAPACITY or a smaller ACCELERATOR"
