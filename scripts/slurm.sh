#!/usr/bin/env bash
# Template: fastppo on two nodes of eight GPUs. sbatch scripts/slurm.sh --env-id CartPole-v1 --vectorization tensor
#SBATCH --job-name=fastppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is set by sbatch}"
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# one torchrun per node, which starts one process per GPU
srun bash -c '.venv/bin/torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node 8 \
  --master-addr "$0" --master-port 29500 -m fastppo train "$@"' "$master" "$@"
