#!/usr/bin/env bash
# Keeps a run going until it is done: slice, setup, start, look, and anew after pre-emption.
help() {
  cat <<'TEXT'
watch.sh --name=NAME --type=TYPE --zone=ZONE[,ZONE...] (--spot|...) --ttl=TIME [options] -- COMMAND

Requests a slice (as create.sh), brings the code (setup.sh), starts the run (run.sh) and looks after
it: a slice that is pre-empted, lost or failed is deleted and requested anew, and the run goes on from
its newest checkpoint. It gives up on the user's errors (exit codes 2, 64, 65, 76, 78), after --retries
attempts in a row without a newer checkpoint, and when --ttl is over. In the end, also after Ctrl-C
or SIGTERM, it deletes the slice. It remembers nothing: killed, the same command takes over what is
there. Options are those of create.sh and run.sh, and

  --keep      leaves the slice in the end
  --quiet     does not print the log of worker 0
  --dry-run   prints the commands of an undisturbed run, calls nothing

Exit codes: the run's own; 2 a request that cannot work; 75 no capacity, or the time is over: the same
command goes on; 130, 143 ended by a signal.

Example:
  tpu_scripts/watch.sh --name=cir7b --type=v5litepod-16 --zone=us-west4-a,us-central1-a --spot \
    --ttl=24h --bucket=gs://mine/runs -- cir-jax train configs/cir_qwen2.5_math_7b.toml
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
source "$HERE/workers.sh"
parse "$SLICE_OPTIONS $CREATE_OPTIONS $SETUP_OPTIONS $RUN_OPTIONS keep quiet" "$@"
slice_options
create_options
option source "$SOURCE"
SOURCE=$VALUE
run_options
training
ASKED_TYPE=$ACCELERATOR
WATCHED=1
[[ -z ${OPT[quiet]:-} ]] || SHOW=""

on_exit() {
  local code=$1 try
  [[ -n $MINE ]] || return "$code"
  if [[ -n ${OPT[keep]:-} && -z $EXPIRED ]]; then
    log "$NAME: kept; delete.sh --name=$NAME --zone=$ZONE ends it"
    return "$code"
  fi
  if ((code != 130 && code != 143)); then
    STATE=ACTIVE
    delete "$NAME" "$ZONE"
    return "$code"
  fi
  log "$NAME: interrupted; deleting the slice"
  request_end "$NAME" "$ZONE" || return 1
  # A request that was under way may be accepted only now.
  if [[ $STATE == NONE && -z $DRY ]]; then
    for try in 1 2 3; do
      pause
      request_end "$NAME" "$ZONE" || return 1
    done
  fi
  return "$code"
}

# A slice or a start that led to no newer checkpoint counts; any progress forgives.
fruitless=0 best=-1
count_fruitless() {
  if ((CHECKPOINT > best)); then
    best=$CHECKPOINT fruitless=0
  fi
  fruitless=$((fruitless + 1))
  ((fruitless <= LOST_BUDGET)) ||
    die "$EX_RETRY" "$RUN_NAME: $fruitless times in a row no newer checkpoint; giving up"
}
LOST_BUDGET=${CIR_LOST_BUDGET:-10} CHECKPOINT=-1

give_up_slice() {
  log "$RUN_NAME: the slice is lost ($STATE)"
  count_fruitless
  look
  [[ $STATE == NONE ]] || delete "$NAME" "$ZONE"
}

while :; do
  ensure
  silent=0
  until setup; do
    silent=$((silent + 1))
    check_expiry
    look
    if [[ $STATE != ACTIVE && $STATE != UNKNOWN ]] || ((silent >= LOST_AFTER)); then break; fi
    pause
  done
  if [[ $SETUP != ready ]]; then
    give_up_slice
    continue
  fi
  start
  # Not all started, or one's connection broke: what follows shows what has become of it.
  report_start || :
  follow
  case $OUTCOME in
    done)
      log "$RUN_NAME: done"
      exit 0
      ;;
    failed | stopped)
      log "$RUN_NAME: $OUTCOME with exit code $CODE"
      exit "$CODE"
      ;;
    again)
      count_fruitless
      log "$RUN_NAME: starting again"
      ;;
    lost) give_up_slice ;;
  esac
done
