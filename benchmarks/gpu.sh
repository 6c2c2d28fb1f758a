#!/usr/bin/env bash
# Measures on a machine with a GPU what docs/performance.md quotes: training steps beside PyTorch, and k-means at ImageNet's size.
#
# benchmarks/gpu.sh [--only=PART,...] [--limit=SECONDS] [--epochs=200] [--data=folder:DIR --test=folder:DIR] [--tiny] [--dry-run]
#                   [-- WORD ...]
#
# Installs nothing: jax for CUDA and PyTorch must be there, in .venv or where HEXA_PYTHON points. Rows go to $OUT/step.json and
# $OUT/kmeans.json (OUT: runs/gpu unless it is set), each as soon as it is measured. A part that fails does not stop the others.
# Two parts run only where --only names them, and go on where they were: reference, plain MoCo on CIFAR-10 for 200 epochs, to be
# compared with a public figure; and claim, MoCo and DeepCluster-v2 beside HEXA there, three seeds each.
#
# --only      parts of this list: moco_resnet50, moco_resnet18, deepcluster_8crop, kmeans, reference, claim
# --epochs    of each run of the claim
# --data      CIFAR-10 where tfds has none: folder:DIR or arrays:FILE.npz; its test set with --test
# --limit     seconds for a part, 1800 by default
# --tiny      everything in miniature, which a CPU does in minutes; parts: tiny_moco, tiny_8crop, kmeans, ...
# --dry-run   print the commands instead of running them
# WORD ...    more for benchmarks/step.py, such as --peer-python=/other/python or --variants=plain
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$0")/../launch/common.sh"
only="" limit=1800 epochs=200 data="" test="" tiny=""
read_words "only limit epochs data test" "tiny" "$@"
[[ "$limit" =~ ^[1-9][0-9]*$ ]] || mistake "--limit=$limit is no number of seconds"

cd "$(dirname "$0")/.."
out="${OUT:-runs/gpu}" python="${HEXA_PYTHON:-.venv/bin/python}"
parts=(moco_resnet50 moco_resnet18 deepcluster_8crop kmeans)
step=(--variants=plain,auxiliary,main,cutmix --repeats=7)
cifar=(${data:+"--config.data.source=$data"} ${test:+"--config.data.eval_source=$test"} --config.precision=bfloat16)
reference=("${cifar[@]}")
claim=(--preset=cifar10 --methods=moco,deepcluster --seeds=0,1,2 "${cifar[@]}" --config.knn.every_epochs=0 "--config.epochs=$epochs")
kmeans=(--points=1281167 --dim=128 --heads=3 --clusters=3000 --iterations=10 --repeats=3 --no-faiss)
if [ -n "$tiny" ]; then
  parts=(tiny_moco tiny_8crop kmeans)
  step=(--variants=plain,auxiliary,main,cutmix --repeats=1 --turn-seconds=0.05)
  claim=(--preset=tiny --methods=moco --seeds=0,1 --config.data.shapes_count=64)
  reference=(--config.data.source=shapes:train --config.data.eval_source=shapes:test --config.data.shapes_count=64
    --config.data.shapes_size=32 --config.epochs=1 --config.batch_size=16 --config.bn_group_size=16 --config.shuffle_block=16
    --config.moco.queue_size=64 --config.model.base_channels=4)
  kmeans=(--points=2000 --dim=16 --heads=3 --clusters=20 --iterations=2 --repeats=1 --no-faiss)
fi
if [ -n "$only" ]; then
  IFS=, read -r -a chosen <<< "$only"
  parts+=(reference claim)
  for part in "${chosen[@]}"; do
    [[ " ${parts[*]} " = *" $part "* ]] || mistake "--only=$part is not known: use ${parts[*]}"
  done
  parts=("${chosen[@]}")
fi

# timed WORD...: python with these words, stopped with all that it started once the limit has passed.
timed() {
  run timeout --kill-after=30 "$limit" "$python" "$@"
}

failed=()
for part in "${parts[@]}"; do
  [ -n "$dry" ] || printf '\n== %s ==\n' "$part"
  code=0
  if [ "$part" = kmeans ]; then
    timed benchmarks/kmeans.py "${kmeans[@]}" --rows="$out/kmeans.json" || code=$?
  elif [ "$part" = reference ]; then
    timed -m hexa_jax.main --config=configs/cifar10_moco_v2.py --workdir="$out/reference" "${reference[@]}" || code=$?
  elif [ "$part" = claim ]; then
    timed -m hexa_jax.experiments claim --workdir="$out/claim" "${claim[@]}" || code=$?
  else
    timed benchmarks/step.py --peer --cases="$part" "${step[@]}" --rows="$out/step.json" \
      ${words[@]+"${words[@]}"} || code=$?
  fi
  case "$code" in
    0) ;;
    124|137) failed+=("$part (not done within $limit s)") ;;
    *) failed+=("$part (exit code $code)") ;;
  esac
done
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'gpu.sh: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
