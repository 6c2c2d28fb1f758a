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

name="" cluster="" zone="" type="" image="" restarts=10 dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --cluster=*) cluster="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    --help|-h) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    *) echo "gke.sh: unknown argument $1; see --help" >&2; exit 2 ;;
  esac
  shift
done
for needed in name cluster zone type image; do
  if [ -z "${!needed}" ]; then echo "gke.sh: --$needed is missing; see --help" >&2; exit 2; fi
done
if [ $# -eq 0 ]; then echo "gke.sh: nothing to run: words for hexa_jax.main come after --" >&2; exit 2; fi

run() {
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

cd "$(dirname "$0")/.."
run docker build --file=launch/Dockerfile --build-arg=JAX=tpu --tag="$image" .
run docker push "$image"
run xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" --tpu-type="$type" \
  --docker-image="$image" --max-restarts="$restarts" --command="python -m hexa_jax.main $(printf '%q ' "$@")"
