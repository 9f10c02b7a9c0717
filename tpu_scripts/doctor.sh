#!/usr/bin/env bash
# Says whether a launch can work.
help() {
  cat <<'TEXT'
doctor.sh --zone=ZONE[,ZONE...] --type=TYPE [--bucket=gs://B] [--price=USD] [--project=ID]

Checks what a launch needs: gcloud and python, account, project, an ssh key in the agent (several
workers need it), the type in the zones, the bucket's region, and whether slices of yours are alive,
with their cost and how to delete them.

  --dry-run   prints the commands, calls nothing

Exit codes: 0 a launch can work; 1 it cannot.

Example:
  tpu_scripts/doctor.sh --type=v5litepod-16 --zone=us-west4-a --bucket=gs://mine
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
parse "zone= type= project= bucket= price= owner= backend=" "$@"
owner
need type
slice_type "$VALUE"
place_options
bad=0
good() { log "ok    $*"; }
wrong() {
  log "WRONG $*"
  bad=1
}

if "$PYTHON" -c 'import sys, tomllib' 2>/dev/null; then
  good "$PYTHON has tomllib"
else
  wrong "$PYTHON: expected Python 3.11 or newer (or set CIR_LAUNCH_PYTHON)"
fi
for tool in tar gzip sha256sum timeout; do
  command -v "$tool" >/dev/null || wrong "$tool: is not installed (macOS: brew install coreutils gnu-tar)"
done
if [[ -z $DRY ]] && ! command -v gcloud >/dev/null; then
  wrong "gcloud: is not installed: https://cloud.google.com/sdk/docs/install"
  exit 1
fi
# value NAME: a property of gcloud's, in VALUE.
property() {
  VALUE=""
  gc config get-value "$1" || :
  VALUE=$(grep -v '^(unset)$' "$OUT" || :)
}
property account
if [[ -n $DRY || -n $VALUE ]]; then good "account ${VALUE:-}"; else wrong "account: none; run gcloud auth login"; fi
if [[ -z $PROJECT ]]; then
  property project
  if [[ -n $DRY || -n $VALUE ]]; then good "project ${VALUE:-}"; else wrong "--project: is missing, and gcloud has none"; fi
else
  good "project $PROJECT"
fi
if ((HOSTS > 1)) && [[ -z $DRY ]]; then
  if ssh-add -l >"$OUT" 2>&1; then
    good "an ssh key is in the agent"
  else
    wrong "ssh-agent: holds no key, so gcloud cannot reach $HOSTS workers: ssh-add ~/.ssh/google_compute_engine"
  fi
fi
for zone in "${ZONES[@]}"; do
  _tpu accelerator-types list "--zone=$zone" --format=json
  if ! gc_retry "${CALL[@]}"; then
    error_line
    wrong "zone $zone: $CLASS: $LINE"
  elif [[ -n $DRY ]] || grep -q "\"$ACCELERATOR\"" "$OUT"; then
    good "$ACCELERATOR is in $zone"
  else
    wrong "$ACCELERATOR: is not offered in $zone"
  fi
done
option bucket
if [[ -n $VALUE ]]; then
  bucket=${VALUE#gs://}
  bucket=${bucket%%/*}
  if ! gc_retry storage buckets describe "gs://$bucket" --format=json; then
    error_line
    wrong "gs://$bucket: $CLASS: $LINE"
  elif [[ -z $DRY ]]; then
    place=$(sed -n 's/^ *"location": *"\([^"]*\)".*$/\1/p' "$OUT" | head -n 1)
    for zone in "${ZONES[@]}"; do
      region=${zone%-*}
      if [[ ${place,,} == "$region" || ${place,,} == "${region%%-*}" ]]; then
        good "gs://$bucket is in $place, near $zone"
      else
        wrong "gs://$bucket is in ${place:-an unknown place}, not in $region: slow, and traffic costs"
      fi
    done
  fi
fi
option price
for zone in "${ZONES[@]}"; do
  be_list "$zone"
  now
  while read -r name where state type nodes run owner expires; do
    [[ $run != - && $owner == "$ME" ]] || continue
    cost=""
    chips=$( (slice_type "$type" && echo $((CHIPS * nodes))) 2>/dev/null || echo "?")
    [[ -z $VALUE || $chips == "?" ]] || cost=", $(awk "BEGIN {printf \"%.2f\", $chips * $VALUE}") an hour"
    log "note  $name is $state in $where: $chips chips$cost; tpu_scripts/delete.sh --name=$name --zone=$where"
  done <"$TMP/slices"
done
log "note  the workers' own end of a slice (--ttl) needs a service account that may delete it (roles/tpu.admin)"
((! bad)) || die 1 "a launch cannot work yet"
