#!/usr/bin/env bash
# Creates a TPU VM or pod slice, installs the project, runs a command on all its workers, shows the first one's output, deletes it.
#
# launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-64 --bucket=gs://BUCKET/FOLDER [--spot] [--keep] [--dry-run] -- \
#     --config=configs/hexa_moco.py --workdir=gs://BUCKET/run [--config.key=value ...]
#
# --bucket    the working tree travels through it
# --setup     a command that each worker runs first, such as one that mounts a disk for config.runtime.data_cache
# --version   of the TPU software; v2-alpha-tpuv5-lite by default, see cloud.google.com/tpu/docs/runtimes
# --project   of Google Cloud; gcloud's own default otherwise
# --spot      cheaper, and may be taken away; the same command then goes on where it was
# --keep      do not delete the TPU at the end
# --dry-run   print the commands instead of running them
set -euo pipefail

name="" zone="" type="" bucket="" version="v2-alpha-tpuv5-lite" project="" setup="" spot="" keep="" dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --bucket=*) bucket="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --setup=*) setup="${1#*=}" ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    --help|-h) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    *) echo "tpu_vm.sh: unknown argument $1; see --help" >&2; exit 2 ;;
  esac
  shift
done
for needed in name zone type bucket; do
  if [ -z "${!needed}" ]; then echo "tpu_vm.sh: --$needed is missing; see --help" >&2; exit 2; fi
done
if [ $# -eq 0 ]; then echo "tpu_vm.sh: nothing to run: words for hexa_jax.main come after --" >&2; exit 2; fi

run() {
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
tpu() {
  run gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+--project="$project"}
}
remove() {
  if [ -z "$keep" ]; then tpu delete "$name" --quiet; fi
}

cd "$(dirname "$0")/.."
trap remove EXIT
tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
run git archive --output=/tmp/hexa_jax.tar.gz HEAD
run gcloud storage cp /tmp/hexa_jax.tar.gz "$bucket/hexa_jax.tar.gz"
install="gcloud storage cp $(printf %q "$bucket/hexa_jax.tar.gz") . && mkdir -p hexa_jax && tar -xzf hexa_jax.tar.gz -C hexa_jax"
install+=" && python3 -m venv venv && venv/bin/pip install --quiet 'jax[tpu]' './hexa_jax[gcs]'"
if [ -n "$setup" ]; then tpu ssh "$name" --worker=all --command="$setup"; fi
tpu ssh "$name" --worker=all --command="$install"
words="$(printf '%q ' "$@")"
tpu ssh "$name" --worker=all --command="cd hexa_jax && ../venv/bin/python -m hexa_jax.main $words"
