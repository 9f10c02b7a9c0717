#!/usr/bin/env bash
# The same run on processes of this machine.
help() {
  cat <<'TEXT'
local_pod.sh [--name=NAME] [--processes=N] [--devices=M] [options] -- cir-jax train CONFIG [key=value ...]

Runs the command as it would on a slice of N workers with M chips each: N processes with M virtual
CPU devices each, which find each other by JAX's coordinator, under the same supervisor. Prints the
log of process 0. Ctrl-C ends the run; the same command goes on with it.

  --name=NAME      of the run, and of its directory runs/NAME (default: local)
  --processes=N    (default: 2)
  --devices=M      virtual devices of each (default: 4)
  --retries=N, --grace=TIME, --env=NAME=VALUE, --run-dir=DIR, --again   as run.sh
  --dry-run        prints the commands, runs nothing

A config that names no mesh gets mesh.data=N*M.

Example:
  tpu_scripts/local_pod.sh --processes=2 --devices=4 -- cir-jax train configs/quickstart.toml
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
source "$HERE/workers.sh"
# Nothing is far away here.
POLL=${CIR_POLL:-1}
parse "name= processes= devices= owner= backend= $RUN_OPTIONS" "$@"
OPT["name"]=${OPT["name"]:-local}
option processes 2
processes=$VALUE
option devices 4
slice_type "local-${processes}x$VALUE" || exit
OPT["type"]=$ACCELERATOR
OPT["reserved"]=1
slice_options
create_options
SOURCE=$PWD
run_options
# A config that names no mesh is one for a single device: here its rows are shared by all.
mesh=$("$PYTHON" -S "$HERE/launch.py" mesh "$SOURCE" "$DEVICES" "${WORDS[@]}") || exit
[[ -z $mesh ]] || WORDS+=("$mesh")
training

on_exit() {
  [[ -n ${STARTED:-} ]] || return "$1"
  # Workers, their supervisors and all that they began: nothing stays.
  be_delete "$NAME" local
  return "$1"
}

ensure
STARTED=1
setup
start
report_start || die 1 "$RUN_NAME: cannot be started"
follow
[[ $OUTCOME != again && $OUTCOME != lost ]] || CODE=$EX_RETRY
exit "$CODE"
