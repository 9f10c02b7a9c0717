#!/usr/bin/env bash
# A table of a run's workers.
help() {
  cat <<'TEXT'
status.sh --name=NAME --zone=ZONE [--run=RUN] [--type=TYPE]

Prints for each worker: state of the run, exit code, attempt, phase and step, newest checkpoint, and
seconds since it last wrote anything. Works while some workers do not answer.

States: running, retrying, done, failed, stopped, preempted, lost (its supervisor was killed), none,
unreachable.
  --dry-run   prints the commands, calls nothing

Exit codes: 0 all workers answer; 1 some do not; 2 no such slice.

Example:
  tpu_scripts/status.sh --name=cir7b --zone=us-west4-a
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
source "$HERE/workers.sh"
parse "$SLICE_OPTIONS run=" "$@"
slice_options
run_options
must_be_active
supervise all status ""
[[ -z $DRY ]] || exit 0
format='%-7s %-12s %5s %8s %-6s %6s %11s %6s\n'
# shellcheck disable=SC2059
printf "$format" worker state code attempt phase step checkpoint age
for ((worker = 0; worker < NUM_WORKERS; worker++)); do
  cells=("$worker")
  for name in state code attempt phase step checkpoint age; do
    field "$name" "${SAID[$worker]}"
    cells+=("$FIELD")
  done
  # shellcheck disable=SC2059
  printf "$format" "${cells[@]}"
done
those unreachable
[[ -z $THOSE ]] || die 1 "no answer from workers $THOSE"
