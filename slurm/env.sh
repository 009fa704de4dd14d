# shellcheck shell=bash
# What is this site's own. Every template reads it in the batch shell, before anything else; edit it once, for all of them.
# Account, partition, time and GPUs are sbatch's: on its command line, or in conf/cluster/*.yaml for `python -m llm submit`.

# --- software ---------------------------------------------------------------------------------------------------------
# sbatch hands your environment on, an activated virtual environment too. Where it does not (--export=NONE), or for modules:
# module load python/3.11 cuda/12.8
# source "$HOME/llm/.venv/bin/activate"

# --- container --------------------------------------------------------------------------------------------------------
# Every process runs in this image: a .sif file by apptainer, anything else by enroot (pyxis), as nvcr.io#nvidia/pytorch:25.09-py3.
# LLM_CONTAINER=/shared/images/llm.sif        # conf/cluster: cluster.container
# LLM_CONTAINER_MOUNTS=/shared,/scratch       # folders that are to be seen in it, besides the working directory and the cache

# --- network ----------------------------------------------------------------------------------------------------------
# Of several networks the one that nodes reach each other by; the fast one is NCCL's to find (NCCL_IB_HCA=mlx5).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# What nodes need to reach the hub and W&B, if they do not reach them by themselves.
# export HTTPS_PROXY=http://proxy.example.org:3128

# --- storage ----------------------------------------------------------------------------------------------------------
# Where prepared data lies; all nodes have to see it, unless each is to prepare its own.
# export LLM_CACHE_DIR=/shared/$USER/llm-cache
# A folder on each node's own disk: before training what the run reads is copied there, once a node, and read from there.
# LLM_SCRATCH=${TMPDIR:-/tmp}/llm-$SLURM_JOB_ID
