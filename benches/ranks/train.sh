#!/usr/bin/env bash
# train.sh OUT: segattn on two GPUs by NCCL, by sequences and by layers: equal bits, speed, and what is said when
# something is wrong.
# Wants `segattn` or `segattn.xz` beside it. Logs go to OUT as they appear. Parts may be named:
# PARTS="small large wrong".
set -u
here=$(cd "$(dirname "$0")" && pwd)
OUT=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d /dev/shm/ranks.XXXX 2>/dev/null || mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$work"' EXIT
export NCCL_NVLS_ENABLE=0 NCCL_DEBUG=${NCCL_DEBUG:-WARN} RUST_LOG=${RUST_LOG:-segattn=debug}
bin=$here/segattn
[ -x "$bin" ] || { bin=$work/segattn; xz -dc "$here/segattn.xz" > "$bin"; chmod +x "$bin"; }
began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*" | tee -a "$OUT/summary.txt"; }
cd "$work"
{ nvidia-smi; nvidia-smi topo -m; nproc; free -g; ldconfig -p | grep nccl; "$bin" --version; } > "$OUT/machine.txt" 2>&1
python3 - > text.txt <<'PY'
import random
random.seed(5)
words = ["segment", "prior", "past", "gate", "the", "of", "a", "rank", "sum", "tree"] + [str(n) for n in range(200)]
print(" ".join(random.choice(words) for _ in range(700000)))
PY
cat > figures.py <<'PY'
# figures.py RUN...: the steps of each run by their bits, and its speed.
import json, sys, statistics
first = None
for run in sys.argv[1:]:
    try:
        lines = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    except OSError as error:
        print(run, "no metrics:", error); continue
    steps = [x for x in lines if "loss" in x]
    bits = [(x["step"], x["loss"].hex(), x["grad_norm"].hex()) for x in steps]
    bits += [(x["step"], "validation", x["validation_loss"].hex()) for x in lines if "validation_loss" in x]
    seconds = [x["seconds"] for x in steps[2:]] or [float("nan")]
    first = first or bits
    both = min(len(first), len(bits))
    same = sorted(set(first) & set(bits))
    print(f"{run}: {len(steps)} steps, last loss {steps[-1]['loss'] if steps else None}, "
          f"median {statistics.median(seconds):.4f} s, {steps[0]['tokens'] / statistics.median(seconds):.0f} tokens/s, "
          f"seconds {[round(x['seconds'], 3) for x in steps]}, equal lines with the first run: {len(same)} of {both}")
