# shellcheck shell=bash
# What all scripts here share: arguments, log lines, the one place that calls gcloud (dry run,
# retries, classes of errors), quoting, durations, waiting, and the end of a script.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "cir: bash ${BASH_VERSION}: expected 4.4 or newer (macOS: brew install bash)" >&2
  exit 2
fi

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${CIR_LAUNCH_PYTHON:-python3}  # of this machine
POLL=${CIR_POLL:-15}                  # seconds between two looks at the cloud; all waits are multiples
CALL_TIMEOUT=${CIR_CALL_TIMEOUT:-120} # seconds that one call of gcloud may take
TRIES=${CIR_TRIES:-5}                 # calls of gcloud before an error that may pass is believed

EX_USER=2 EX_RETRY=75 EX_CONFIG=78

TMP=$(mktemp -d)
OUT=$TMP/out ERR=$TMP/err # what the last call of gcloud wrote
CHILD=""                  # the process that run_child waits for
DRY=""                    # not empty: print commands, call nothing
exec {LOG_FD}>&2

log() { printf 'cir: %s\n' "$*" >&"$LOG_FD"; }

# die CODE MESSAGE...
die() {
  local code=$1
  shift
  log "$*"
  exit "$code"
}

# -- the end of a script --------------------------------------------------------------------------

# Scripts with something to clean up define on_exit, which is given the exit code.
at_exit() {
  local code=$?
  # A second signal ends the cleaning up, too.
  trap 'log "ended in the middle of cleaning up"; exit 143' TERM
  trap 'log "ended in the middle of cleaning up"; exit 130' INT
  trap - EXIT
  [[ -z $CHILD ]] || kill "$CHILD" 2>/dev/null || :
  if declare -F on_exit >/dev/null; then on_exit "$code" || code=$?; fi
  rm -rf "$TMP"
  # 255 is what ssh says of a lost connection; gcloud would run us again.
  ((code != 255)) || code=1
  exit "$code"
}
trap at_exit EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# Runs a command in the background and waits: bash runs a trap at once in `wait`, but only after
# the end of a command in the foreground.
run_child() {
  local code=0
  "$@" &
  CHILD=$!
  wait "$CHILD" || code=$?
  CHILD=""
  return "$code"
}

# -- time -----------------------------------------------------------------------------------------

# now: seconds since 1970, in NOW.
now() { printf -v NOW '%(%s)T' -1 && NOW=${CIR_NOW:-$NOW}; }

