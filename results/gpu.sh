#!/usr/bin/env bash
# One GPU, one command: what is there, is it right, how fast is it, does it reproduce.
#
#   bash results/gpu.sh [--minutes N] [--out DIR]   8 minutes and out/gpu, if nothing else is said
#   bash results/gpu.sh --rehearse                  all of it at tiny size on a CPU: a minute
#
# Needs what requirements.txt names, and no network. Each part has its own time and its own log in
# DIR, written as it goes: stop it when you like, what is done stands. What a part leaves of its
# time goes to the next. DIR/bench.md and DIR/runs.md are the tables.
set -uo pipefail

usage() {
  echo "usage: bash results/gpu.sh [--minutes N] [--out DIR] [--rehearse]" >&2
  exit 2
}

minutes=8 out='' rehearse=''
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=${2:-}; shift ;;
    --out) out=${2:-}; shift ;;
    --rehearse) rehearse=yes ;;
    *) usage ;;
  esac
  shift || usage
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || usage
out=${out:-$(dirname "$0")/../out/${rehearse:+rehearsal-}gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONUNBUFFERED=1 # logs grow line by line
trap 'kill $(jobs -p) 2>/dev/null' EXIT
trap 'exit 130' INT TERM HUP

# until_percent P: the seconds until so much of the time is over.
until_percent() { echo $((total * $1 / 100 - SECONDS)); }

# What stands last in a log, but for train.py's hint on how to go on.
last_line() { [ ! -f "$1" ] || grep -v -e '^$' -e '^more of it' "$1" | tail -n 1; }

# part NAME SECONDS COMMAND..: run it for so long at most, and say in a line how it went.
part() {
  local name=$1 limit=$2 began=$SECONDS status=124 how
  shift 2
  if ((limit > 0)); then
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null &
    wait $!
    status=$?
  fi
  case $status in
    0) how="done" ;;
    124 | 137) how="out of time" ;;
    *) how="FAILED" ;;
  esac
  echo "$name: $how, $((SECONDS - began)) s: $(last_line "$out/$name.log" | cut -c -200)"
  return "$status"
}

bench=(python results/bench.py --out "$out")
if [ -n "$rehearse" ]; then
  export TRITON_INTERPRET=1
  total=300 seeds=1 batches=2 tokens=32 lengths=32 long="32 64" compile=--no-compile
  data=$out/data
  bench+=(--n-layer 1 --n-head 2 --n-embd 16 --rounds 2 --device cpu)
  training=(--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --steps 4)
  training+=(--eval-interval 2 --eval-tokens 64 --device cpu)
  part data 60 python prepare_data.py file hsm.py --out "$data"
else
  total=$((minutes * 60)) seeds="1 2 3 4 5" batches="1 64" lengths="4096 16384 1024"
  long="1024 8192 65536" compile=--compile data=data/stdlib_byte training=()
  [ -f data/shakespeare_char/input.txt ] && data=data/shakespeare_char
  bench+=(--n-layer 12 --n-head 12 --n-embd 768)
fi

# ---- 1. What is there ----------------------------------------------------------------------------

read -r -d '' there <<'EOF'
import json, platform, subprocess, time
import torch
try:
    from triton import __version__ as triton
except ImportError:
    triton = None
device = "cuda" if torch.cuda.is_available() else "cpu"
facts = {"device": device, "python": platform.python_version()}
facts |= {"torch": torch.__version__, "triton": triton}
if device == "cuda":
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    card = torch.cuda.get_device_properties(0)
    facts |= {"card": card.name, "GiB": round(card.total_memory / 2**30, 1)}
x = torch.ones(2 ** (30 if device == "cuda" else 26), dtype=torch.uint8, device=device)
y = torch.empty_like(x)
for repeats in (1, 20):
    began = time.perf_counter()
    for _ in range(repeats):
        y.copy_(x)
    y[-1].item()  # waits until all is copied
    seconds = (time.perf_counter() - began) / repeats
facts["copied, GB/s read and written"] = round(2 * len(x) / seconds / 1e9, 1)
print(json.dumps(facts))
EOF
part there 60 python -c "$there"
cuda=$(grep -c '"device": "cuda"' "$out/there.log")
if ! ((cuda)) && [ -z "$rehearse" ]; then
  echo "no CUDA device here; all of it at tiny size on a CPU: bash results/gpu.sh --rehearse" >&2
  exit 2
fi
GiB=$(grep -o '"GiB": [0-9]*' "$out/there.log" | grep -o '[0-9]*$')
if [ -z "$rehearse" ]; then # as many tokens a step as there is memory for
  tokens=$((GiB >= 60 ? 65536 : GiB >= 30 ? 32768 : 16384))
fi
bench+=(--tokens "$tokens")

# ---- 2. Is it right: what test_hsm.py says on a GPU ----------------------------------------------

part right "$(until_percent 20)" python -m pytest -q -m gpu -p no:cacheprovider test_hsm.py
((cuda)) || echo "right: skipped: needs CUDA"

# ---- 3. How fast is it ---------------------------------------------------------------------------

part mixing "$(until_percent 27)" "${bench[@]}" \
  --parts forward backward --lengths "${lengths%% *}" --fast $compile
for batch in $batches; do
  part "decoding-$batch" "$(until_percent 37)" \
    "${bench[@]}" --parts decode --lengths $long --batch "$batch"
done
part training "$(until_percent 65)" "${bench[@]}" --parts train --lengths $lengths --fast $compile ||
  part tables 30 python results/bench.py --table --out "$out"

# ---- 4. Does it reproduce: the shakespeare preset, as many seeds as there is time for ------------

longest=0
for seed in $seeds; do
  runs=3
  for mixers in softmax ab ab,ab,softmax; do
    began=$SECONDS limit=$((($(until_percent 100)) / runs)) runs=$((runs - 1))
    ((seed == 1 || limit > longest)) || break 2 # a further seed, only if it can be done
    part "$mixers-$seed" "$limit" python train.py shakespeare --mixers "$mixers" --seed "$seed" \
      --data "$data" --out "$out/$mixers-$seed" --sample-tokens 0 "${training[@]}"
    ((seed > 1 || SECONDS - began < longest)) || longest=$((SECONDS - began))
  done
done

read -r -d '' runs <<'EOF'
import json, pathlib, sys
print("| run | step | lowest loss | seconds | tokens/s |\n| --- | --- | --- | --- | --- |")
for log in sorted(pathlib.Path(sys.argv[1]).glob("*/log.jsonl")):
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    low, last = min(row["val_loss"] for row in rows), rows[-1]
    cells = log.parent.name, last["step"], f"{low:.4f}", last["elapsed_s"], last["tokens_per_s"]
    print("|", " | ".join(map(str, cells)), "|")
EOF
python -c "$runs" "$out" | tee "$out/runs.md"
