#!/usr/bin/env bash
# The runs behind docs/abnn.md, one command a row: no defense, adversarial training, and ABNN in its variants.
#   bash benchmark/abnn.sh          embedded images
#   bash benchmark/abnn.sh video    embedded video
#   bash benchmark/abnn.sh gpu      full size, images and video, for a GPU
# The first run of a seed trains the clean networks, the others find them in runs/substitutes. The last run of each part
# measures the cost of the three defenses; its accuracies mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-digits}" in
digits)
    for seed in 1 2 3; do
        python abnn.py --seed $seed --defense none
        python abnn.py --seed $seed --defense at
        python abnn.py --seed $seed
        python abnn.py --seed $seed --moments batch
        python abnn.py --seed $seed --statistics channel
        python abnn.py --seed $seed --statistics channel --moments batch
        python abnn.py --seed $seed --no-equalised
        python abnn.py --seed $seed --align-weight 1
    done
    python abnn.py --compare-cost --epochs 1 --clean-epochs 1 --test-size 1 --runs-dir runs/cost
    ;;
video)
    for seed in 1 2 3; do
        python abnn.py --dataset moving-digits --seed $seed --defense none
        python abnn.py --dataset moving-digits --seed $seed --defense at
        python abnn.py --dataset moving-digits --seed $seed
        python abnn.py --dataset moving-digits --seed $seed --moments batch
        python abnn.py --dataset moving-digits --seed $seed --statistics flat
        python abnn.py --dataset moving-digits --seed $seed --statistics flat --moments batch
    done
    python abnn.py --dataset moving-digits --compare-cost --epochs 1 --clean-epochs 1 --test-size 1 --runs-dir runs/cost
    ;;
gpu)
    for seed in 1 2 3; do
        for dataset in cifar10 svhn ucf101; do
            python abnn.py --dataset $dataset --seed $seed --bf16 --defense none
            python abnn.py --dataset $dataset --seed $seed --bf16 --defense at
            python abnn.py --dataset $dataset --seed $seed --bf16
            python abnn.py --dataset $dataset --seed $seed --bf16 --moments batch
        done
        for dataset in cifar10 svhn; do  # flat maps for clips of UCF-101 would have a thousand million weights
            python abnn.py --dataset $dataset --seed $seed --bf16 --statistics channel
            python abnn.py --dataset $dataset --seed $seed --bf16 --statistics channel --moments batch
        done
    done
    for dataset in cifar10 svhn ucf101; do
        python abnn.py --dataset $dataset --bf16 --compare-cost --epochs 1 --clean-epochs 1 --test-size 1 --runs-dir runs/cost
    done
    ;;
esac
python benchmark/collect.py results/abnn.csv runs/*__abnn__*
