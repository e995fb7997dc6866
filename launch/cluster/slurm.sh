#!/usr/bin/env bash
# A Ray cluster on the nodes of a Slurm job, and a run on it: sbatch launch/cluster/slurm.sh launch/gsm8k.toml --model ...
# Run it in the checkout, on a file system where all nodes see its .venv. A job that is requeued continues its run.
#SBATCH --job-name=rlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

bin="$PWD/.venv/bin"
run="${RUN:-$PWD/runs/slurm-$SLURM_JOB_ID}"
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head_address="$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname --ip-address | awk '{print $1}')"
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs can share a node

export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-16}" # srun does not inherit it from sbatch
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}"

srun --nodes=1 --ntasks=1 -w "${nodes[0]}" \
  "$bin/ray" start --head --node-ip-address="$head_address" --port="$port" --block &
for node in "${nodes[@]:1}"; do
  sleep 5 # until the head node listens
  srun --nodes=1 --ntasks=1 -w "$node" "$bin/ray" start --address="$head_address:$port" --block &
done

export RAY_ADDRESS="$head_address:$port"
for _ in $(seq 60); do
  "$bin/ray" status > /dev/null 2>&1 && break
  sleep 2
done
"$bin/rlora" train "$@" --resume "$run" & # starts the run if none exists yet
driver=$!
trap 'kill -TERM "$driver"; wait "$driver"' TERM # Slurm's signal before the time limit: the run saves its state
wait "$driver"
