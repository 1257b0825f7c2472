#!/usr/bin/env bash
# Inside the container: train TwHIN. What follows the command is passed on, and wins over what is given here.
# exec, so that a signal to the container reaches torchrun, which passes it to its ranks.
exec torchrun --standalone --nnodes 1 --nproc_per_node "${PET_NPROC_PER_NODE:-1}" \
  /usr/src/app/tml/projects/twhin/run.py \
  --config_yaml_path=/usr/src/app/tml/projects/twhin/config/local.yaml \
  --save_dir=/root/tmp/runs/twhin "$@"
