#!/usr/bin/env bash
# Ends a run; the slice stays.
help() {
  cat <<'TEXT'
stop.sh --name=NAME --zone=ZONE [--run=RUN] [--grace=TIME]

Asks the run to end on all workers (SIGTERM: it saves a checkpoint), and kills after --grace (default:
120s) what is left of it, tool processes included. run.sh with the same names goes on with it.

  --dry-run   prints the commands, calls nothing

Exit codes: 0 nothing of the run lives; 1 some workers do not answer; 2 no such slice.

Example:
  tpu_scripts/stop.sh --name=cir7b --zone=us-west4-a
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
source "$HERE/workers.sh"
parse "$SLICE_OPTIONS run= grace=" "$@"
slice_options
run_options
must_be_active
stop all
those unreachable
[[ -z $THOSE ]] || die 1 "no answer from workers $THOSE: what they run may go on"
log "$RUN_NAME: stopped on $NUM_WORKERS workers"
