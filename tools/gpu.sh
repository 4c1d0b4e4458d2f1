#!/usr/bin/env bash
# Proves HagSeg on the GPU that is here, within eight minutes, and measures it:
#
#     bash tools/gpu.sh
#
# It needs requirements.txt and pytest, and downloads nothing. Each part has a time limit of its own, and all
# share eight minutes, so a part that hangs or fails does not cost the others. What it prints is also in
# $OUT/gpu.txt, or runs/gpu/gpu.txt. Its last output is the table "On a GPU" of docs/speed.md for this card.
# GPU_SH_TINY=1 takes tiny sizes, to try it on a CPU.
set -u
cd "$(dirname "$0")/.."
log=${OUT:-runs/gpu}/gpu.txt
mkdir -p "$(dirname "$log")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(command -v python || command -v python3)

small="" compiler=inductor train="--checkpoint-every 100" sizes=""
if [ -n "${GPU_SH_TINY:-}" ]; then  # of a flag given twice, the last counts
    small="--backbone resnet18 --output-stride 16 --channels 16 --crop-size 32 --batch-size 4 --repeats 1"
    compiler=eager sizes=", tiny sizes"
    train="--checkpoint-every 2 --iters 8 --channels 16 --batch-size 4 --eval-every 99"
fi

# part NAME SECONDS COMMAND...: run the command, stopped after so many seconds, its output in $work/NAME.
part() {
    local name=$1 limit=$2 left=$((475 - SECONDS)) start=$SECONDS code shown="${*:3}"
    shift 2
    limit=$((limit < left ? limit : left))
    printf '\n=== %s: %s\n' "$name" "${shown%%$'\n'*}"
    if [ "$limit" -gt 0 ]; then
        timeout -k 5 "$limit" "$@" > "$work/$name" 2>&1 < /dev/null
        code=$?
        cat "$work/$name"
    else
        code="no time" && touch "$work/$name"
    fi
    echo $((SECONDS - start)) > "$work/$name.seconds"
    case $code in
        0) echo "took $((SECONDS - start)) s" ;;
        124 | 137) echo "stopped after $limit s" ;;
        "no time") echo "left out: the eight minutes were over" ;;
        *) echo "failed with exit code $code" ;;
    esac | tee "$work/$name.end"
}

bench() {  # NAME SECONDS FLAGS...
    part "$1" "$2" "$python" tools/bench.py "${@:3}" $small
}

# figure PART ROW: the median, unit and quartiles of a row of bench.py, or how its part ended.
figure() {
    awk -v row="$2" '{ name = substr($0, 1, 26); gsub(/^ +| +$/, "", name) }
        name == row { n = split(substr($0, 27), f, " ")
                      print f[1], f[2] (f[4] == "-" ? " (" f[3] " - " f[5] ")" : ""); exit }' "$work/$1" |
        sed 's/ times//' | grep . || cat "$work/$1.end"
}

# dominant PART: the parts of a step that take more than 3 % of it.
dominant() {
    awk '/% of a step/ { name = substr($0, 1, 26); gsub(/^ +| +$/, "", name); share = $0
                         sub(/% of a step.*/, "", share); sub(/.* /, "", share)
                         if (share + 0 > 3) printf "%s%s %s %%", (n++ ? ", " : ""), name, share }' "$work/$1" |
        grep . || cat "$work/$1.end"
}

summary() {  # PART: the last line of pytest, or how the part ended
    grep -E '^=*[0-9 ,a-z]*(passed|failed|skipped)' "$work/$1" | tail -n 1 | tr -d = | grep . || cat "$work/$1.end"
}

step() {  # PART: what is told of a step in every size, or how the part ended
    grep -q '^step/network' "$work/$1" || { cat "$work/$1.end"; return; }
    echo "$(figure "$1" 'step / network'); $(figure "$1" step); $(figure "$1" images | cut -d' ' -f1,2);" \
        "$(figure "$1" 'peak memory of a step'), computed $(sed -n 's/ by settings.step_memory//p' "$work/$1" |
            awk '{ print $NF }') MiB"
}

