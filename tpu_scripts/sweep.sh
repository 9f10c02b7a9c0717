#!/usr/bin/env bash
# Many runs over a few slices, with a ledger.
help() {
  cat <<'TEXT'
sweep.sh --name=NAME --configs=A.toml,B.toml [--seeds=0,1,2] [--set=key=v1,v2]... [--parallel=N]
         --type=TYPE --zone=ZONE (--spot|...) --ttl=TIME [options of watch.sh] [-- key=value ...]

Runs every combination of config, seed and values, each under watch.sh, on N slices NAME-0, NAME-1,
... that are kept from job to job and deleted in the end. What stands behind -- is for all jobs.

The ledger has one JSON file per job, whose name is a hash of what it trains. The same command again
skips jobs that are done (or refused: the user's error), goes on with the others (broken: crashed too
often; waiting), and waits for those that another sweep with the same ledger is at: no job runs twice
at once.

  --configs=LIST   TOML files, relative to the checkout
  --seeds=LIST     (default: 0)
  --set=KEY=LIST   values of a config key; commas within brackets or quotes do not separate
  --parallel=N     slices at a time (default: 1)
  --ledger=DIR     (default: runs/sweeps/NAME)
  --sft            cir-jax sft instead of train
  --attempts=N     of a job that may be tried again, in one sweep (default: 3)
  --again          also jobs that were refused
  --table          only prints the ledger
  --dry-run        prints the jobs and the commands, calls nothing

Exit codes: 0 all jobs are done; 1 some are not; 130, 143 ended by a signal.

Example:
  tpu_scripts/sweep.sh --name=lr --configs=configs/cir_qwen2.5_math_7b.toml --seeds=0,1 \
    --set=rl.optim.learning_rate=5e-7,1e-6 --parallel=2 --type=v5litepod-16 --zone=us-west4-a \
    --spot --ttl=48h --bucket=gs://mine/runs
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
source "$HERE/workers.sh"
OWN="configs= seeds= set*= parallel= ledger= sft attempts= table"
PASSED="$SLICE_OPTIONS $CREATE_OPTIONS $SETUP_OPTIONS $RUN_OPTIONS"
parse "$PASSED $OWN" "$@"
slice_options
create_options
option source "$SOURCE"
SOURCE=$VALUE
[[ -z ${OPT[run]:-} ]] || die "$EX_USER" "--run=${OPT[run]}: each job has a name of its own"
[[ -z ${OPT["run-dir"]:-} ]] || die "$EX_USER" "--run-dir: each job has its own; --bucket says where"
need configs
configs=$VALUE
option seeds 0
seeds=$VALUE
option parallel 1
[[ $VALUE =~ ^[1-9][0-9]*$ ]] || die "$EX_USER" "--parallel=$VALUE: expected a number from 1 on"
parallel=$VALUE
option attempts 3
[[ $VALUE =~ ^[1-9][0-9]*$ ]] || die "$EX_USER" "--attempts=$VALUE: expected a number from 1 on"
attempts=$VALUE
option ledger "runs/sweeps/$NAME"
LEDGER=$VALUE
[[ -z $DRY ]] || LEDGER=$TMP/ledger
mkdir -p "$LEDGER"
((${#NAME} <= 58)) || die "$EX_USER" "--name=$NAME: expected at most 58 characters for a sweep"

rest=()
for pair in "${MANY[@]}"; do [[ $pair != set=* ]] || rest+=("set:${pair#set=}"); done
for word in "${WORDS[@]}"; do rest+=("all:$word"); done
verb=train
[[ -z ${OPT[sft]:-} ]] || verb=sft
"$PYTHON" "$HERE/launch.py" jobs "$SOURCE" "$LEDGER" "$verb" "$configs" "$seeds" "${rest[@]}" >"$TMP/jobs" || exit
mapfile -t JOBS < <(cut -f1 "$TMP/jobs")
FILES=("${JOBS[@]/#/$LEDGER/}")
FILES=("${FILES[@]/%/.json}")

table() {
  "$PYTHON" -S "$HERE/launch.py" table "${FILES[@]}"
}

if [[ -n ${OPT[table]:-} ]]; then
  table
  exit 0
fi

# What watch.sh is given for each job.
options=()
for key in "${!OPT[@]}"; do
  case " $PASSED " in
    *" $key= "*) [[ $key == name ]] || options+=("--$key=${OPT[$key]}") ;;
    *" $key "*) options+=("--$key") ;;
  esac
done
for pair in "${MANY[@]}"; do [[ $pair != env=* ]] || options+=("--$pair"); done
mapfile -t options < <(printf '%s\n' "${options[@]}" | sort)

watch_words() { # ID SLICE
  mapfile -d '' -t words < <("$PYTHON" -S "$HERE/launch.py" words "$LEDGER/$1.json")
  WATCH=(bash "$HERE/watch.sh" "--name=$2" "--run=$1" --keep --quiet "${options[@]}")
  WATCH+=(${DRY:+--dry-run} -- "${words[@]}")
}

# Every job is one that the slices can run, before there is one.
check_env
"$PYTHON" "$HERE/launch.py" check-jobs "$SOURCE" "$DEVICES" "$(slices_told)" "${FILES[@]}" ||
  die "$EX_USER" "nothing was asked for"

end_slice() {
  local call=(bash "$HERE/delete.sh" "--name=$1") key
  for key in zone project backend owner type nodes; do
    [[ -z ${OPT[$key]:-} ]] || call+=("--$key=${OPT[$key]}")
  done
  run_child "${call[@]}" ${DRY:+--dry-run}
}

if [[ -n $DRY ]]; then
  for at in "${!JOBS[@]}"; do
    watch_words "${JOBS[at]}" "$NAME-$((at % parallel))"
    quote "${words[@]}"
    printf '# %s: %s\n' "${JOBS[at]}" "$QUOTED"
    "${WATCH[@]}"
  done
  for ((slot = 0; slot < parallel && slot < ${#JOBS[@]}; slot++)); do end_slice "$NAME-$slot"; done
  exit 0
fi

state() { sed -n 's/^ "state": "\(.*\)",\{0,1\}$/\1/p' "$LEDGER/$1.json"; }
note() { "$PYTHON" -S "$HERE/launch.py" note "$LEDGER/$1.json" "${@:2}"; }

# A job's end by its code: what may be tried again at once waits, what crashed is for the next sweep.
verdict() {
  case $1 in
    0) echo "done" ;;
    75 | 130 | 143) echo "waiting" ;;
    2 | 64 | 65 | 76 | 78) echo "refused" ;;
    *) echo "broken" ;;
  esac
}

# slot NUMBER: works off jobs on one slice until none is open.
slot() {
  local slice=$NAME-$1 id code open lock
  declare -A tried=()
  trap - EXIT
  # The child is asked to end; what it was at stays open.
  trap '[[ -z $CHILD ]] || { kill "$CHILD"; wait "$CHILD"; } 2>/dev/null; exit 143' TERM
  trap '[[ -z $CHILD ]] || { kill "$CHILD"; wait "$CHILD"; } 2>/dev/null; exit 130' INT
  while :; do
    open=0
    for id in "${JOBS[@]}"; do
      finished "$id" && continue
      ((${tried[$id]:-0} < attempts)) || continue
      open=1
      # Held by what the job runs, too: it stays claimed if this process alone is killed.
      exec {lock}>"$LEDGER/$id.lock"
      if flock -n "$lock" && ! finished "$id"; then
        tried[$id]=$((${tried[$id]:-0} + 1))
        watch_words "$id" "$slice"
        note "$id" state=running "slice=$slice"
        log "$slice: $id"
        code=0
        run_child "${WATCH[@]}" || code=$?
        note "$id" "state=$(verdict "$code")" "code=$code"
        [[ $(verdict "$code") != broken ]] || tried[$id]=$attempts
      fi
      exec {lock}>&-
    done
    ((open)) || return 0
    pause
  done
}

finished() {
  case $(state "$1") in
    done) return 0 ;;
    refused) [[ -z ${OPT[again]:-} ]] ;;
    *) return 1 ;;
  esac
}

SLOTS=() SLICES_USED=()
on_exit() {
  local code=$1 slot
  for slot in "${SLOTS[@]}"; do kill "$slot" 2>/dev/null || :; done
  for slot in "${SLOTS[@]}"; do wait "$slot" 2>/dev/null || :; done
  for slot in "${SLICES_USED[@]}"; do end_slice "$slot" || code=1; done
  return "$code"
}

# The first numbers that no other sweep with this ledger uses.
for ((number = 0; ${#SLOTS[@]} < parallel && ${#SLOTS[@]} < ${#JOBS[@]}; number++)); do
  exec {held}>"$LEDGER/slot-$number.lock"
  if flock -n "$held"; then
    slot "$number" &
    SLOTS+=($!)
    SLICES_USED+=("$NAME-$number")
  fi
  exec {held}>&-
done
for slot in "${SLOTS[@]}"; do
  CHILD=""
  wait "$slot" || :
done
table >"$TMP/table"
cat "$TMP/table"
left=$(awk -F'\t' '$2 != "done"' "$TMP/table" | wc -l)
((left == 0)) || die 1 "$NAME: $left of ${#JOBS[@]} jobs are not done"
log "$NAME: ${#JOBS[@]} jobs are done"
