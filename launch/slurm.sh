#!/usr/bin/env bash
# A run over the GPUs of several nodes, one process a GPU; srun tells each process its place. A job that SLURM ends early saves
# and is queued again.
#
# sbatch --nodes=4 launch/slurm.sh --config=configs/hexa_moco.py --workdir=/shared/runs/hexa_moco
# launch/slurm.sh --dry-run ...       prints the command instead
#SBATCH --job-name=hexa_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

dry=""
case "${1:-}" in --help|-h) sed -n '2,/^#SBATCH/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;; esac
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
if [ $# -eq 0 ]; then echo "slurm.sh: words for hexa_jax.main are missing" >&2; exit 2; fi
python="${HEXA_PYTHON:-.venv/bin/python}"
command=(srun --kill-on-bad-exit=0 --wait=60 "$python" -m hexa_jax.main "$@")
if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo; exit 0; fi
code=0
"${command[@]}" || code=$?
if [ "$code" -eq 143 ] && [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi  # saved: go on later
exit "$code"
