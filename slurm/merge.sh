# shellcheck shell=bash
# Sourced by sweep.sh and distill.sh: a run's own settings win over those of the whole sweep.
merge() { # COMMON ... -- OWN ...: `merged` gets the common arguments, less settings that are in OWN too, then OWN
  local argument skip=0 common=()
  while [ "$1" != -- ]; do
    common+=("$1")
    shift
  done
  shift
  local own=" $* "
  merged=() # read by the script that sources this file
  for argument in "${common[@]}"; do
    if [[ $argument == --* ]]; then
      [[ ${own//=/ } == *" ${argument%%=*} "* ]] && skip=1 || skip=0
    fi
    [ "$skip" = 1 ] || merged+=("$argument")
  done
  merged+=("$@")
}
