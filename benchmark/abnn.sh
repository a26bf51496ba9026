#!/usr/bin/env bash
# The runs behind docs/abnn.md, one command a row: no defense, adversarial training, and ABNN in its variants.
#   bash benchmark/abnn.sh          embedded images
#   bash benchmark/abnn.sh video    embedded video
#   bash benchmark/abnn.sh gpu      full size, images and video, for a GPU
# The first run of a seed trains the clean networks, the others find them in runs/substitutes.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-digits}" in
digits)
    for seed in 1 2 3; do
        python abnn.py --seed $seed --defense none
        python abnn.py --seed $seed --defense at
        python abnn.py --seed $seed --compare-cost
        python abnn.py --seed $seed --moments batch
        python abnn.py --seed $seed --statistics channel
        python abnn.py --seed $seed --statistics channel --moments batch
        python abnn.py --seed $seed --no-equalised
        python abnn.py --seed $seed --align-weight 1
    done
    ;;
video)
    for seed in 1 2 3; do
        python abnn.py --dataset moving-digits --seed $seed --defense none
        python abnn.py --dataset moving-digits --seed $seed --defense at
        python abnn.py --dataset moving-digits --seed $seed --compare-cost
        python abnn.py --dataset moving-digits --seed $seed --moments batch
        python abnn.py --dataset moving-digits --seed $seed --statistics flat
        python abnn.py --dataset moving-digits --seed $seed --statistics flat --moments batch
    done
    ;;
gpu)
    for seed in 1 2 3; do
        for dataset in cifar10 svhn ucf101; do
            python abnn.py --dataset $dataset --seed $seed --bf16 --defense none
            python abnn.py --dataset $dataset --seed $seed --bf16 --defense at
            python abnn.py --dataset $dataset --seed $seed --bf16 --compare-cost
            python abnn.py --dataset $dataset --seed $seed --bf16 --moments batch
        done
        for dataset in cifar10 svhn; do  # flat maps for clips of UCF-101 would have a thousand million weights
            python abnn.py --dataset $dataset --seed $seed --bf16 --statistics channel
            python abnn.py --dataset $dataset --seed $seed --bf16 --statistics channel --moments batch
        done
    done
    ;;
esac
python benchmark/collect.py results/abnn.csv runs/*__abnn__*
