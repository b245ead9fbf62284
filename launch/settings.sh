# shellcheck shell=bash
# What the launch scripts have in common: settings, refusals, dry runs. Sourced by them, not run.

# die MESSAGE: says what is wrong, and ends with code 2.
die() {
  echo "launch/${0##*/}: $1 (--help tells more)" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "needs bash 4.4 or newer, and this is $BASH_VERSION"

# read_settings NAME... -- ARGUMENT...: fills the variables NAME, which hold their defaults.
# Setting docker_image comes from --docker-image=…, else from the variable NMM_DOCKER_IMAGE of the environment. Sets
# dry_run, and command to what comes after the arguments' own --. Calls usage, which the script defines, for --help.
read_settings() {
  local _settings=' ' _setting # a plain name would hide a setting of that name
  while [[ $1 != -- ]]; do
    _settings+="$1 "
    _setting=NMM_${1^^}
    [[ -z ${!_setting-} ]] || printf -v "$1" %s "${!_setting}"
    shift
  done
  shift
  dry_run='' command=()
  while (($#)); do
    case $1 in
      --) command=("${@:2}") && return ;;
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=1 ;;
      --*=*)
        _setting=${1%%=*} _setting=${_setting#--} _setting=${_setting//-/_}
        [[ $_settings == *" $_setting "* ]] || die "unknown setting '${1%%=*}'"
        printf -v "$_setting" %s "${1#*=}"
        ;;
      *) die "unknown argument '$1'; settings are written --name=value, and the training command comes after --" ;;
    esac
    shift
  done
}

# require NAME...: refuses settings that are empty, all at once. The name `command` stands for what comes after --.
require() {
  local _setting _missing=''
  for _setting; do
    if [[ $_setting == command ]]; then
      ((${#command[@]})) || _missing+=", a training command after --"
    elif [[ -z ${!_setting-} ]]; then
      _missing+=", --${_setting//_/-} (or NMM_${_setting^^})"
    fi
  done
  [[ -z $_missing ]] || die "missing: ${_missing#, }"
}

# require_count NAME...: refuses settings that are not positive whole numbers.
require_count() {
  local _setting
  for _setting; do
    [[ ${!_setting} =~ ^[1-9][0-9]*$ ]] || die "--${_setting//_/-}=${!_setting} is not a positive number"
  done
}

# quoted WORD...: one text that any POSIX shell reads back as these words.
quoted() {
  local word flag line='' quote="'\\''"
  for word; do
    flag=''
    [[ ! $word =~ ^--[A-Za-z0-9_.-]+= ]] || flag=${BASH_REMATCH[0]} # --flag='a b' rather than '--flag=a b'
    word=${word#"$flag"}
    [[ $flag$word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//"'"/"$quote"}'"
    line+=" $flag$word"
  done
  printf '%s\n' "${line# }"
}

# run WORD...: runs the command; under --dry-run prints it instead.
run() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
  else
    "$@"
  fi
}
