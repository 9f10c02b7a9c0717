# shellcheck shell=bash
# What is done on the workers of a slice: code, start, status, logs, stop. Each worker answers with
# a marker line of its own, since gcloud's exit code and `--worker=all` say nothing of one worker.

SHA="" TARBALL=""
declare -A SAID=() # worker -> the words of its marker
SOURCE=$(dirname "$HERE")
SETUP_TIMEOUT=${CIR_SETUP_TIMEOUT:-1800} # seconds for the packages

RUN_OPTIONS="run= run-dir= bucket= retries= grace= env*= env-file= again"
SETUP_OPTIONS="source= python="

workers() { NUM_WORKERS=$((HOSTS * SLICES)); }

# ask TAG WHICH COMMAND: runs a command that begins with $w set to the worker's number, on all
# workers or the listed ones, and collects their markers in SAID; those without one are asked again
# alone, and at last `state=unreachable`.
ask() {
  local tag=$1 which=$2 command=$3 worker alone=0 answered try
  workers
  if [[ $which == all ]]; then
    SAID=()
    which=$(seq -s ' ' 0 $((NUM_WORKERS - 1)))
    if ((NUM_WORKERS > 1)); then
      be_ssh all "$command" || :
      answered=$(hear "$tag")
      take "$answered"
    fi
  else
    for worker in $which; do unset "SAID[$worker]"; done
  fi
  for worker in $which; do
    [[ -z ${SAID[$worker]:-} ]] || continue
    if [[ -n $DRY ]]; then
      ((NUM_WORKERS > 1)) && [[ $2 == all ]] || be_ssh "$worker" "$command"
      dry_answer "$tag" "$worker"
      continue
    fi
    for ((try = 1; try <= 3; try++)); do
      be_ssh "$worker" "$command" || :
      answered=$(hear "$tag")
      take "$answered"
      [[ -z ${SAID[$worker]:-} ]] || break
      classify
      # Where nobody answers, one worker's three calls are enough to know.
      if [[ $CLASS == gone ]] || ((alone > 0 && ${#SAID[@]} == alone)); then break; fi
      ((try == 3)) || pause
    done
    if [[ -z ${SAID[$worker]:-} ]]; then
      error_line
      SAID[$worker]="state=unreachable reason=${LINE// /_}"
      alone=$((alone + 1))
    fi
  done
}

# hear TAG: the markers in the last call's output, as lines `worker words`.
hear() { sed -n "s/^.*CIR worker=\([0-9][0-9]*\) tag=$1 \(.*\)$/\1 \2/p" "$OUT" | tr -d '\r'; }

take() {
  local worker rest
  while read -r worker rest; do
    [[ -z $worker ]] || SAID[$worker]=$rest
  done <<<"$1"
}

# What a worker would say, in a dry run.
dry_answer() {
  local state
  case $1 in
    check) state=${DRY_READY:-missing} ;;
    install) state=ready ;;
    start) state=started ;;
    stop) state=stopped ;;
    *) state="done" ;;
  esac
  SAID[$2]="state=$state code=0 next=0"
}

# those STATE...: the workers that said one of these, in THOSE.
those() {
  local worker state
  THOSE=""
  workers
  for ((worker = 0; worker < NUM_WORKERS; worker++)); do
    field state "${SAID[$worker]:-}"
    for state; do [[ $FIELD != "$state" ]] || THOSE+="${THOSE:+ }$worker"; done
  done
}

# -- setup ----------------------------------------------------------------------------------------

# pack: the code as one archive named by its content, in TARBALL and SHA: what git tracks or would.
pack() {
  option source "$SOURCE"
  SOURCE=$VALUE
  SHA=local
  [[ -n $BE_INSTALLS ]] || return 0
  [[ -f $SOURCE/tpu_scripts/supervisor.py ]] ||
    die "$EX_USER" "--source=$SOURCE: expected a checkout of cir_jax"
  (
    cd "$SOURCE"
    # A directory that is no checkout of its own is packed whole.
    if [[ -e .git ]]; then
      git ls-files -co --exclude-standard -z | while IFS= read -r -d '' file; do
        [[ ! -e $file && ! -L $file ]] || printf '%s\0' "$file"
      done
    else
      find . -name __pycache__ -prune -o -type f -printf '%P\0'
    fi | LC_ALL=C sort -z | tar --null -T - --mtime=@0 --owner=0 --group=0 --numeric-owner \
      --mode=u=rwX,go=rX --format=gnu -cf - | gzip -n
  ) >"$TMP/code.tar.gz" || die "$EX_USER" "--source=$SOURCE: cannot be packed"
  SUM=$(sha256sum "$TMP/code.tar.gz")
  SUM=${SUM%% *}
  SHA=${SUM:0:12}
  TARBALL=$TMP/cir-$SHA.tar.gz
  mv "$TMP/code.tar.gz" "$TARBALL"
}

