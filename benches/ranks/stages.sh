#!/usr/bin/env bash
# stages.sh OUT: prefill of 128K tokens by a model of Llama-2-7B's shape (random weights) on one GPU and over two
# stages: seconds to the first token, equal bits, memory. Wants `segattn` (release, cuda) and model.py beside it,
# python3, 14 GB in /dev/shm or $TMPDIR. Ends by itself before 100 s. Logs go to OUT as they appear.
set -u
here=$(cd "$(dirname "$0")" && pwd)
OUT=$(mkdir -p "$1" && cd "$1" && pwd)
shape=${SHAPE:-7b} device=${DEVICE:-cuda} tokens=${TOKENS:-131072}
limit=${LIMIT:-95} engine=${ENGINE:-nccl} stages=${STAGES:-2}
bin=$here/segattn
began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*" | tee -a "$OUT/summary.txt"; }
room() { df -Pk "$1" 2>/dev/null | awk 'NR == 2 {print $4}'; }
base=/dev/shm
[ "$(room /dev/shm || echo 0)" -gt 20000000 ] 2>/dev/null || base=${TMPDIR:-/tmp}
work=$(mktemp -d "$base/stages.XXXX")
watch=
trap '[ -n "$watch" ] && kill $watch 2>/dev/null; rm -rf "$work"' EXIT
export NCCL_NVLS_ENABLE=0 NCCL_DEBUG=${NCCL_DEBUG:-WARN} RUST_LOG=${RUST_LOG:-segattn=debug}
cd "$work"
{ nvidia-smi; nvidia-smi topo -m; nproc; free -g; df -h "$base"; "$bin" --version; } > "$OUT/machine.txt" 2>&1
python3 "$here/model.py" make model "$shape" "$tokens" 2>&1 | tee -a "$OUT/summary.txt"
say "weights and prompts made in $base: $(du -sm model | cut -f1) MiB"
if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=timestamp,index,memory.used,utilization.gpu --format=csv,noheader,nounits -lms 250 \
    > "$OUT/memory.csv" 2>&1 & watch=$!
fi
memory() { # since line $1 of memory.csv
  [ -f "$OUT/memory.csv" ] || return
  tail -n "+$1" "$OUT/memory.csv" |
    awk -F', ' '$3 + 0 > m[$2] {m[$2] = $3 + 0}
                 END {for (g in m) printf "  GPU %s: at most %d MiB\n", g, m[g]}'
}
left() { echo $((limit - (SECONDS - began))); }
run() { # NAME COMMAND ARGUMENTS...
  local name=$1 command=$2 rest from code; shift 2; rest=$(left); from=1
  [ -f "$OUT/memory.csv" ] && from=$(($(wc -l < "$OUT/memory.csv") + 1))
  [ "$rest" -ge 8 ] || { say "$name: left out, no time"; return; }
  timeout -k 2 "$rest" "$bin" "$command" -m model --device "$device" "$@" \
    > "$OUT/$name.out" 2> "$OUT/$name.log"; code=$?
  say "$name: exit $code"
  [ $code = 0 ] || tail -c 600 "$OUT/$name.log" | tee -a "$OUT/summary.txt"
  memory "$from" | tee -a "$OUT/summary.txt"
}
first() {
  run "$1" generate --tokens model/long.json -n 1 --ignore-eos --temperature 0 --logprobs "$OUT/$1.json" "${@:2}"
  [ -f "$OUT/$1.log" ] && say "  $1: $(python3 "$here/model.py" seconds "$OUT/$1.log")"
}
same() {
  if cmp "$OUT/$1" "$OUT/$2" > "$OUT/cmp.txt" 2>&1; then say "equal bits: $1, $2"
  else say "NOT equal: $1, $2: $(cat "$OUT/cmp.txt")"; fi
}
two=(--stages "$stages" --rank-engine "$engine" --rank-timeout 30)
first one
first two "${two[@]}"
same one.json two.json
first two-again "${two[@]}"
first one-again
run score-one score --tokens model/part.json --out "$OUT/score-one.json"
run score-two score --tokens model/part.json --out "$OUT/score-two.json" "${two[@]}"
same score-one.json score-two.json
NCCL_MAX_P2P_NCHANNELS=4 first two-4-channels "${two[@]}"
first two-host --stages "$stages" --rank-engine host --rank-timeout 30
grep -h "device memory\|beyond the plan" "$OUT"/one.log "$OUT"/two.log | tee -a "$OUT/summary.txt"
say "done"
