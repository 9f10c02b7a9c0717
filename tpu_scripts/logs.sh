#!/usr/bin/env bash
# Logs of a run's workers.
help() {
  cat <<'TEXT'
logs.sh --name=NAME --zone=ZONE [--run=RUN] [--workers=0,3|all] [--tail=BYTES] [--out=DIR] [--follow]

Prints the end of the logs of a run's workers, or writes them whole into DIR/worker-N.log.

  --workers=LIST   (default: 0)
  --tail=BYTES     how much of each (default: 20000)
  --out=DIR        whole logs into files instead
  --follow         goes on printing worker 0's until Ctrl-C
  --dry-run        prints the commands, calls nothing

Exit codes: 0 all workers answer; 1 some do not.

Example:
  tpu_scripts/logs.sh --name=cir7b --zone=us-west4-a --workers=all --out=logs
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
source "$HERE/workers.sh"
parse "$SLICE_OPTIONS run= workers= tail= out= follow" "$@"
slice_options
run_options
must_be_active
workers
option tail 20000
TAIL=$VALUE
[[ $TAIL =~ ^[0-9]+$ ]] || die "$EX_USER" "--tail=$TAIL: expected a number of bytes"
if [[ -n ${OPT[follow]:-} ]]; then
  while :; do
    show_log "$TAIL"
    [[ -z $DRY ]] || exit 0
    pause
  done
fi
option workers 0
[[ $VALUE != all ]] || VALUE=$(seq -s , 0 $((NUM_WORKERS - 1)))
IFS=, read -ra WANTED <<<"$VALUE"
option out
DIR=$VALUE
[[ -z $DIR || -n $DRY ]] || mkdir -p "$DIR"

# fetch WORKER SINCE: a piece of a log in $TMP/piece, and where the next one begins in NEXT.
fetch() {
  remote logs logs "--since=$2 --tail=$TAIL"
  local try
  for ((try = 1; try <= 3; try++)); do
    be_ssh "$1" "$COMMAND" || :
    [[ -z $DRY ]] || return 1
    NEXT=$(sed -n 's/^.*tag=logs next=\([0-9]*\).*$/\1/p;/tag=logs /q' "$OUT")
    if grep -q '^CIR worker=[0-9]* tag=logs state=none' "$OUT"; then
      NEXT=$2
      : >"$TMP/piece"
      return 0
    fi
    if [[ -n $NEXT ]]; then
      awk 'seen; /^CIR worker=[0-9]+ tag=logs /{seen = 1}' "$OUT" >"$TMP/piece"
      return 0
    fi
    pause
  done
  return 1
}

silent=""
for worker in "${WANTED[@]}"; do
  [[ $worker =~ ^[0-9]+$ && $worker -lt $NUM_WORKERS ]] ||
    die "$EX_USER" "--workers=$worker: expected numbers from 0 to $((NUM_WORKERS - 1)), or all"
  if [[ -z $DIR ]]; then
    if fetch "$worker" -1; then
      ((${#WANTED[@]} == 1)) || printf '==== worker %s\n' "$worker"
      cat "$TMP/piece"
    else
      silent+=" $worker"
    fi
    continue
  fi
  at=0
  [[ -n $DRY ]] || : >"$DIR/worker-$worker.log"
  while :; do
    if ! fetch "$worker" "$at"; then
      silent+=" $worker"
      break
    fi
    cat "$TMP/piece" >>"$DIR/worker-$worker.log"
    ((NEXT > at)) || break
    at=$NEXT
  done
done
[[ -n $DRY || -z $silent ]] || die 1 "no answer from workers$silent"