table() {
    local card
    card=$(tail -n 1 "$work/card")
    printf '\n\nThe table "On a GPU" of docs/speed.md:\n\n'
    cat <<EOF
| what | $(cut -d';' -f1 <<< "$card")$sizes |
|---|---|
| torch, torchvision, driver | $(cut -d';' -f2 <<< "$card") |
| \`pytest tests/gpu\` | $(summary tests) |
| 16 + 16, ResNet-50, crop 513, bf16: step / network; a step; images; peak memory | $(step bf16) |
| its parts above 3 % | $(dominant bf16) |
| the same in float32 | $(step float32) |
| the same with ResNet-101, stride 8, \`--accumulate 2\`, bf16 | $(step resnet101) |
| the same at crop 769, bf16 | $(step crop769) |
| 2 + 2, crop 513, bf16, where launching kernels may take the time | $(step two) |
| its parts above 3 % | $(dominant two) |
| max(1) / top_class, 16 x 21 x 513 x 513 | $(figure bf16 'max(1) / top_class') |
| count_pairs, all pixels of one class / of many | $(figure bf16 'one / many') |
| evaluation, 500 x 375; around the network | $(figure bf16 evaluation); $(figure bf16 'around the network') |
| pairs of images that one loader thread makes; such threads that a step needs | $(
    figure bf16 'loader, 1 workers'); $(figure bf16 'workers a step needs') |
| the default data set, killed once and resumed: mIoU; seconds | $(
    awk '/^mean IoU/ { print $3 }' "$work/train" | grep . || cat "$work/train.end"); $(
    cat "$work/killed.seconds") + $(cat "$work/train.seconds") |
| two ranks on one card over gloo, NCCL and SyncBatchNorm with one: \`pytest tests/gpu/test_gpu_ranks.py\` | $(
    summary ranks) |
| torch.compile: a step; its first step | $(figure compiled step); $(figure compiled 'first step') |
EOF
}

main() {
    part card 60 "$python" -c '
import subprocess, sys, torch, torchvision
try:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
except OSError:
    driver = ""
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print("Python", sys.version)
print(driver or "no nvidia-smi here")
driver = driver.partition("\n")[0].split(", ")[1] if driver else "none"
print(f"{name};{torch.__version__}, {torchvision.__version__}, {driver}")'
    if [ -z "$sizes" ] && grep -q '^CPU;' "$work/card"; then
        echo "gpu.sh: torch finds no GPU here; GPU_SH_TINY=1 bash tools/gpu.sh tries it on a CPU"
        return
    fi
    part tests 120 "$python" -m pytest -q -m "not slow" tests/gpu --ignore tests/gpu/test_gpu_ranks.py
    bench bf16 110 --only step loader kernels evaluation --crop-size 513 --batch-size 16 --amp --repeats 20
    bench float32 70 --only step --crop-size 513 --batch-size 16 --no-amp --repeats 6
    bench resnet101 80 --only step --crop-size 513 --batch-size 16 --amp --repeats 5 --backbone resnet101 \
        --output-stride 8 --accumulate 2
    bench crop769 60 --only step --crop-size 769 --batch-size 16 --amp --repeats 5
    bench two 45 --only step --crop-size 513 --batch-size 2 --amp --repeats 40
    # Killed as soon as it has written a checkpoint; then resumed, under torchrun.
    part killed 60 bash -c "
        $python train.py --out $work/run $train & run=\$!
        until [ -e $work/run/last.pth ]; do sleep 0.1; kill -0 \$run || exit; done
        kill -KILL \$run"
    part train 100 "$python" -m torch.distributed.run --standalone train.py --out "$work/run" $train
    part ranks 70 "$python" -m pytest -q -m "not slow" tests/gpu/test_gpu_ranks.py
    bench compiled 130 --only step --crop-size 513 --batch-size 16 --amp --repeats 8 --compile "$compiler"
    table
    printf '\n%s s; all of this is in %s\n' "$SECONDS" "$log"
}

main 2>&1 | tee "$log"
