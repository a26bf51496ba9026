#!/usr/bin/env bash
# The GPU checks, for a GPU that is at hand for a short time only.
#   bash benchmark/gpu.sh check    unpacks data, runs all four scripts on embedded data, then benchmark/speed.py
#   bash benchmark/gpu.sh speed    benchmark/speed.py alone, if the time was not enough for all of it
#   bash benchmark/gpu.sh rows     CIFAR-10, several rows at a time; called again it goes on where the last call stopped
# For a quarter of an hour in all, short runs; the test, in full float32, takes longer than they do: of 200 images, not 1000.
#   LIMIT=300 bash benchmark/gpu.sh check
#   LIMIT=330 EPOCHS=4 LAST=7 bash benchmark/gpu.sh rows      again with LAST=14 if there is time left
# Variables: OUT, what is to be kept (gpu_out); DATA, the data sets (/tmp/data); WORK, runs and checkpoints (/tmp/gpu_runs);
# ARCHIVES, a folder with cifar-10-python.tar.gz and the like, and perhaps prepare.sh, which is sourced first: for what has
# to be installed or unpacked in another way (carry); LIMIT, seconds of a call (570); FIRST and LAST, rows to run (all);
# JOBS, rows at a time (3: one alone does not fill a large GPU); EPOCHS, of the rows (30, the preset's); PEAK, TFLOP/s in bf16 (990: H100, H200); FLAGS, of every
# run (--bf16 --compile); SMALL, of the runs that only check; SIZE, of the rows; SPEED, further flags of speed.py.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_out} DATA=${DATA:-/tmp/data} WORK=${WORK:-/tmp/gpu_runs} ARCHIVES=${ARCHIVES:-carry} LIMIT=${LIMIT:-570}
FIRST=${FIRST:-1} LAST=${LAST:-99} JOBS=${JOBS:-3} EPOCHS=${EPOCHS:-30} PEAK=${PEAK:-990} FLAGS=${FLAGS-"--bf16 --compile"}
SPEED=${SPEED-"--repeats 7 --layouts channels_last --no-compile --no-loader --evaluation-size 200"}
SMALL=${SMALL-"--train-size 512 --val-size 64 --test-size 16 --arch preactresnet8 --width 8 --epochs 1 --attack-steps 2"}
SIZE=${SIZE-"--dataset cifar10 --test-size $((EPOCHS < 30 ? 200 : 1000))"}
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-3}
mkdir -p "$OUT" "$DATA" "$WORK"
OUT=$(cd "$OUT" && pwd)
[ -f "$ARCHIVES/prepare.sh" ] && . "$ARCHIVES/prepare.sh"
for archive in "$ARCHIVES"/*.tar.gz; do
    [ -f "$archive" ] && tar -xzf "$archive" -C "$DATA"
done

# Now, not from the logs of all the runs.
"$PYTHON" -c "import tensorboard, torch, torchvision, tqdm, tyro; print('torch', torch.__version__, 'cuda', torch.version.cuda)" || exit 1

left() { echo $((LIMIT - SECONDS)); }

# limited SECONDS NAME COMMAND...: its output goes to WORK/NAME.log; says how it ended. SIGINT lets a script end in order.
limited() {
    local limit=$1 name=$2 started=$SECONDS status
    shift 2
    [ "$limit" -gt 0 ] || { echo "$name: no time left"; return 1; }
    timeout -s INT -k 20 "$limit" "$@" >"$WORK/$name.log" 2>&1
    status=$?
    echo "$name: status $status after $((SECONDS - started)) s: $(tail -n 2 "$WORK/$name.log" | cut -c 1-200 | paste -sd " ")"
    return $status
}

pack() {  # results, arguments and logs of all runs; a checkpoint only where it is small
    (cd "$WORK" && find . -type f -size -16384k ! -name "*.tmp" ! -path "*/substitutes/*" ! -path "*/teachers/*" \
        ! -name "last.pt" ! -name "teacher.pt" | tar -czf "$OUT/$1.tar.gz" -T -)
}

set -- "${1:-check}"
case "$1" in
check | speed)
    nvidia-smi 2>/dev/null || echo "no nvidia-smi here"
    checks=(
        "afa --gate-epochs 1" "aalp --data-on host" "vfd_adv --teacher-epochs 1 --base trades" "abnn --clean-epochs 1"
        "abnn --clean-epochs 1 --dataset moving-digits --arch conv3d --norm l2 --eps 1"
    )
    [ "$1" = speed ] && checks=()
    pids=() failed=0
    for check in ${checks[@]+"${checks[@]}"}; do  # side by side: compiling takes one core each
        read -r script flags <<<"$check"
        name=check_${script}$([[ $flags == *moving* ]] && echo _video)
        limited $(($(left) / 2)) "$name" "$PYTHON" "$script.py" $SMALL $flags $FLAGS --runs-dir "$WORK/$name" &
        pids+=($!)
    done
    for pid in ${pids[@]+"${pids[@]}"}; do
        wait "$pid" || failed=$((failed + 1))
    done
    if [ "$1" = check ]; then
        limited 60 check_eval "$PYTHON" afa.py --eval-only "$(ls -d "$WORK"/check_afa/*/ | tail -n 1)" || failed=$((failed + 1))
    fi
    # It keeps its file after each part: what was measured when the time is up is there. It is alone now, with all cores.
    TORCHINDUCTOR_COMPILE_THREADS=12 limited "$(left)" speed "$PYTHON" benchmark/speed.py --peak-tflops "$PEAK" --out "$OUT/speed_cuda.json" $SPEED ||
        failed=$((failed + 1))
    cat "$WORK/speed.log"
    pack check
    echo "$failed of $((${#checks[@]} > 0 ? ${#checks[@]} + 2 : 1)) failed, after $SECONDS s"
    exit $((failed > 0))
    ;;
