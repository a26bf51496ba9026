#!/usr/bin/env bash
# The runs behind docs/aalp.md, one command a row: the baselines, each module alone, both, and the controls.
#   bash benchmark/aalp.sh          embedded data: about an hour on two CPU cores
#   bash benchmark/aalp.sh cifar    CIFAR-10 in a reduced setting (narrow network, 10,000 images, 3 attack steps): half an hour
#   bash benchmark/aalp.sh gpu      full size, for a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-digits}" in
digits)
    for seed in 1 2 3; do
        python aalp.py --seed $seed
        run=$(ls -dt runs/digits__aalp__${seed}__* | head -n 1)
        python aalp.py --seed $seed --control-of $run
        python aalp.py --seed $seed --method alp
        python aalp.py --seed $seed --method alp --guided-dropout low
        python aalp.py --seed $seed --method alp --guided-dropout random
        python aalp.py --seed $seed --method alp --sample-weight clean
        python aalp.py --seed $seed --method at
        python aalp.py --seed $seed --method at --eps 0
    done
    ;;
cifar)
    reduced="--dataset cifar10 --width 8 --bf16 --attack-steps 3 --eps-warmup-epochs 3 --train-size 10000 --val-size 500"
    python aalp.py $reduced --test-size 300 --epochs 10
    run=$(ls -dt runs/cifar10__aalp__1__* | head -n 1)
    python aalp.py $reduced --test-size 300 --epochs 10 --control-of $run
    python aalp.py $reduced --test-size 300 --epochs 10 --method alp
    python aalp.py $reduced --test-size 300 --epochs 10 --method at
    ;;
gpu)
    for seed in 1 2 3; do
        for dataset in cifar10 svhn cifar100 tiny-imagenet; do
            python aalp.py --dataset $dataset --seed $seed --bf16 --compile
            run=$(ls -dt runs/${dataset}__aalp__${seed}__* | head -n 1)
            python aalp.py --dataset $dataset --seed $seed --bf16 --compile --control-of $run
            python aalp.py --dataset $dataset --seed $seed --bf16 --compile --method alp
            python aalp.py --dataset $dataset --seed $seed --bf16 --compile --method alp --guided-dropout low
            python aalp.py --dataset $dataset --seed $seed --bf16 --compile --method alp --sample-weight clean
            python aalp.py --dataset $dataset --seed $seed --bf16 --compile --method at
        done
    done
    ;;
esac
python benchmark/collect.py results/aalp.csv runs/*__aalp__*
