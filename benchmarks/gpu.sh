#!/usr/bin/env bash
# Everything that is measured on a GPU, one part after the other; a part that fails or takes too long does not stop the others.
#
# benchmarks/gpu.sh [--out=FOLDER] [--python=.venv/bin/python] [--parts=step,kmeans,claim,reference] [--tiny] [--dry-run]
#
# --out       rows, tables and runs, runs/gpu by default; the claim and the reference go on where they were
# --parts     step: training steps beside PyTorch; kmeans: all three heads of ImageNet; claim: plain methods beside HEXA on CIFAR-10;
#             reference: plain MoCo for 200 epochs, to compare with a public figure. By default step,kmeans
# --data      CIFAR-10 for the last two where tfds has none: folder:DIR or arrays:FILE.npz; its test set with --test
# --epochs    of each of the claim's runs, 200 by default
# --tiny      the same parts at a size for a CPU, in minutes: does every command work?
# --dry-run   print the commands instead of running them
#
# Wants the package's requirements, and torch for --parts=step. Exit code 1: a part failed; the last line says which.
set -uo pipefail

here="$(cd "$(dirname "$0")/.." && pwd)"
out=runs/gpu python=.venv/bin/python parts=step,kmeans data= test= epochs=200 tiny= dry=
for argument in "$@"; do
  case "$argument" in
    --out=*|--python=*|--parts=*|--data=*|--test=*|--epochs=*) name="${argument%%=*}"; printf -v "${name#--}" %s "${argument#*=}" ;;
    --tiny) tiny=1 ;;
    --dry-run) dry=1 ;;
    --help|-h) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    *) echo "gpu.sh: unknown argument $argument; see --help" >&2; exit 2 ;;
  esac
done
for part in ${parts//,/ }; do
  case "$part" in
    step|kmeans|claim|reference) ;;
    *) echo "gpu.sh: unknown part $part; see --help" >&2; exit 2 ;;
  esac
done
cd "$here" || exit 2
failed=()

# part NAME SECONDS WORD...: runs a command with a time limit.
part() {
  local name="$1" seconds="$2"
  shift 2
  if [ -n "$dry" ]; then printf '%q ' timeout "$seconds" "$@"; echo; return; fi
  echo "== $name: $*"
  timeout "$seconds" "$@" || failed+=("$name (exit code $?)")
}

source_words=()
if [ -n "$data" ]; then source_words+=("--config.data.source=$data"); fi
if [ -n "$test" ]; then source_words+=("--config.data.eval_source=$test"); fi
step=("$python" benchmarks/step.py --peer "--rows=$out/step.json")
claim=("$python" -m hexa_jax.experiments claim "--workdir=$out/claim")
reference=("$python" -m hexa_jax.main --config=configs/cifar10_moco_v2.py "--workdir=$out/reference")
for name in ${parts//,/ }; do
  case "$name$tiny" in
    step)
      for case in moco_resnet50 moco_resnet18 deepcluster_8crop; do part "step $case" 900 "${step[@]}" "--cases=$case"; done ;;
    step1) part "step tiny" 600 "${step[@]}" --cases=tiny_moco,tiny_8crop --repeats=2 --turn-seconds=0.1 ;;
    kmeans)
      part kmeans 300 "$python" benchmarks/kmeans.py --points=1281167 --clusters=3000 --heads=3 "--rows=$out/kmeans.json" ;;
    kmeans1) part kmeans 300 "$python" benchmarks/kmeans.py --points=3000 --clusters=30 --heads=3 "--rows=$out/kmeans.json" ;;
    claim)
      part claim 86400 "${claim[@]}" --preset=cifar10 --methods=moco,deepcluster --seeds=0,1,2 "${source_words[@]}" \
        --config.precision=bfloat16 --config.knn.every_epochs=0 "--config.epochs=$epochs" ;;
    claim1)
      part claim 1200 "${claim[@]}" --preset=tiny --methods=moco --seeds=0,1 --config.data.shapes_count=64 ;;
    reference) part reference 86400 "${reference[@]}" "${source_words[@]}" --config.precision=bfloat16 ;;
    reference1)
      part reference 1200 "${reference[@]}" --config.data.source=shapes:train --config.data.eval_source=shapes:test \
        --config.data.shapes_count=64 --config.data.shapes_size=32 --config.epochs=1 --config.batch_size=16 \
        --config.shuffle_block=16 --config.moco.queue_size=64 --config.model.base_channels=4 ;;
  esac
done
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'failed: %s\n' "$(IFS=,; echo "${failed[*]}")"
  exit 1
fi
