#!/usr/bin/env bash
# Runs on TPU slices of a GKE cluster through xpk (github.com/AI-Hypercomputer/xpk), from the image of launch/Dockerfile.
#
# launch/gke.sh --name=NAME --cluster=CLUSTER --zone=ZONE --type=v5litepod-256 --image=REGION-docker.pkg.dev/PROJECT/REPO/hexa_jax:tpu \
#     [--restarts=N] [--dry-run] -- --config=configs/hexa_moco.py --workdir=gs://BUCKET/run
#
# Data and workdir are in a bucket, or on a file system that xpk mounts into all pods (xpk storage attach).
#
# --restarts  how often GKE may start it again after a preemption or a failure (10); each start resumes
# --dry-run   print the commands instead of running them
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
name="" cluster="" zone="" type="" image="" restarts=10
read_words "name cluster zone type image restarts" "" "$@"
need name cluster zone type image

cd "$(dirname "$0")/.."
run docker build --file=launch/Dockerfile --build-arg=JAX=tpu --tag="$image" .
run docker push "$image"
run xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" --tpu-type="$type" \
  --docker-image="$image" --max-restarts="$restarts" --command="python -m hexa_jax.main $(printf '%q ' "${words[@]}")"
