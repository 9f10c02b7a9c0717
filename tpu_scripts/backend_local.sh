# shellcheck shell=bash
# Slices as directories of this machine: worker N is a process with JAX's variables for its place
# among the others, on virtual CPU devices. The functions are those of backend_qr.sh.

LOCAL=${CIR_LOCAL:-$PWD/runs/local}

_slice() { printf '%s/%s/slice' "$LOCAL" "$1"; }

be_describe() {
  STATE=NONE REASON=- TYPE=- NODES=1 RUN=$1 OWNER=- EXPIRES=-
  local file
  file=$(_slice "$1")
  if [[ -n $DRY ]]; then
    STATE=$DRY_STATE TYPE=$ACCELERATOR
    return 0
  fi
  [[ -f $file ]] || return 0
  read -r TYPE EXPIRES PORT <"$file"
  STATE=ACTIVE
}

be_create() {
  local file
  file=$(_slice "$1")
  if [[ -n $DRY ]]; then
    PORT=8476 DRY_STATE=ACTIVE
    return 0
  fi
  mkdir -p "${file%/*}"
  PORT=$("$PYTHON" -S -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  printf '%s %s %s\n' "$ACCELERATOR" "$EXPIRES_AT" "$PORT" >"$file"
}

be_delete() {
  local file worker run
  file=$(_slice "$1")
  [[ -z $DRY && -f $file ]] || return 0
  read -r TYPE EXPIRES PORT <"$file"
  slice_type "$TYPE"
  for ((worker = 0; worker < HOSTS; worker++)); do
    for run in "${file%/*}/runs"/*/; do
      [[ ! -d $run ]] || "$PYTHON" -S "$HERE/supervisor.py" stop "--home=${file%/*}" \
        "--run=$(basename "$run")" "--worker=$worker" "--grace=${GRACE:-5}" >"$OUT" 2>"$ERR"
    done
  done
  rm -f "$file"
}

be_list() {
  local file
  : >"$TMP/slices"
  for file in "$LOCAL"/*/slice; do
    [[ -f $file ]] || continue
    read -r TYPE EXPIRES PORT <"$file"
    file=${file%/slice}
    echo "${file##*/} local ACTIVE $TYPE 1 ${file##*/} - $EXPIRES" >>"$TMP/slices"
  done
}

_worker() {
  local index=$1 call=(env "CIR_WORKER=$1")
  call+=("JAX_PLATFORMS=cpu" "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$CHIPS_PER_HOST")
  if ((HOSTS > 1)); then
    call+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT" "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$PORT")
    call+=("JAX_NUM_PROCESSES=$HOSTS" "JAX_PROCESS_ID=$index")
  fi
  call+=(bash -c "w=$index; $2")
  if [[ -n $DRY ]]; then
    quote "${call[@]}"
    printf '%s\n' "$QUOTED"
    return 0
  fi
  run_child "${call[@]}" >>"$OUT" 2>>"$ERR"
}

be_ssh() {
  local worker
  : >"$OUT"
  : >"$ERR"
  if [[ $1 != all ]]; then
    _worker "$1" "$2"
    return
  fi
  for ((worker = 0; worker < HOSTS; worker++)); do _worker "$worker" "$2" || :; done
}

be_copy() { :; }

be_paths() {
  quote "$LOCAL/$NAME"
  PATHS="h=$QUOTED; "
  quote "$PWD"
  PATHS+="d=$QUOTED; "
  quote "$HERE/supervisor.py"
  PATHS+="s=$QUOTED; "
}

be_delete_words() { CALL=(rm -f "$(_slice "$1")"); }

# The code is here, and so is the supervisor.
BE_INSTALLS=""
