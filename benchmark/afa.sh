#!/usr/bin/env bash
# The runs behind docs/afa.md on the embedded data: bash benchmark/afa.sh, about an hour on two CPU cores.
# PGD-AT has 16 epochs for the price of AFA's 8 + 2: its steps lack the second half batch and the probe pass.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    python afa.py --seed $seed
    python afa.py --seed $seed --bn single --epochs 16
    python afa.py --seed $seed --bn single --eps 0
done
python benchmark/collect.py results/afa.csv runs/digits__afa__*
