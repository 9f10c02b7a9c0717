# shellcheck shell=bash
# A slice from request to end: accelerator types, creation with adoption and clean-up, deletion.
# Sourced after lib.sh; it chooses the backend.

ZONES=() ZONE="" PROJECT=""
ACCELERATOR="" CHIPS=0 HOSTS=1 CHIPS_PER_HOST=0 RUNTIME="" FLAGS="-"
SLICES=1  # of a multislice job
DEVICES=0 # chips of all slices
MODEL=""  # spot, reserved, flex or on-demand
TTL_S=0 EXPIRES_AT=never QUEUE_S=0
# What be_describe says of a slice; DRY_STATE is what a dry run takes for its state.
STATE=NONE REASON=- TYPE=- NODES=- RUN=- OWNER=- EXPIRES=- DRY_STATE=NONE

SLICE_OPTIONS="name= zone= type= project= backend= nodes= owner="
CREATE_OPTIONS="spot on-demand reserved flex ttl= queue= price="

# slice_type TYPE: looks a type up in the table.
slice_type() {
  local row
  ACCELERATOR=${1/#v5e-/v5litepod-}
  if [[ $ACCELERATOR =~ ^local-([1-9][0-9]*)x([1-9][0-9]*)$ ]]; then
    HOSTS=${BASH_REMATCH[1]} CHIPS_PER_HOST=${BASH_REMATCH[2]} RUNTIME=- FLAGS=-
    CHIPS=$((HOSTS * CHIPS_PER_HOST))
    return 0
  fi
  if ! row=$(grep -P "^\Q$ACCELERATOR\E\t" "$HERE/slices.tsv"); then
    [[ $1 != tpu7x* ]] ||
      die "$EX_USER" "--type=$1: only Compute Engine and GKE have it, the backend qr asks the Cloud TPU API"
    die "$EX_USER" "--type=$1: no such type, expected one of $(grep -v '^#' "$HERE/slices.tsv" | cut -f1 | tr '\n' ' ')"
  fi
  IFS=$'\t' read -r ACCELERATOR CHIPS HOSTS CHIPS_PER_HOST RUNTIME FLAGS <<<"$row"
}

# slice_options: name, zone, type, project and backend from the options.
slice_options() {
  need_name
  owner
  option type
  [[ -z $VALUE ]] || slice_type "$VALUE"
  place_options
  option nodes 1
  [[ $VALUE =~ ^[1-9][0-9]*$ ]] || die "$EX_USER" "--nodes=$VALUE: expected a number of slices from 1 on"
  SLICES=$VALUE
  DEVICES=$((CHIPS * SLICES))
}

# place_options: where to look: project, zones, backend.
place_options() {
  option project
  PROJECT=$VALUE
  local kind=qr
  [[ $ACCELERATOR != local-* ]] || kind=local
  option backend "$kind"
  case $VALUE in
    qr | local) ;;
    gce) die "$EX_USER" "--backend=gce: is not there yet, expected qr or local" ;;
    *) die "$EX_USER" "--backend=$VALUE: expected qr or local" ;;
  esac
  # shellcheck source=/dev/null
  source "$HERE/backend_$VALUE.sh"
  if [[ $VALUE == local ]]; then
    ZONES=(local)
  else
    need zone
    IFS=, read -ra ZONES <<<"$VALUE"
  fi
  ZONE=${ZONES[0]}
}

# create_options: what a request says besides, and how long the slice may live.
create_options() {
  local flag
  [[ -n $ACCELERATOR ]] || die "$EX_USER" "--type: is missing (or set CIR_TYPE), for example v5litepod-16"
  for flag in spot on-demand reserved flex; do
    [[ -n ${OPT[$flag]:-} ]] || continue
    [[ -z $MODEL ]] || die "$EX_USER" "--$flag: contradicts --$MODEL"
    MODEL=$flag
  done
  [[ $ACCELERATOR != local-* ]] || MODEL=${MODEL:-reserved}
  [[ -n $MODEL ]] || die "$EX_USER" "--spot, --on-demand, --reserved or --flex: one is missing"
  option ttl
  if [[ -n $VALUE ]]; then
    seconds ttl "$VALUE"
    TTL_S=$SECONDS_OF
    now
    EXPIRES_AT=$((NOW + TTL_S))
  elif [[ $MODEL != reserved ]]; then
    die "$EX_USER" "--ttl: is missing: a slice that costs by the hour needs an end, for example --ttl=8h"
  fi
  option queue 12h
  seconds queue "$VALUE"
  QUEUE_S=$SECONDS_OF
}

# say_cost: chips, hours and what they cost at most, at the price the user gives.
say_cost() {
  local hours=unlimited cost=""
  if ((TTL_S > 0)); then
    hours="at most $(awk "BEGIN {print $TTL_S / 3600}") h"
    option price
    [[ -z $VALUE ]] || cost=", at $VALUE a chip-hour at most $(awk "BEGIN {printf \"%.2f\", $DEVICES * $TTL_S / 3600 * $VALUE}")"
  fi
  log "$NAME: $ACCELERATOR x $SLICES ($MODEL), $DEVICES chips, $hours$cost"
}

# -- states ---------------------------------------------------------------------------------------

# look: what has become of the slice $NAME, in whichever zone it is.
look() {
  local zone
  for zone in "${ZONES[@]}"; do
    be_describe "$NAME" "$zone"
    if [[ $STATE != NONE ]]; then
      ZONE=$zone
      return 0
    fi
  done
}