PY
hashes() { (cd "$1" && find checkpoints/*/ -name '*.safetensors' | sort | xargs sha256sum) 2>&1; }

small() {
  cat > small.toml <<'T'
[model.shape]
hidden_size = 512
intermediate_size = 1408
num_hidden_layers = 4
num_attention_heads = 8
num_key_value_heads = 4
[model.segment]
segment_len = 256
prior_len = 128
past_len = 64
long_range_heads = [1]
[training]
steps = 10
batch = 4
group = 1
sequence_len = 2048
validate_every = 5
validation_sequences = 4
learn_gates = true
[checkpoint]
every = 0
T
  run() { local name=$1; shift
    timeout 50 "$bin" train small.toml --data.train text.txt --data.cache "" \
      --training.output "$name" --device cuda "$@" \
      > "$OUT/small-$name.log" 2>&1; say "small $name: exit $?"; }
  run one
  run host --ranks 2
  NCCL_DEBUG=INFO run nccl --ranks 2 --rank-engine nccl
  run stages --stages 2 --rank-engine nccl
  python3 figures.py one host nccl stages | tee -a "$OUT/summary.txt"
  for r in one host nccl stages; do hashes $r > "$OUT/small-$r.sha"; done
  for r in host nccl stages; do
    cmp "$OUT/small-one.sha" "$OUT/small-$r.sha" && say "small: $r has the hashes of one"
  done
  cat "$OUT/small-one.sha" >> "$OUT/summary.txt"
  timeout 40 "$bin" resume one --training.steps 14 --device cuda --ranks 2 --rank-engine nccl \
    > "$OUT/small-resume-two.log" 2>&1
  say "resume of one by two: exit $?"
  timeout 40 "$bin" resume nccl --training.steps 14 --device cuda > "$OUT/small-resume-one.log" 2>&1
  say "resume of two by one: exit $?"
  hashes one > "$OUT/resumed-two.sha"; hashes nccl > "$OUT/resumed-one.sha"
  cmp "$OUT/resumed-two.sha" "$OUT/resumed-one.sha" && say "resumed: equal hashes"
  python3 figures.py one nccl | tee -a "$OUT/summary.txt"
}

large() {
  cat > large.toml <<'T'
[model.shape]
vocab_size = 128256
hidden_size = 2048
intermediate_size = 8192
num_hidden_layers = 16
num_attention_heads = 32
num_key_value_heads = 8
rope_theta = 500000.0
[model.segment]
segment_len = 4096
prior_len = 512
past_len = 512
long_range_heads = [0, 2, 4, 6]
long_range_layers = [3, 4, 5, 9]
[training]
steps = 100000
batch = 1
accumulation = 2
group = 1
sequence_len = 32768
validate_every = 0
validation_sequences = 1
[checkpoint]
every = 0
[log]
plot = false
T
  nvidia-smi --query-gpu=timestamp,index,memory.used,utilization.gpu --format=csv,noheader -l 1 \
    > "$OUT/memory.csv" 2>&1 &
  local watch=$!
  # Ends a run after so many steps: nobody needs its 15 GB of state.
  until_steps() { local name=$1 steps=$2 limit=$3; shift 3
    "$bin" train large.toml --data.train text.txt --data.cache "" --training.output "$name" --device cuda "$@" \
      > "$OUT/large-$name.log" 2>&1 &
    local pid=$! t=0
    while kill -0 $pid 2>/dev/null && [ $t -lt $((limit * 5)) ]; do
      [ -f "$name/metrics.jsonl" ] && [ "$(grep -c '"loss"' "$name/metrics.jsonl")" -ge "$steps" ] && break
      sleep 0.2; t=$((t + 1))
    done
    cp "$name/metrics.jsonl" "$OUT/large-$name.jsonl" 2>/dev/null
    local ranks; ranks=$(pgrep -P $pid)
    if [ -n "$ranks" ]; then
      local second; second=$(echo "$ranks" | sed -n 2p)
      kill -KILL "$second"; local at=$SECONDS
      for _ in $(seq 100); do kill -0 $pid 2>/dev/null || break; sleep 0.2; done
      if kill -0 $pid 2>/dev/null; then say "large $name: still there 20 s after rank 1 was killed"
      else wait $pid; say "large $name: rank 1 killed; the run ended within $((SECONDS - at)) s, exit $?"; fi
      kill -KILL $ranks $pid 2>/dev/null
    else kill -KILL $pid 2>/dev/null; fi
    wait $pid 2>/dev/null; tail -5 "$OUT/large-$name.log" | sed 's/^/    /' >> "$OUT/summary.txt"
    say "large $name: ended"; }
  until_steps big-one 8 60
  until_steps big-nccl 8 70 --ranks 2 --rank-engine nccl
  until_steps big-stages 8 70 --stages 2 --rank-engine nccl
  python3 figures.py big-one big-nccl big-stages | tee -a "$OUT/summary.txt"
  if [ $((SECONDS - began)) -lt 165 ]; then
    until_steps big-host 4 50 --ranks 2
    python3 figures.py big-one big-host | tee -a "$OUT/summary.txt"
  fi
  kill $watch 2>/dev/null
  awk -F', ' '{gsub(" MiB","",$3); if ($3 + 0 > m[$2]) m[$2] = $3 + 0}
      END {for (g in m) print "GPU " g ": at most " m[g] " MiB"}' \
    "$OUT/memory.csv" | tee -a "$OUT/summary.txt"
}

wrong() {
  CUDA_VISIBLE_DEVICES=0 timeout 20 "$bin" train small.toml --data.train text.txt --data.cache "" \
    --training.output few \
    --device cuda --ranks 2 --rank-engine nccl > "$OUT/wrong-few.log" 2>&1
  say "two ranks, one GPU: exit $?: $(tail -c 300 "$OUT/wrong-few.log")"
  for r in 0 1; do
    RANK=$r LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29733 timeout 25 "$bin" train small.toml \
      --data.train text.txt --data.cache "" --training.output same --device cuda --rank-engine nccl --rank-timeout 10 \
      > "$OUT/wrong-same-$r.log" 2>&1 &
    pids[$r]=$!
  done
  wait "${pids[0]}"; say "two ranks on the same GPU: exit $?: $(tail -c 300 "$OUT/wrong-same-0.log")"
  wait "${pids[1]}"
}

for part in ${PARTS:-small large wrong}; do $part; done
say "done"
