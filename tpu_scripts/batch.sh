#!/usr/bin/env bash
# CPU work on Google Cloud Batch.
help() {
  cat <<'TEXT'
batch.sh --name=NAME --region=REGION --bucket=gs://B (--tasks=N -- COMMAND | --jobs=FILE) [options]

Submits a Google Cloud Batch job for what needs no accelerator: preparing data, scoring saved
rollouts. The code goes to the bucket once per content; the bucket is mounted at /mnt/bucket. Task i
of N runs COMMAND with {index} and {count} replaced; with --jobs, line i of FILE. Only tasks that
were pre-empted (50001) or ask for it (75) run again, three times at most.

  --machine=TYPE   (default: e2-standard-4)   --cpus=N, --memory=MIB of a task (default: 4, 14000)
  --parallel=N     tasks at a time (default: 10)
  --time=TIME      limit of a task, after which it is ended (default: 1h)
  --source=DIR, --project=ID
  --job-file=FILE  only writes job.json there
  --dry-run        prints the commands and job.json, calls nothing

Example:
  tpu_scripts/batch.sh --name=score --region=us-west4 --bucket=gs://mine --tasks=20 -- \
    python -m my.scoring --shard={index} --of={count} --out=/mnt/bucket/scores
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
source "$HERE/workers.sh"
parse "name= region= bucket= tasks= jobs= machine= cpus= memory= parallel= time= source= project= job-file=" "$@"
need_name
need region
REGION=$VALUE
need bucket
BUCKET=${VALUE%/}
[[ $BUCKET == gs://?* ]] || die "$EX_USER" "--bucket=$BUCKET: expected gs://NAME"
option project
PROJECT=$VALUE
# number OPTION DEFAULT: a positive number, in VALUE.
number() {
  option "$@"
  [[ $VALUE =~ ^[1-9][0-9]*$ ]] || die "$EX_USER" "--$1=$VALUE: expected a number from 1 on"
}
number tasks 1
tasks=$VALUE
number parallel 10
parallel=$VALUE
number cpus 4
cpus=$((VALUE * 1000))
number memory 14000
memory=$VALUE
option time 1h
seconds time "$VALUE"
option machine e2-standard-4
machine=$VALUE
option jobs
jobs=$VALUE
[[ -z $jobs || -f $jobs ]] || die "$EX_USER" "--jobs=$jobs: no such file"
[[ -n $jobs || ${#WORDS[@]} -gt 0 ]] || die "$EX_USER" "-- COMMAND or --jobs=FILE: one is missing"
BE_INSTALLS=1
pack
option job-file "$TMP/job.json"
file=$VALUE
"$PYTHON" -S "$HERE/launch.py" batch "$tasks" "$jobs" "$parallel" "$machine" "$cpus" "$memory" \
  "$SECONDS_OF" "$BUCKET" "$SHA" "$NAME" "${WORDS[@]}" >"$file" || exit
[[ -z ${OPT["job-file"]:-} ]] || exit 0
project=()
[[ -z $PROJECT ]] || project=("--project=$PROJECT")
gc_retry storage cp "$TARBALL" "$BUCKET/code/cir-$SHA.tar.gz" --no-clobber "${project[@]}" ||
  die_of_gcloud "cannot copy the code to $BUCKET"
[[ -z $DRY ]] || cat "$file"
if ! gc_retry batch jobs submit "$NAME" "--location=$REGION" "--config=$file" "${project[@]}"; then
  [[ $CLASS == exists ]] || die_of_gcloud "cannot submit $NAME"
  log "$NAME: is there already"
fi
log "$NAME: gcloud batch jobs describe $NAME --location=$REGION"
