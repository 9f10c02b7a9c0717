#!/usr/bin/env bash
# Starts a run on a slice that is there, or joins it, and follows its log.
help() {
  cat <<'TEXT'
run.sh --name=NAME --zone=ZONE [options] -- cir-jax train CONFIG [key.path=value ...]

Starts the command on all workers, under a supervisor that outlives this connection, and follows
worker 0's log. The same name again: joins a run that goes on; resumes one that was stopped; leaves
one that is done. Ctrl-C ends the following, not the run (stop.sh does).

  --name=NAME      of the slice
  --zone=ZONE,...  where it is
  --type=TYPE      of the slice, if gcloud does not say it; --nodes=N slices of a multislice job
  --run=RUN        name of the run (default: that of the slice)
  --bucket=gs://B  where checkpoints go (B/RUN/checkpoints) and, each minute, status, log and what the
                   run directory has of this slice (B/RUN/run/TIME)
  --run-dir=DIR    the run's directory on the workers (default: runs/RUN)
  --retries=N      restarts in a row without a newer checkpoint (default: 3)
  --grace=TIME     from SIGTERM to SIGKILL (default: 120s)
  --env=NAME=VALUE a variable for the command; may be given several times
  --env-file=FILE  of such lines on the workers, for secrets
  --detach         does not follow
  --again          also a run that is done, or that failed by the user's error
  --source=DIR --python=PATH   as setup.sh
  --dry-run        prints the commands, calls nothing

A command that trains gets run_dir=DIR, resume=true and checkpoint.dir, if it does not say otherwise.
Exit codes: the run's own; 75 the slice is lost, try again; 130 stopped.

Example:
  tpu_scripts/run.sh --name=cir7b --zone=us-west4-a --bucket=gs://mine/runs -- \
    cir-jax train configs/cir_qwen2.5_math_7b.toml
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
source "$HERE/workers.sh"
parse "$SLICE_OPTIONS $SETUP_OPTIONS $RUN_OPTIONS detach" "$@"
slice_options
option source "$SOURCE"
SOURCE=$VALUE
run_options
if ((DEVICES > 0)); then training; fi
must_be_active
if [[ -z ${CHECKED:-} ]]; then training; fi
setup || die "$EX_RETRY" "$NAME: not all workers answer; the same command tries again"
start
report_start || die "$EX_RETRY" "$RUN_NAME: not on all workers; the same command tries again"
[[ -z ${OPT[detach]:-} ]] || exit 0
trap 'log "the run goes on; the same command joins it, stop.sh ends it"; exit 130' INT
follow
case $OUTCOME in
  done) log "$RUN_NAME: done" ;;
  failed | stopped) log "$RUN_NAME: $OUTCOME with exit code $CODE" ;;
  again) CODE=$EX_RETRY && log "$RUN_NAME: pre-empted; the same command goes on" ;;
  lost) CODE=$EX_RETRY && log "$RUN_NAME: the slice is $STATE; watch.sh makes a new one" ;;
esac
exit "$CODE"
