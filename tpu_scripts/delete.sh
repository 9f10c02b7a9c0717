#!/usr/bin/env bash
# Deletes a slice.
help() {
  cat <<'TEXT'
delete.sh --name=NAME --zone=ZONE[,ZONE...]

Deletes the slice, whatever its state, and waits until it is gone. One that is not there is gone.

  --dry-run   prints the commands, calls nothing

Exit codes: 0 it is gone; 1 it may still be there, and cost.

Example:
  tpu_scripts/delete.sh --name=cir7b --zone=us-west4-a
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
parse "$SLICE_OPTIONS" "$@"
slice_options
DRY_STATE=ACTIVE
for ZONE in "${ZONES[@]}"; do
  be_describe "$NAME" "$ZONE"
  if [[ $STATE == NONE ]]; then
    log "$NAME: is not in $ZONE"
    continue
  fi
  [[ $OWNER == - || $OWNER == "$ME" ]] ||
    die "$EX_USER" "--name=$NAME: is a slice of $OWNER's in $ZONE (--owner=$OWNER deletes it)"
  delete "$NAME" "$ZONE"
done