rows)
    # Each method and its nearest baseline, then the rest, with the fast preset. S of ABNN needs no second data set.
    # Lengths are in the proportions of the presets: AFA's two stages cost as much as PGD-AT with 8/5 of their epochs.
    plain="--epochs $EPOCHS" none="--lambda-adv 0 --lambda-nat 0"
    vfd="vfd_adv $plain --teacher-epochs $EPOCHS" abnn="abnn $plain --clean-epochs $EPOCHS"
    rows=(
        "afa $plain --gate-epochs $((EPOCHS * 4 / 15 > 0 ? EPOCHS * 4 / 15 : 1))" "afa --bn single --epochs $((EPOCHS * 8 / 5))"
        "aalp $plain" "aalp $plain --method alp" "aalp $plain --method at" "$vfd"
        "$abnn --substitute self" "$abnn --defense none" "$abnn --defense at" "vfd_adv $plain $none"
        "$vfd --base trades" "vfd_adv $plain --base trades $none" "$vfd --base mart" "vfd_adv $plain --base mart $none"
    )
    row() {  # a row has a folder of its own; the scripts continue after their last finished epoch
        local number=$1 script flags run
        read -r script flags <<<"${rows[number - 1]}"
        local folder=$WORK/row${number}_$EPOCHS name=row${number}_$script
        ls "$folder"/*/results.json >/dev/null 2>&1 && { echo "$name: there already"; return; }
        [ "$(left)" -lt 60 ] && { echo "$name: no time left"; return; }
        run=$(ls -d "$folder"/*__"$script"__*/last.pt 2>/dev/null | tail -n 1)
        if [ -n "$run" ]; then
            limited $(($(left) - 20)) "$name" "$PYTHON" "$script.py" --resume "$(dirname "$run")" --data-dir "$DATA"
        else
            limited $(($(left) - 20)) "$name" "$PYTHON" "$script.py" $flags $SIZE $FLAGS --data-dir "$DATA" --runs-dir "$folder"
        fi
    }
    for number in $(seq "$FIRST" "$((LAST < ${#rows[@]} ? LAST : ${#rows[@]}))"); do
        while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
        row "$number" &
    done
    wait
    pack rows
    echo "$(ls "$WORK"/row*_"$EPOCHS"/*/results.json 2>/dev/null | wc -l) of ${#rows[@]} rows are done, after $SECONDS s"
    ;;
*)
    echo "error: gpu.sh check, gpu.sh speed or gpu.sh rows, not $1" >&2
    exit 2
    ;;
esac
