#!/usr/bin/env bash
# Finds slices whose time is over.
help() {
  cat <<'TEXT'
reap.sh --zone=ZONE[,ZONE...] [--delete] [--all]

Lists your slices with what is left of their time (label cir-expires), and deletes those whose time is
over or that FAILED or were SUSPENDED: they hold quota. It needs no memory of what was launched, so it
also finds what a killed launcher left. For cron: */15 * * * * tpu_scripts/reap.sh --zone=... --delete

  --zone=ZONE,...  where to look; - for all zones
  --delete         deletes them (default: only says which)
  --all            every slice with a cir-run label, not only yours (--owner=NAME)
  --dry-run        prints the commands, calls nothing

Exit codes: 0; 1 a slice could not be deleted; 3 without --delete: there are some to delete.

Example:
  tpu_scripts/reap.sh --zone=us-west4-a,europe-west4-b --delete
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
parse "zone= project= backend= owner= delete all" "$@"
owner
place_options
left=0 failed=0
for zone in "${ZONES[@]}"; do
  be_list "$zone"
  now
  while read -r name where state type nodes run owner expires; do
    [[ $run != - ]] || continue
    [[ $owner == "$ME" || $owner == - || -n ${OPT[all]:-} ]] || continue
    over="" told="no end"
    if [[ $expires =~ ^[0-9]+$ ]]; then
      told="$(((expires - NOW) / 60)) min left"
      if ((expires <= NOW)); then over=1 told="its time is over"; fi
    fi
    [[ $state != FAILED && $state != SUSPENDED ]] || over=1 told="holds quota"
    log "$name ($where, $type x $nodes, $owner): $state, $told"
    [[ -n $over ]] || continue
    if [[ -z ${OPT[delete]:-} ]]; then
      left=1
      log "  tpu_scripts/delete.sh --name=$name --zone=$where --owner=$owner"
    else
      # One that is not deleted must not keep the others.
      NAME=$name STATE=$state
      (
        trap - EXIT
        delete "$name" "$where"
      ) || failed=1
    fi
  done <"$TMP/slices"
done
((! failed)) || die 1 "not all were deleted"
((! left)) || exit 3
