#!/bin/bash
# Pretraining on several machines of a Slurm cluster: sbatch configs/slurm.sh runs/big --size cluster
# Prepare the corpus first, outside of this job (it needs no GPU): llm_course run --size cluster --out runs/big --stages prepare,tokenizer
#SBATCH --job-name=llm_course
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8          # one process for each GPU; srun starts them, so that no launcher stands in between
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300            # five minutes before the end every process is told once: a checkpoint is written, status 130
#SBATCH --requeue                    # a job that is preempted comes back by itself
#SBATCH --open-mode=append           # and writes on in the same file
#SBATCH --output=llm_course-%j.log
set -uo pipefail

OUT=${1:?usage: sbatch slurm.sh FOLDER [options of llm_course pretrain]}
shift
[ -f .venv/bin/activate ] && source .venv/bin/activate

# Where the processes meet: the first machine of the job, at a port that other jobs are unlikely to have.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# What `accelerate launch --config_file configs/nodes_fsdp.yaml` would set. For DDP leave these three lines out.
export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_STATE_DICT_TYPE=FULL_STATE_DICT FSDP_RESHARD_AFTER_FORWARD=true
export FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP FSDP_TRANSFORMER_CLS_TO_WRAP=Block
export FSDP_CPU_RAM_EFFICIENT_LOADING=false FSDP_OFFLOAD_PARAMS=false FSDP_ACTIVATION_CHECKPOINTING=false
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}      # srun does not take it from sbatch since Slurm 22.05

# Each process learns who it is from Slurm; `exec` lets the signal reach Python itself. When one has ended, the others have two minutes.
srun --kill-on-bad-exit=0 --wait=120 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec python -m llm_course.cli pretrain --out "$@"' llm_course "$OUT" "$@"
status=$?

if [ "$status" -eq 130 ]; then       # stopped with a checkpoint: go on later, with the same job number
  echo "stopped at the time limit; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
