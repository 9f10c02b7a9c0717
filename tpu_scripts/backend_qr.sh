# shellcheck shell=bash
# Slices as queued resources of the Cloud TPU API. Another backend defines the same functions:
#   be_describe NAME ZONE   sets STATE (NONE if there is none) REASON TYPE NODES RUN OWNER EXPIRES
#   be_create NAME ZONE     asks for a slice; 0, or gcloud's code with CLASS set
#   be_delete NAME ZONE     asks for its end; 0 if it is accepted or there is none
#   be_list ZONE            lines `name zone state type nodes run owner expires` in $TMP/slices
#   be_ssh WHICH COMMAND    runs COMMAND on worker WHICH, or on `all`; 0 is no evidence
#   be_copy FILE WHICH      puts FILE into the home of a worker, or of all

# _tpu GROUP VERB ARGUMENT...: the words of a call, in CALL; $PROJECT goes last.
_tpu() {
  CALL=(compute tpus "$@")
  [[ -z $PROJECT ]] || CALL+=("--project=$PROJECT")
}

be_describe() {
  STATE=NONE REASON=- TYPE=- NODES=- RUN=- OWNER=- EXPIRES=-
  _tpu queued-resources describe "$1" "--zone=$2" --format=json
  if ! gc_retry "${CALL[@]}"; then
    [[ $CLASS == notfound ]] && return 0
    if [[ -n ${WATCHED:-} && $CLASS == transient ]]; then
      # A launcher that is offline for an hour must not take that for the slice's end.
      STATE=UNKNOWN
      error_line
      log "no answer about $1: $LINE"
      return 0
    fi
    die_of_gcloud "cannot ask for the slice $1 in $2"
  fi
  if [[ -n $DRY ]]; then
    STATE=$DRY_STATE TYPE=${ASKED_TYPE:--}
    return 0
  fi
  local parsed
  parsed=$("$PYTHON" -S "$HERE/launch.py" slice "$OUT") ||
    die 1 "cannot read what gcloud says of the slice $1"
  mapfile -t parsed <<<"$parsed"
  STATE=${parsed[0]} TYPE=${parsed[1]} NODES=${parsed[2]} RUN=${parsed[3]}
  OWNER=${parsed[4]} EXPIRES=${parsed[5]} REASON=${parsed[6]}
}

be_create() {
  local labels="cir-run=$1,cir-owner=$ME" track=()
  local call=("--zone=$2" "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME")
  if ((SLICES > 1)); then
    call+=("--node-count=$SLICES" "--node-prefix=$1")
  else
    call+=("--node-id=$1")
  fi
  case $MODEL in
    spot) call+=(--spot) ;;
    reserved) call+=(--reserved) ;;
    # Only alpha has it; it is what ends such a slice on the server's side.
    flex)
      track=(alpha)
      call+=(--provisioning-model=flex-start "--max-run-duration=${TTL_S}s")
      ;;
  esac
  [[ $EXPIRES_AT == never ]] || labels+=",cir-expires=$EXPIRES_AT"
  # The time in the queue, not of the run.
  [[ $MODEL == reserved ]] || call+=("--valid-until-duration=${QUEUE_S}s")
  _tpu queued-resources create "$1" "${call[@]}" "--labels=$labels" --async --quiet
  gc_retry "${track[@]}" "${CALL[@]}" || return
  DRY_STATE=ACTIVE
}

be_delete() {
  _tpu queued-resources delete "$1" "--zone=$2" --force --async --quiet
  local code=0
  gc "${CALL[@]}" || code=$?
  DRY_STATE=NONE
  ((code != 0)) || return 0
  classify
  [[ $CLASS == notfound ]] || return "$code"
}

# The command that a worker runs to end its own slice, in CALL.
be_delete_words() {
  _tpu queued-resources delete "$1" "--zone=$2" --force --async --quiet
  CALL=(gcloud "${CALL[@]}")
}

be_list() {
  _tpu queued-resources list "--zone=$1" --format=json
  gc_retry "${CALL[@]}" || die_of_gcloud "cannot list the slices in $1"
  : >"$TMP/slices"
  [[ -n $DRY ]] || "$PYTHON" -S "$HERE/launch.py" slices "$OUT" "$1" >"$TMP/slices" ||
    die 1 "cannot read what gcloud lists in $1"
}

# _node WHICH: the node that has worker WHICH, and its number there, in NODE and AT.
_node() {
  NODE=$NAME AT=$1
  if ((SLICES > 1)); then
    NODE=$NAME-$(($1 / HOSTS)) AT=$(($1 % HOSTS))
  fi
}

# _everywhere FUNCTION ARGUMENT: FUNCTION NODE all ARGUMENT for each node; all output in $OUT.
_everywhere() {
  local slice code=0 function=$1
  if ((SLICES == 1)); then
    "$function" "$NAME" all "$2" || return
    return 0
  fi
  : >"$TMP/all"
  for ((slice = 0; slice < SLICES; slice++)); do
    FIRST=$((slice * HOSTS)) "$function" "$NAME-$slice" all "$2" || code=$?
    cat "$OUT" >>"$TMP/all"
  done
  cp "$TMP/all" "$OUT"
  return "$code"
}

_ssh() {
  local prefix
  if [[ $2 == all ]]; then
    # A worker's number, from what each VM knows; FIRST is the number of the node's first worker.
    prefix='w=${CIR_WORKER:-${TPU_WORKER_ID:-$(hostname | sed -n "s/.*-w-\([0-9]*\)$/\1/p")}}; '
    prefix+='w=${w:-$(curl -sfm2 -HMetadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)}; '
    prefix+='[ -n "$w" ] || exit 0; '
    ((${FIRST:-0} == 0)) || prefix+="w=\$((w + $FIRST)); "
  else
    prefix="w=$((${FIRST:-0} + $2)); "
  fi
  _tpu tpu-vm ssh "$1" "--zone=$ZONE" "--worker=$2" --quiet "--command=$prefix$3"
  gc "${CALL[@]}"
}

be_ssh() {
  if [[ $1 == all ]]; then
    _everywhere _ssh "$2"
  else
    _node "$1"
    FIRST=$(($1 - AT)) _ssh "$NODE" "$AT" "$2"
  fi
}

_copy() {
  _tpu tpu-vm scp "$3" "$1:${3##*/}" "--zone=$ZONE" "--worker=$2" --quiet
  gc_retry "${CALL[@]}"
}

be_copy() {
  if [[ $2 == all ]]; then
    _everywhere _copy "$1"
  else
    _node "$2"
    _copy "$NODE" "$AT" "$1"
  fi
}

# be_paths SHA: shell text that sets, on a worker, h (our directory), d (the code) and s (the
# supervisor), in PATHS.
be_paths() {
  PATHS='h=${CIR_HOME:-$PWD/cir}; d=$h/code/'"$1"'; s=$h/supervisor.py; '
}

BE_INSTALLS=1 # code has to be brought to the workers
