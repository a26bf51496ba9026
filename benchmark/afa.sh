#!/usr/bin/env bash
# The runs behind docs/afa.md, one command a row.
#   bash benchmark/afa.sh          embedded data: about half an hour on two CPU cores
#   bash benchmark/afa.sh cifar    CIFAR-10 in a reduced setting (narrow network, 20,000 images, 3 attack steps): an hour
#   bash benchmark/afa.sh gpu      full size, for a GPU
# The PGD-AT baseline has more epochs for the price of AFA's two stages: its steps lack the second half and the probe pass.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-digits}" in
digits)
    for seed in 1 2 3; do
        python afa.py --seed $seed
        python afa.py --seed $seed --bn single --epochs 16
        python afa.py --seed $seed --bn single --eps 0
    done
    ;;
cifar)
    reduced="--dataset cifar10 --width 8 --bf16 --attack-steps 3 --eps-warmup-epochs 3 --train-size 20000 --val-size 500"
    python afa.py $reduced --test-size 300 --epochs 12 --gate-epochs 1
    python afa.py $reduced --test-size 300 --epochs 20 --bn single
    ;;
gpu)
    for seed in 1 2 3; do
        for dataset in cifar10 svhn cifar100 tiny-imagenet; do
            python afa.py --dataset $dataset --seed $seed --bf16 --compile
            python afa.py --dataset $dataset --seed $seed --bf16 --compile --bn single --epochs 48
        done
    done
    ;;
esac
python benchmark/collect.py results/afa.csv runs/*__afa__*
