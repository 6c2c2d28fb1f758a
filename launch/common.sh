# shellcheck shell=bash
# What launch scripts share, to be sourced; slurm.sh has its own, because sbatch runs a copy of it elsewhere.

script="${0##*/}" dry="" words=()

mistake() {
  echo "$script: $1" >&2
  exit 2
}

# read_words NAMES SWITCHES WORD...: --NAME=VALUE sets the variable NAME, --SWITCH sets SWITCH to 1; `words` are those behind --.
read_words() {
  local with_value=" $1 " switches=" $2 " option
  shift 2
  while [ $# -gt 0 ]; do
    option="${1#--}" option="${option%%=*}"
    case "$1" in
      --) shift; words=("$@"); return ;;
      --help|-h) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
      --dry-run) dry=1 ;;
      --*=*) known "$option" "$with_value" "$1"; printf -v "$option" %s "${1#*=}" ;;
      *) known "$option" "$switches" "$1"; printf -v "$option" 1 ;;
    esac
    shift
  done
}

# known OPTION LIST ARGUMENT: the option is one of the list.
known() {
  [[ "$3" = --* && "$2" = *" $1 "* ]] || mistake "unknown argument $3; see --help"
}

# need NAME...: these have a value, and there are words of a run.
need() {
  local needed
  for needed in "$@"; do
    [ -n "${!needed}" ] || mistake "--$needed is missing; see --help"
  done
  [ "${#words[@]}" -gt 0 ] || mistake "nothing to run: words for hexa_jax.main come after --"
}

# run WORD...: the command, or its words on a line with --dry-run.
run() {
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