# setup: code and packages on all workers; proves that they are the same on all.
setup() {
  pack
  SETUP=ready
  [[ -n $BE_INSTALLS ]] || return 0
  be_paths "$SHA"
  local told='echo "CIR worker=$w tag=TAG state=ready $(cat "$d/.ready")"' check install worker
  check=$PATHS'if [ -f "$d/.ready" ]; then '${told/TAG/check}'; else echo "CIR worker=$w tag=check state=missing"; fi'
  ask check all "$check"
  those missing
  if [[ -n $THOSE ]]; then
    local missing=$THOSE
    option python
    quote "$VALUE"
    # Locked, since gcloud runs a command again when its connection breaks.
    install=$PATHS'mkdir -p "$h/code"; ( flock 9; [ -f "$d/.ready" ] || { '
    install+="echo '$SUM  cir-$SHA.tar.gz' | sha256sum -c --quiet - && "
    install+='rm -rf "$d" && mkdir "$d" && tar -xzf cir-'$SHA'.tar.gz -C "$d" && sh "$d/tpu_scripts/install.sh" "$h" '"$SHA $QUOTED '[tpu,gcs]'; } ) 9>\"\$h/code.lock\" >&2 && ${told/TAG/install}"
    workers
    if [[ ${missing// /} == "$(seq -s '' 0 $((NUM_WORKERS - 1)))" ]]; then
      be_copy "$TARBALL" all || log "copying did not reach all workers"
      CALL_TIMEOUT=$SETUP_TIMEOUT ask install all "$install"
    else
      for worker in $missing; do
        be_copy "$TARBALL" "$worker" || log "copying did not reach worker $worker"
      done
      CALL_TIMEOUT=$SETUP_TIMEOUT ask install "$missing" "$install"
    fi
    DRY_READY=ready
  fi
  prove_equal || return 1
  guard
}

# prove_equal: all workers are ready, with the same code, python and packages.
prove_equal() {
  local worker first=${SAID[0]:-} bad=0
  workers
  those unreachable
  if [[ -n $THOSE ]]; then
    for worker in $THOSE; do
      field reason "${SAID[$worker]}"
      log "worker $worker: no answer to setup: ${FIELD//_/ }"
    done
    SETUP=unreachable
    return 1
  fi
  for ((worker = 0; worker < NUM_WORKERS; worker++)); do
    if [[ ${SAID[$worker]} != "$first" ]]; then
      log "worker $worker: ${SAID[$worker]}"
      bad=1
    fi
  done
  if ((bad)); then
    log "worker 0: $first"
    die "$EX_CONFIG" "$NAME: workers differ in code, python or packages; delete and create the slice anew"
  fi
  log "$NAME: $NUM_WORKERS workers ready: ${first#state=ready }"
}

# guard: each worker gives the slice back when its time is over, whatever becomes of this machine.
guard() {
  [[ $EXPIRES_AT != never ]] || return 0
  be_delete_words "$NAME" "$ZONE"
  quote "${CALL[@]}"
  ask guard all "$PATHS"'python3 "$s" guard --home="$h" --worker="$w" '"--expires=$EXPIRES_AT -- $QUOTED"
  return 0
}

# -- a run ----------------------------------------------------------------------------------------

# run_options: the run's name, its directory, and the command as it is started.
run_options() {
  option run "$NAME"
  RUN_NAME=$VALUE
  option bucket
  BUCKET=${VALUE%/}
  [[ -z $BUCKET || $BUCKET == gs://?* ]] || die "$EX_USER" "--bucket=$VALUE: expected gs://NAME, or gs://NAME/FOLDER"
  option run-dir
  [[ $VALUE != *://* ]] || die "$EX_USER" "--run-dir=$VALUE: expected a path; --bucket says where checkpoints go"
  RUN_DIR=${VALUE:-runs/$RUN_NAME}
  CHECKPOINTS=""
  option retries 3
  [[ $VALUE =~ ^[0-9]+$ ]] || die "$EX_USER" "--retries=$VALUE: expected a number from 0 on"
  RETRIES=$VALUE
  option grace 120s
  seconds grace "$VALUE"
  GRACE=$SECONDS_OF
}

slices_told() {
  echo -n "$ACCELERATOR"
  ((SLICES == 1)) || echo -n " x $SLICES"
}

# check_env: the variables of --env are ones, and no secrets.
check_env() {
  local pair
  for pair in "${MANY[@]}"; do
    [[ $pair == env=* ]] || continue
    [[ $pair =~ ^env=[A-Za-z_][A-Za-z0-9_]*= ]] || die "$EX_USER" "--$pair: expected --env=NAME=VALUE"
    [[ ! $pair =~ ^env=[^=]*(TOKEN|SECRET|PASSWORD|KEY)[^=]*= ]] ||
      die "$EX_USER" "--env=$(cut -d= -f2 <<<"$pair"): everybody on both machines would see a secret; write it into a file on the workers and name that with --env-file"
  done
}

# training: completes a command that trains by what makes it go on where it was: its run directory,
# where its checkpoints are, and resume=true. Refuses a config that the slice cannot run, before there is one.
training() {
  CHECKED=1
  ((${#WORDS[@]} > 0)) || die "$EX_USER" "-- COMMAND: is missing, for example -- cir-jax train configs/quickstart.toml"
  local word has_dir="" has_resume=""
  check_env
  if ((DEVICES > 0)); then
    CHECKPOINTS=$("$PYTHON" "$HERE/launch.py" check "$SOURCE" "$DEVICES" "$(slices_told)" "${WORDS[@]}") ||
      die "$EX_USER" "nothing was asked for"
  fi
  [[ ${WORDS[0]##*/} == cir-jax && ${WORDS[1]:-} =~ ^(train|sft)$ ]] || return 0
  for word in "${WORDS[@]}"; do
    case $word in
      run_dir=*) has_dir=1 RUN_DIR=${word#run_dir=} ;;
      checkpoint.dir=*) CHECKPOINTS=${word#checkpoint.dir=} ;;
      resume=*) has_resume=1 ;;
    esac
  done
  [[ -n $has_dir ]] || WORDS+=("run_dir=$RUN_DIR")
  [[ -n $has_resume ]] || WORDS+=("resume=true")
  if [[ -n $BUCKET && -z $CHECKPOINTS ]]; then
    CHECKPOINTS=$BUCKET/$RUN_NAME/checkpoints
    WORDS+=("checkpoint.dir=$CHECKPOINTS")
  fi
  [[ -n $CHECKPOINTS || $RUN_DIR == /* || -z $BE_INSTALLS ]] ||
    log "run_dir=$RUN_DIR: is on the workers' own disks and goes with them; --bucket=gs://... keeps what matters"
}

# remote TAG VERB OPTIONS: a supervisor's command for a worker's shell, in COMMAND.
remote() {
  be_paths "$SHA"
  quote "--run=$RUN_NAME"
  COMMAND=$PATHS'if [ -f "$s" ]; then python3 "$s" '"$2"' --home="$h" --worker="$w" '"$QUOTED${3:+ $3}"
  COMMAND+='; else echo "CIR worker=$w tag='"$1"' state=none"; fi'
}

# supervise WHICH VERB OPTIONS: that on workers, their answers in SAID.
supervise() {
  remote "$2" "$2" "$3"
  ask "$2" "$1" "$COMMAND"
}

# start: one quick call; a run that is there already goes on as it is.
start() {
  local options=() bin="" pair
  options+=("--sha=$SHA" "--run-dir=$RUN_DIR" "--checkpoints=${CHECKPOINTS:-$RUN_DIR/checkpoints}" "--retries=$RETRIES" "--grace=$GRACE")
  [[ -z $BUCKET ]] || options+=("--bucket=$BUCKET")
  [[ -z ${OPT[again]:-} ]] || options+=(--again)
  [[ $FLAGS == - ]] || options+=("--env=LIBTPU_INIT_ARGS=${FLAGS//,/ }")
  # jax takes 8482 by default, which the firewall rule of the Cloud TPU API does not open.
  [[ -z $BE_INSTALLS ]] || options+=(--env=JAX_COORDINATOR_PORT=8476)
  for pair in "${MANY[@]}"; do [[ $pair != env=* ]] || options+=("--$pair"); done
  option env-file
  [[ -z $VALUE ]] || options+=("--env-file=$VALUE")
  [[ -z ${CIR_BACKOFF:-} ]] || options+=("--backoff=$CIR_BACKOFF")
  [[ -z ${CIR_POLL:-} ]] || options+=("--poll=$CIR_POLL")
  quote "${options[@]}" -- "${WORDS[@]}"
  [[ -z $BE_INSTALLS ]] || bin='--bin="$d/.venv/bin" '
  supervise all start '--cwd="$d" '"$bin$QUOTED"
  those other
  [[ -z $THOSE ]] ||
    die "$EX_USER" "--run=$RUN_NAME: goes on with another command or code (workers $THOSE); stop.sh --name=$NAME first, or take another --run"
}

# stop WHICH: SIGTERM, a while later SIGKILL; nothing of the run lives afterwards.
stop() {
  CALL_TIMEOUT=$((CALL_TIMEOUT + GRACE)) supervise "$1" stop "--grace=$GRACE"
}

# show_log [TAIL]: what worker 0 has written since the last call; at first, its last TAIL bytes.
LOG_AT=-1
show_log() {
  local next
  remote logs logs "--since=$LOG_AT --tail=${1:-20000}"
  be_ssh 0 "$COMMAND" || return 0
  next=$(sed -n 's/^.*tag=logs next=\([0-9]*\).*$/\1/p;/tag=logs /q' "$OUT")
  [[ -n $next ]] || return 0
  LOG_AT=$next
  awk 'seen; /^CIR worker=[0-9]+ tag=logs /{seen = 1}' "$OUT"
}

# tally: how many workers are in each state, in COUNT; the newest checkpoint in CHECKPOINT.
declare -A COUNT=()
tally() {
  local worker state
  COUNT=()
  CHECKPOINT=-1
  workers
  for ((worker = 0; worker < NUM_WORKERS; worker++)); do
    field state "${SAID[$worker]}"
    state=$FIELD
    COUNT[$state]=$((${COUNT[$state]:-0} + 1))
    field checkpoint "${SAID[$worker]}"
    if [[ $FIELD =~ ^[0-9]+$ ]] && ((FIELD > CHECKPOINT)); then CHECKPOINT=$FIELD; fi
  done
}

# follow: looks at all workers until the run has ended in one of these ways, in OUTCOME (with CODE):
#   done, failed, stopped; again (it ended, but may go on here); lost (nobody answers)
SHOW=1 # not empty: print worker 0's log
follow() {
  local silent=0 odd=0 seen="" now_seen state
  while :; do
    check_expiry
    supervise all status ""
    tally
    now_seen=""
    for state in "${!COUNT[@]}"; do now_seen+="${now_seen:+, }${COUNT[$state]} $state"; done
    if [[ $now_seen != "$seen" ]]; then log "$RUN_NAME: $now_seen"; fi
    seen=$now_seen
    [[ -z $SHOW || ${SAID[0]} == state=unreachable* ]] || show_log
    if ((${COUNT[done]:-0} == NUM_WORKERS)); then
      OUTCOME="done" CODE=0
      return 0
    fi
    if ((${COUNT[failed]:-0} > 0)); then
      tell_failed
      OUTCOME=failed
      # A worker that is gone is what the others failed of.
      [[ $CODE =~ ^(2|64|65|76|78)$ ]] || ((${COUNT[unreachable]:-0} == 0)) || OUTCOME=lost
      return 0
    fi
    if ((${COUNT[stopped]:-0} + ${COUNT[interrupted]:-0} > 0)); then
      OUTCOME=stopped CODE=130
      return 0
    fi
    if ((${COUNT[preempted]:-0} + ${COUNT[lost]:-0} + ${COUNT[none]:-0} + ${COUNT[unreachable]:-0} > 0)); then
      look
      odd=$((odd + 1))
      # Silence counts only while the cloud says that the slice is there, and that of some workers
      # only where the others miss them.
      if ((${COUNT[unreachable]:-0} == NUM_WORKERS)) ||
        ((${COUNT[unreachable]:-0} > 0 && ${COUNT[retrying]:-0} + ${COUNT[preempted]:-0} > 0)); then
        [[ $STATE != ACTIVE ]] || silent=$((silent + 1))
      else
        silent=0
      fi
    else
      odd=0 silent=0
      [[ -z ${WATCHED:-} ]] || look
    fi
    if [[ $STATE != ACTIVE && $STATE != UNKNOWN ]] || ((silent >= LOST_AFTER)); then
      OUTCOME=lost
      return 0
    fi
    # A moment for the slice to say that it is going.
    if ((odd >= 3 && ${COUNT[unreachable]:-0} == 0)); then
      OUTCOME=again
      return 0
    fi
    pause
  done
}
LOST_AFTER=${CIR_LOST_AFTER:-20} # looks in a row at which no worker answers

# tell_failed: names the workers that failed, ends the others; the code in CODE.
tell_failed() {
  local worker code
  CODE=""
  those failed
  for worker in $THOSE; do
    field code "${SAID[$worker]}"
    code=$FIELD
    [[ $code =~ ^[0-9]+$ ]] || code=1
    log "worker $worker: $RUN_NAME failed with exit code $code"
    # The user's error explains the others' crashes.
    case $code in
      2 | 64 | 65 | 76 | 78) CODE=$code ;;
      *) CODE=${CODE:-$code} ;;
    esac
  done
  ((NUM_WORKERS == 1)) || stop all
}

# report_start: ends if a worker could not be started.
report_start() {
  local worker
  those unreachable none
  if [[ -n $THOSE ]]; then
    for worker in $THOSE; do
      field reason "${SAID[$worker]}"
      log "worker $worker: not started: ${FIELD//_/ }"
    done
    return 1
  fi
  those started
  [[ -z $THOSE ]] || log "$RUN_NAME: started on workers $THOSE"
}
