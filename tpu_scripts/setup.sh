#!/usr/bin/env bash
# Brings code and packages to all workers of a slice and proves that they are the same.
help() {
  cat <<'TEXT'
setup.sh --name=NAME --zone=ZONE [--type=TYPE] [--source=DIR] [--python=PATH]

Packs this checkout (what git tracks, or would) into an archive named by its sha256, copies it to the
workers that lack it, installs its packages there, and compares what all workers have. The second
call finds everything in place and changes nothing.

  --name=NAME      of the slice
  --zone=ZONE,...  where it is
  --type=TYPE      of the slice, if gcloud does not say it; --nodes=N slices of a multislice job
  --source=DIR     checkout to bring (default: the one that this script is in)
  --python=PATH    an interpreter of the workers' image that has the packages (default: a new
                   environment, by uv)
  --dry-run        prints the commands, calls nothing

Exit codes: 0 ready; 2 no such slice; 75 a worker does not answer; 78 workers differ.

Example:
  tpu_scripts/setup.sh --name=cir7b --zone=us-west4-a
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$HERE/slices.sh"
source "$HERE/workers.sh"
parse "$SLICE_OPTIONS $SETUP_OPTIONS" "$@"
slice_options
must_be_active
setup || die "$EX_RETRY" "$NAME: not all workers answer; the same command tries again"
