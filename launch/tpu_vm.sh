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

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
name="" zone="" type="" bucket="" version="v2-alpha-tpuv5-lite" project="" setup="" spot="" keep=""
read_words "name zone type bucket version project setup" "spot keep" "$@"
need name zone type bucket

tpu() {
  run gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+--project="$project"}
}
remove() {
  if [ -z "$keep" ]; then tpu delete "$name" --quiet; fi
}
not_created() {
  echo "$script: $name was not created, so nothing is deleted; see gcloud compute tpus tpu-vm list --zone=$zone" >&2
}

cd "$(dirname "$0")/.."
# A refused create may mean that the name is somebody else's machine: only what this script created is deleted.
trap not_created EXIT
tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
trap remove EXIT
run git archive --output=/tmp/hexa_jax.tar.gz HEAD
run gcloud storage cp /tmp/hexa_jax.tar.gz "$bucket/hexa_jax.tar.gz"
install="gcloud storage cp $(printf %q "$bucket/hexa_jax.tar.gz") . && mkdir -p hexa_jax && tar -xzf hexa_jax.tar.gz -C hexa_jax"
install+=" && python3 -m venv venv && venv/bin/pip install --quiet 'jax[tpu]' './hexa_jax[gcs]'"
if [ -n "$setup" ]; then tpu ssh "$name" --worker=all --command="$setup"; fi
tpu ssh "$name" --worker=all --command="$install"
tpu ssh "$name" --worker=all --command="cd hexa_jax && ../venv/bin/python -m hexa_jax.main $(printf '%q ' "${words[@]}")"