# pause [FACTOR]: waits FACTOR x CIR_POLL seconds, up to a quarter more or less.
pause() {
  [[ -z $DRY ]] || return 0
  local whole=${POLL%%.*} part=000 ms
  [[ $POLL != *.* ]] || part=${POLL#*.}000
  ms=$(((10#${whole:-0} * 1000 + 10#${part:0:3}) * ${1:-1} * (75 + RANDOM % 51) / 100))
  run_child sleep "$((ms / 1000)).$(printf %03d $((ms % 1000)))"
}

# seconds OPTION TEXT: 90s, 30m, 6h, 2d or 1h30m as seconds, in SECONDS_OF.
seconds() {
  local text=$2 number
  SECONDS_OF=0
  while [[ $text =~ ^([0-9]+)([smhd])(.*)$ ]]; do
    number=$((10#${BASH_REMATCH[1]}))
    case ${BASH_REMATCH[2]} in
      s) ((SECONDS_OF += number)) || : ;;
      m) ((SECONDS_OF += number * 60)) || : ;;
      h) ((SECONDS_OF += number * 3600)) || : ;;
      d) ((SECONDS_OF += number * 86400)) || : ;;
    esac
    text=${BASH_REMATCH[3]}
  done
  if [[ -n $text ]] || ((SECONDS_OF == 0)); then
    die "$EX_USER" "--$1=$2: expected a time such as 90s, 30m, 6h or 2d"
  fi
}

# -- words ----------------------------------------------------------------------------------------

# quote WORD...: the words as one line that any shell reads back as they are, in QUOTED. Single
# quotes do that in every POSIX shell; bash's %q needs bash at the other end.
quote() {
  local word
  QUOTED=""
  for word; do
    if [[ -z $word || $word == *[!A-Za-z0-9_./:=,@%+-]* ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    QUOTED+="${QUOTED:+ }$word"
  done
}

# field NAME WORDS: the value of NAME=VALUE among a marker's words, in FIELD; "-" if it is not there.
field() {
  FIELD=-
  [[ " $2 " =~ " $1="([^ ]*)" " ]] && FIELD=${BASH_REMATCH[1]}
  return 0
}

# -- arguments ------------------------------------------------------------------------------------

declare -A OPT=()
MANY=()  # NAME=VALUE of options that may be given several times
WORDS=() # what stands behind --

# parse SPEC ARGUMENT...: SPEC names the options: `name=` takes a value, `env*=` several, `keep` none.
parse() {
  local spec=" $1 dry-run " name
  shift
  while (($#)); do
    name=${1%%=*}
    name=${name#--}
    case $1 in
      --)
        shift
        WORDS=("$@")
        break
        ;;
      --help | -h)
        help
        trap - EXIT
        rm -rf "$TMP"
        exit 0
        ;;
      --*=*)
        if [[ $spec == *" $name= "* ]]; then
          OPT[$name]=${1#*=}
        elif [[ $spec == *" $name*= "* ]]; then
          MANY+=("${1#--}")
        elif [[ $spec == *" $name "* ]]; then
          die "$EX_USER" "$1: expected --$name, without a value"
        else
          unknown_option "$1" "$spec"
        fi
        ;;
      --*)
        if [[ $spec == *" $name "* ]]; then
          OPT[$name]=1
        elif [[ $spec == *" $name= "* || $spec == *" $name*= "* ]]; then
          die "$EX_USER" "$1: expected --$name=VALUE"
        else
          unknown_option "$1" "$spec"
        fi
        ;;
      *) die "$EX_USER" "$1: expected --key=value options, and a command behind --" ;;
    esac
    shift
  done
  DRY=${OPT["dry-run"]:-}
}

unknown_option() {
  local spec=${2//\*/}
  spec=${spec# }
  spec=${spec% }
  die "$EX_USER" "$1: no such option, expected one of --${spec// / --}"
}

# option NAME [DEFAULT]: an option's value, or that of the variable CIR_NAME, or DEFAULT, in VALUE.
option() {
  local variable=CIR_${1^^}
  variable=${variable//-/_}
  VALUE=${OPT[$1]:-${!variable:-${2:-}}}
}

# need NAME: as `option`, but there must be one.
need() {
  option "$1"
  [[ -n $VALUE ]] || die "$EX_USER" "--$1: is missing (or set CIR_${1^^})"
}

# need_name: the name of a slice or run, in NAME.
need_name() {
  need name
  NAME=$VALUE
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die "$EX_USER" "--name=$NAME: expected at most 63 of a-z, 0-9 and -, a letter first, no - last"
}

# owner: who one is, as a label's value, in ME.
owner() {
  option owner "${USER:-$(id -un)}"
  ME=${VALUE,,}
  ME=${ME//[^a-z0-9_-]/-}
  ME=${ME:0:63}
}

# -- gcloud ---------------------------------------------------------------------------------------

# gc ARGUMENT...: gcloud with these arguments; what it wrote is in $OUT and $ERR.
gc() {
  if [[ -n $DRY ]]; then
    quote gcloud "$@"
    printf '%s\n' "$QUOTED"
    : >"$OUT"
    : >"$ERR"
    return 0
  fi
  local code=0
  timeout -k 5 "$CALL_TIMEOUT" gcloud "$@" >"$OUT" 2>"$ERR" &
  CHILD=$!
  wait "$CHILD" || code=$?
  CHILD=""
  ((code != 124)) || echo "timed out after $CALL_TIMEOUT s" >>"$ERR"
  return "$code"
}

# classify: what kind of error the last call's text tells of, in CLASS. Codes do not tell: 8 stands
# for no capacity in the zone and in the reservation alike.
classify() {
  local text
  text=$(<"$ERR")$'\n'$(head -c 4000 "$OUT")
  CLASS=unknown
  shopt -s nocasematch
  if [[ $text =~ capacity|"not have enough resources"|resource_pool_exhausted|stock-?out ]]; then
    CLASS=stockout
  elif [[ $text =~ quota|"limit exceeded" ]]; then
    CLASS=quota
  elif [[ $text =~ resource_exhausted ]]; then
    CLASS=stockout
  elif [[ $text =~ already_exists|"already exists"|"code=409"|"error 409" ]]; then
    CLASS=exists
  elif [[ $text =~ "has terminal state"|"has state "|"is in state "?.?(preempted|terminated|stopp|deleting|suspended) ]]; then
    CLASS=gone
  elif [[ $text =~ not_found|"not found"|"could not be found"|"could not find"|"does not exist"|"code=404"|"error 404"|"httperror 404" ]]; then
    CLASS=notfound
  elif [[ $text =~ unauthenticated|reauthentication|"active account"|"refreshing your current auth"|"auth login"|"invalid_grant" ]]; then
    CLASS=auth
  elif [[ $text =~ permission_denied|permission.*denied.*for|"does not have permission"|forbidden|"code=403"|"error 403" ]]; then
    CLASS=permission
  elif [[ $text =~ invalid_argument|"invalid value"|"invalid argument"|"unrecognized arguments"|"must be specified"|failed_precondition|"code=400"|"error 400"|"invalid choice" ]]; then
    CLASS=invalid
  elif [[ $text =~ unavailable|internal|deadline_exceeded|"deadline exceeded"|aborted|"timed out"|timeout|connection|"could not resolve"|network|"try again"|"error 5"[0-9][0-9]|"code=5"[0-9][0-9]|"[255]"|"exit code 255"|"return code 255"|"code=429"|"broken pipe" ]]; then
    CLASS=transient
  fi
  shopt -u nocasematch
}

# error_line: the line of the last call's text to show to people, in LINE.
error_line() {
  LINE=$(grep -E -m1 'ERROR|rror:' "$ERR" || grep -v '^$' "$ERR" | tail -n 1 || :)
  LINE=${LINE:0:300}
}

# gc_retry ARGUMENT...: as gc, again after errors that may pass; CLASS tells of the last one.
gc_retry() {
  local try code
  for ((try = 1; ; try++)); do
    code=0
    gc "$@" || code=$?
    ((code != 0)) || return 0
    classify
    [[ $CLASS == transient || $code == 255 || $code == 124 ]] || return "$code"
    ((try < TRIES)) || return "$code"
    error_line
    log "gcloud ended with $code, once more: $LINE"
    pause "$try"
  done
}

# die_of_gcloud WHAT: ends with the last call's text and the code of its class.
die_of_gcloud() {
  local code=1
  classify
  error_line
  case $CLASS in
    auth | permission | invalid | quota | notfound) code=$EX_USER ;;
    stockout | transient | gone) code=$EX_RETRY ;;
  esac
  die "$code" "$1: $CLASS: $LINE"
}
