#!/usr/bin/env bash
# Requests a slice and waits until it is there.
help() {
  cat <<'TEXT'
create.sh --name=NAME --type=TYPE --zone=ZONE[,ZONE...] (--spot|--on-demand|--flex|--reserved) --ttl=TIME

Requests a TPU slice as a queued resource and waits until it is ACTIVE. Adopts one of that name that
is there already; deletes a FAILED or SUSPENDED one first; without capacity tries the next zone.

  --name=NAME        of the slice: a-z, 0-9 and -
  --type=TYPE        accelerator type, for example v5litepod-16 (or v5e-16), v6e-8, v5p-16
  --zone=ZONE,...    zones, tried in turn
  --spot, --on-demand, --flex, --reserved   how it is provisioned
  --ttl=TIME         how long it may live, for example 8h; needed but with --reserved
  --queue=TIME       how long to wait for capacity (default: 12h)
  --nodes=N          slices of a multislice job (default: 1)
  --price=USD        of a chip-hour, to print what it costs at most
  --project=ID, --owner=NAME   (default: gcloud's project; you)
  --keep             an interrupted call leaves its request in the queue
  --dry-run          prints the commands, calls nothing

Exit codes: 0 ACTIVE; 2 a request that cannot work; 75 no capacity in time: try again.

Example:
  tpu_scripts/create.sh --name=cir7b --type=v5litepod-16 --zone=us-west4-a --spot --ttl=8h --price=0.6
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
parse "$SLICE_OPTIONS $CREATE_OPTIONS keep" "$@"
slice_options
create_options

on_exit() {
  (($1 != 0)) && [[ -n $MINE && -z ${OPT[keep]:-} ]] || return "$1"
  # One that has been there before, or is ready, is not ours to end.
  [[ $FOUND == NONE && $STATE != ACTIVE ]] || return "$1"
  request_end "$NAME" "$ZONE" || :
  return "$1"
}

FOUND=NONE
look
FOUND=$STATE
[[ $FOUND != FAILED && $FOUND != SUSPENDED ]] || FOUND=NONE
ensure
log "$NAME: ACTIVE in $ZONE; delete.sh --name=$NAME --zone=$ZONE ends it"