# adopt: whether the slice that is there may be taken for ours.
adopt() {
  [[ $OWNER == - || $OWNER == "$ME" ]] ||
    die "$EX_USER" "--name=$NAME: is a slice of $OWNER's in $ZONE; take another name (or --owner=$OWNER)"
  if [[ $TYPE != - ]]; then
    [[ -n $ACCELERATOR ]] || slice_type "$TYPE"
    [[ $TYPE == "$ACCELERATOR" ]] ||
      die "$EX_USER" "--type=$ACCELERATOR: the slice $NAME is a $TYPE; delete it first: delete.sh --name=$NAME --zone=$ZONE"
    DEVICES=$((CHIPS * SLICES))
  fi
  [[ -n $ACCELERATOR ]] || die "$EX_USER" "--type: is missing, and gcloud does not say what $NAME is"
  # Its own end counts, not one that begins with this call.
  [[ ! $EXPIRES =~ ^[0-9]+$ ]] || EXPIRES_AT=$EXPIRES
  MINE=1
}

EXPIRED="" # not empty: its time is over, whatever --keep says
MINE=""    # not empty: there may be a slice of ours, to be deleted if this script is ended

# check_expiry: ends when the slice's time is over.
check_expiry() {
  [[ $EXPIRES_AT != never ]] || return 0
  now
  if ((NOW >= EXPIRES_AT)); then
    EXPIRED=1
    die "$EX_RETRY" "$NAME: its time (--ttl) is over"
  fi
}

# ensure: returns when the slice is ACTIVE. Adopts one that is there, replaces one that failed or
# was suspended, and asks anew while there is no capacity.
ensure() {
  local at=0 until said=""
  now
  until=$((NOW + QUEUE_S))
  while :; do
    look
    if [[ $STATE != NONE && $STATE != UNKNOWN ]]; then
      adopt
      [[ $STATE == "$said" ]] || log "$NAME: $STATE in $ZONE"
      said=$STATE
    fi
    case $STATE in
      ACTIVE)
        check_expiry
        return 0
        ;;
      NONE)
        check_expiry
        ZONE=${ZONES[at % ${#ZONES[@]}]}
        say_cost
        MINE=1
        if be_create "$NAME" "$ZONE"; then
          [[ -z $DRY ]] || continue
        else
          case $CLASS in
            exists) ;;
            stockout)
              error_line
              log "$ZONE: $LINE"
              at=$((at + 1))
              ;;
            transient)
              error_line
              log "$ZONE: $LINE"
              ;;
            *) die_of_gcloud "cannot ask for $NAME in $ZONE" ;;
          esac
        fi
        ;;
      FAILED | SUSPENDED)
        log "$NAME: $STATE: $REASON"
        delete "$NAME" "$ZONE"
        if [[ $STATE_BEFORE == FAILED ]]; then
          printf '%s\n' "$REASON_BEFORE" >"$ERR"
          : >"$OUT"
          classify
          case $CLASS in
            auth | permission | invalid | quota) die "$EX_USER" "$NAME: $CLASS: $REASON_BEFORE" ;;
          esac
          at=$((at + 1))
        else
          continue # at once: it was there a moment ago
        fi
        ;;
      *) check_expiry ;;
    esac
    now
    ((NOW < until)) || die "$EX_RETRY" "$NAME: no slice within --queue=$((QUEUE_S))s; the same command tries again"
    pause
  done
}

# request_end NAME ZONE: asks for the slice's end until that is accepted; loud if it is not.
request_end() {
  local try
  for ((try = 1; try <= TRIES; try++)); do
    if be_delete "$1" "$2"; then return 0; fi
    error_line
    log "cannot delete $1 in $2 ($try of $TRIES): $LINE"
    ((try == TRIES)) || pause "$try"
  done
  be_delete_words "$1" "$2"
  quote "${CALL[@]}"
  log "THE SLICE $1 IN $2 MAY STILL BE THERE AND COST MONEY. Delete it by hand:"
  log "  $QUOTED"
  return 1
}

# delete NAME ZONE: until the slice is gone. What it was before is in STATE_BEFORE, REASON_BEFORE.
delete() {
  STATE_BEFORE=$STATE REASON_BEFORE=$REASON
  local try
  request_end "$1" "$2" || die 1 "$1 is not deleted"
  for ((try = 0; try < 40; try++)); do
    be_describe "$1" "$2"
    if [[ $STATE == NONE ]]; then
      log "$1: deleted"
      MINE=""
      return 0
    fi
    pause
    # A deletion that failed on the server leaves the slice as it was.
    if [[ $STATE != DELETING ]] && ((try % 5 == 4)); then
      request_end "$1" "$2" || die 1 "$1 is not deleted"
    fi
  done
  die 1 "$1: asked to be deleted, but still $STATE"
}

# must_be_active: for scripts that use a slice and do not make one.
must_be_active() {
  DRY_STATE=ACTIVE ASKED_TYPE=${ACCELERATOR:-v5litepod-16}
  look
  [[ $STATE != NONE ]] || die "$EX_USER" "--name=$NAME: no such slice in ${ZONES[*]}; create.sh or watch.sh makes one"
  adopt
  [[ $STATE == ACTIVE ]] || die "$EX_RETRY" "$NAME: is $STATE, not ACTIVE"
}
