#!/usr/bin/env bash
# The runs behind docs/vfd_adv.md, one command a row.
#   bash benchmark/vfd_adv.sh sweep    embedded data: the weight of both pairs, by validation accuracy; 20 minutes on two CPU cores
#   bash benchmark/vfd_adv.sh          embedded data: each base, each pair, both, logits: two hours on two CPU cores
#   bash benchmark/vfd_adv.sh gpu      full size, for a GPU
# The first run of a seed trains the teacher, the others find it in runs/teachers. lambda_0 = D/K is 6.4 on the embedded data.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-digits}" in
sweep)
    for base in at trades mart; do
        for weight in 0 0.064 0.192 0.64 1.92; do
            python vfd_adv.py --base $base --lambda-adv $weight --lambda-nat $weight --test-size 1 --runs-dir runs/sweep
        done
    done
    python benchmark/collect.py results/vfd_adv_sweep.csv runs/sweep/*__vfd_adv__* --validation
    exit
    ;;
digits)
    for seed in 1 2 3; do
        for base in at trades mart; do
            python vfd_adv.py --seed $seed --base $base --lambda-adv 0 --lambda-nat 0
            python vfd_adv.py --seed $seed --base $base --lambda-nat 0
            python vfd_adv.py --seed $seed --base $base --lambda-adv 0
            python vfd_adv.py --seed $seed --base $base
            python vfd_adv.py --seed $seed --base $base --distill logits
        done
    done
    ;;
gpu)
    for seed in 1 2 3; do
        for dataset in cifar10 svhn cifar100 tiny-imagenet; do
            for base in at trades mart; do
                python vfd_adv.py --dataset $dataset --seed $seed --base $base --bf16 --compile --lambda-adv 0 --lambda-nat 0
                python vfd_adv.py --dataset $dataset --seed $seed --base $base --bf16 --compile --lambda-nat 0
                python vfd_adv.py --dataset $dataset --seed $seed --base $base --bf16 --compile --lambda-adv 0
                python vfd_adv.py --dataset $dataset --seed $seed --base $base --bf16 --compile
                python vfd_adv.py --dataset $dataset --seed $seed --base $base --bf16 --compile --distill logits
            done
        done
    done
    ;;
esac
python benchmark/collect.py results/vfd_adv.csv runs/*__vfd_adv__*
