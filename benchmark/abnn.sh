#!/usr/bin/env bash
# The runs behind docs/abnn.md, one command a row. Runs that results/abnn.csv has already are skipped.
#   bash benchmark/abnn.sh          embedded images
#   bash benchmark/abnn.sh video    embedded video
#   bash benchmark/abnn.sh cifar10  reduced CIFAR-10, for one CPU core: 7,000 images, a small network, 3 attack steps
#   bash benchmark/abnn.sh svhn     reduced SVHN, likewise, with eps rising for half of the epochs
#   bash benchmark/abnn.sh gpu      full size, images and video, for a GPU
#   bash benchmark/abnn.sh gpu --dry-run          prints what is left to run
#   SEEDS=1 bash benchmark/abnn.sh cifar10          of one seed only
#   bash benchmark/abnn.sh gpu --also="--data-dir D --device cuda:1"      flags for all of them
# The first run of a seed trains the clean networks, the others find them in runs/substitutes. Reduced CIFAR-10 and SVHN
# are each other's substitute.
set -euo pipefail
cd "$(dirname "$0")/.."
part=digits
if [[ ${1:-} && $1 != --* ]]; then part=$1; shift; fi
reduced="--arch preactresnet8 --attack-steps 3 --train-size 7000 --val-size 500 --test-size 200"

commands() {
    case $part in
    digits)
        for seed in ${SEEDS:-1 2 3}; do
            echo python abnn.py --seed $seed --defense none
            echo python abnn.py --seed $seed --defense at
            echo python abnn.py --seed $seed
            echo python abnn.py --seed $seed --moments batch
            echo python abnn.py --seed $seed --statistics channel
            echo python abnn.py --seed $seed --statistics channel --moments batch
            echo python abnn.py --seed $seed --no-equalised
            echo python abnn.py --seed $seed --align-weight 1
        done
        ;;
    video)
        for seed in ${SEEDS:-1 2 3}; do
            echo python abnn.py --dataset moving-digits --seed $seed --defense none
            echo python abnn.py --dataset moving-digits --seed $seed --defense at
            echo python abnn.py --dataset moving-digits --seed $seed
            echo python abnn.py --dataset moving-digits --seed $seed --moments batch
            echo python abnn.py --dataset moving-digits --seed $seed --statistics flat
            echo python abnn.py --dataset moving-digits --seed $seed --statistics flat --moments batch
        done
        ;;
    cifar10 | svhn)
        # With eps rising for 3 epochs of 24, as on CIFAR-10, PGD-AT ends with one class for everything on SVHN.
        [[ $part = svhn ]] && warmup=8 substitute=cifar10 || warmup=3 substitute=svhn
        for seed in ${SEEDS:-1 2 3}; do
            short="--dataset $part --seed $seed $reduced --eps-warmup-epochs $warmup --epochs 15"
            echo python abnn.py $short --defense none
            echo python abnn.py $short --defense at
            echo python abnn.py $short --substitute $substitute
            echo python abnn.py $short --substitute $substitute --statistics channel
            echo python abnn.py $short --substitute $substitute --no-equalised
        done
        ;;
    gpu)
        for dataset in cifar10 svhn ucf101; do
            for seed in ${SEEDS:-1 2 3}; do
                full="--dataset $dataset --seed $seed --bf16 --compile"
                echo python abnn.py $full --defense none
                echo python abnn.py $full --defense at
                echo python abnn.py $full
                echo python abnn.py $full --moments batch
                # Flat maps for clips of UCF-101 would have a thousand million weights.
                [[ $dataset = ucf101 ]] && continue
                echo python abnn.py $full --statistics channel
                echo python abnn.py $full --statistics channel --moments batch
            done
        done
        for dataset in cifar100 tiny-imagenet; do
            for seed in ${SEEDS:-1 2 3}; do
                echo python abnn.py --dataset $dataset --seed $seed --bf16 --compile --defense none
                echo python abnn.py --dataset $dataset --seed $seed --bf16 --compile --defense at
                echo python abnn.py --dataset $dataset --seed $seed --bf16 --compile
            done
        done
        ;;
    *)
        echo "error: no list $part: choose digits, video, cifar10, svhn or gpu" >&2
        exit 2
        ;;
    esac
}

commands | python benchmark/run.py results/abnn.csv "$@"
