#!/usr/bin/env bash
# The runs behind docs/afa.md, one command a row. Runs that results/afa.csv has already are skipped.
#   bash benchmark/afa.sh          embedded data: a few hours on two CPU cores
#   bash benchmark/afa.sh cifar10  reduced CIFAR-10, for one CPU core: 7,000 images, a small network, 3 attack steps
#   bash benchmark/afa.sh svhn     reduced SVHN, likewise, with eps rising for half of the epochs at the full rate
#   bash benchmark/afa.sh gpu      full size, for a GPU
#   bash benchmark/afa.sh gpu --dry-run          prints what is left to run
#   SEEDS=1 bash benchmark/afa.sh cifar10          of one seed only
#   bash benchmark/afa.sh gpu --also="--data-dir D --device cuda:1"      flags for all of them
# PGD-AT has more epochs for the price of AFA's two stages: its steps lack the clean pass, and it has no stage 2.
set -euo pipefail
cd "$(dirname "$0")/.."
part=digits
if [[ ${1:-} && $1 != --* ]]; then part=$1; shift; fi
reduced="--arch preactresnet8 --attack-steps 3 --train-size 7000 --val-size 500 --test-size 500"

commands() {
    case $part in
    digits)
        for seed in ${SEEDS:-1 2 3}; do
            echo python afa.py --seed $seed
            echo python afa.py --seed $seed --bn single --epochs 16
            echo python afa.py --seed $seed --bn single --eps 0
            # Other readings of the gate and its training.
            echo python afa.py --seed $seed --gate layer
            echo python afa.py --seed $seed --finetune all
            echo python afa.py --seed $seed --harden 0
            echo python afa.py --seed $seed --gate-epochs 0  # the gate as it starts: the same weight for every image
            echo python afa.py --seed $seed --epochs 16 --gate-epochs 4  # does a longer training close the gap to PGD-AT?
        done
        ;;
    cifar10 | svhn)
        # SVHN's digits take long to get hold of, and are lost where eps rises faster than they are learned: as on CIFAR-10
        # PGD-AT ends with one class for everything, and with a rate that rises along with eps in every other seed.
        [[ $part = svhn ]] && schedule=("6 --milestones 8 11" "12 --milestones 16 22") || schedule=(3 3)
        for seed in ${SEEDS:-1 2 3}; do
            short="--dataset $part --seed $seed $reduced --eps-warmup-epochs"
            echo python afa.py $short ${schedule[0]} --epochs 12 --gate-epochs 2
            echo python afa.py $short ${schedule[1]} --epochs 24 --bn single
            # Of the gates that are trained, the one that loses least on embedded data.
            [[ $part = svhn ]] || echo python afa.py $short ${schedule[0]} --epochs 12 --gate-epochs 2 --gate layer
        done
        ;;
    gpu)
        for dataset in cifar10 svhn cifar100 tiny-imagenet; do
            for seed in ${SEEDS:-1 2 3}; do
                echo python afa.py --dataset $dataset --seed $seed --bf16 --compile
                echo python afa.py --dataset $dataset --seed $seed --bf16 --compile --bn single --epochs 48
            done
        done
        ;;
    *)
        echo "error: no list $part: choose digits, cifar10, svhn or gpu" >&2
        exit 2
        ;;
    esac
}

commands | python benchmark/run.py results/afa.csv "$@"
