#!/bin/bash
# Many runs as one job array, and a table of their results. From the repository's root, on a login node:
#
#   bash slurm/sweep.sh [--at-once=K] [--OPTION=VALUE of sbatch ...] GRID RECIPE [--section.field value ...]
#
# GRID is a text file with one run per line: its name, then the settings that are its own, which win over those
# of the command line.
#
#   dss-0  --objective.method dss --run.seed 0
#   ib-0   --objective.method ib  --run.seed 0
#
# Empty lines and lines that start with # do not count; values hold no spaces. A loop writes one:
#   for m in dss ib; do for s in 0 1 2; do echo "$m-$s --objective.method $m --run.seed $s"; done; done > grid.txt
#
# At most K (4) runs at a time. Runs are in runs/GRID/NAME, Slurm's logs in runs/GRID/logs, and once all runs
# have ended, well or not, a table in runs/GRID/table.txt; SWEEP_DIR is another place than runs/GRID. The same
# command again runs what has no result.json yet, each from its last checkpoint.
set -eo pipefail
fail() {
  echo "error: $*" >&2
  exit 2
}
elements() { # LINE_NUMBER NAME SETTINGS... of each run of a grid
  awk 'NF && $1 !~ /^#/ { print NR, $0 }' "$1"
}
[ -f ibdistill/train.py ] || fail "$PWD is not the repository's root; start from there"
source slurm/env.sh
source slurm/merge.sh
set -u

table() { # FOLDER
  local finished=() missing=() name
  while read -r _ name _; do
    if [ -f "$1/$name/result.json" ]; then finished+=("$1/$name"); else missing+=("$name"); fi
  done < <(elements "$1/grid.txt")
  {
    [ ${#finished[@]} -eq 0 ] || python tools/compare_runs.py "${finished[@]}"
    [ ${#missing[@]} -eq 0 ] || echo "no result: ${missing[*]}; see $1/logs and run the sweep again"
  } | tee "$1/table.txt"
}
if [ "${1:-}" = --table ]; then # the dependent job
  table "$2"
  exit
fi

options=() shared=() at_once=4
while [[ "${1:-}" == -* ]]; do
  case $1 in
    --at-once=*) at_once=${1#*=} ;;
    --array=* | --output=* | --dependency=*) fail "${1%%=*} is the sweep's own" ;;
    --account=* | --partition=* | --qos=* | --reservation=*) options+=("$1") shared+=("$1") ;;
    --*=*) options+=("$1") ;;
    *) fail "'$1': write sbatch's options as --OPTION=VALUE" ;;
  esac
  shift
done
[ $# -ge 2 ] || fail "usage: slurm/sweep.sh [--at-once=K] [--OPTION=VALUE ...] GRID RECIPE [--section.field value ...]"
[[ $at_once =~ ^[1-9][0-9]*$ ]] || fail "--at-once is '$at_once'; it must be a whole number above 0"
grid=$1
shift
[ -f "$grid" ] || fail "no grid file $grid"
name=$(basename "$grid")
folder=${SWEEP_DIR:-runs/${name%.*}}
export IBDISTILL_SWEEP=$folder # distill.sh takes its line from there

if [ -f "$folder/job" ] && [ -n "$(squeue --noheader --jobs="$(cat "$folder/job")" 2> /dev/null)" ]; then
  fail "$folder is being worked on by job $(cat "$folder/job"); wait for it, or scancel it first"
fi
names=$(elements "$grid" | awk '{ print $2 }')
twice=$(sort <<< "$names" | uniq -d | xargs)
[ -n "$names" ] || fail "$grid has no run"
[ -z "$twice" ] || fail "$grid has more than one run with the name: $twice"
todo=()
while read -r number name rest; do
  [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._=,+-]*$ ]] ||
    fail "$grid:$number: '$name' is no name for a run; start the line with one of letters, digits and . _ = , + -"
  [ ! -f "$folder/$name/result.json" ] || continue
  read -r -a settings <<< "$rest"
  merge "$@" -- "${settings[@]}" --run.dir "$folder/$name"
  python slurm/check_settings.py run "${merged[@]}" > /dev/null < /dev/null ||
    fail "$grid:$number: run $name has wrong settings"
  todo+=("$number")
done < <(elements "$grid")

mkdir -p "$folder/logs"
cmp -s "$grid" "$folder/grid.txt" || cp "$grid" "$folder/grid.txt"
if [ ${#todo[@]} -eq 0 ]; then
  echo "all runs of $folder are finished"
  table "$folder"
  exit
fi
numbers=$(IFS=, && echo "${todo[*]}")
job=$(sbatch --parsable "${options[@]}" --array="$numbers%$at_once" --output="$folder/logs/%A_%a.log" slurm/distill.sh "$@")
echo "$job" > "$folder/job"
sbatch --parsable "${shared[@]}" --job-name=ibdistill-table --time=10 --dependency="afterany:$job" \
  --output="$folder/logs/table-%j.log" slurm/sweep.sh --table "$folder" > /dev/null
echo "job $job: ${#todo[@]} of $(wc -l <<< "$names") runs, at most $at_once at a time (lines $numbers of $grid)"
echo "logs: $folder/logs/${job}_LINE.log   table: $folder/table.txt   stop: scancel $job"
