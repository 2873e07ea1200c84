#!/usr/bin/env bash
# Decoding on the CPU beside llama.cpp, on the same weights in bf16, in turns:
#
#   benches/llama_cpp/run.sh MODEL MODEL.gguf [THREADS] > benches/runs/DATE-llama-cpp-cpu.txt
#
# MODEL is a folder of `segattn convert --dtype bf16`, MODEL.gguf what to_16_bits.py makes of the same file. Wants
# segattn in PATH or $SEGATTN, node, and the package node-llama-cpp in $NODE_MODULES. Nothing else should run.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; fi
here=$(cd "$(dirname "$0")" && pwd)
model=$1 gguf=$2 threads=${3:-2} new=${NEW:-128} turns=${TURNS:-5}
bin=${SEGATTN:-segattn}
prompt=$(mktemp); trap 'rm -f "$prompt"' EXIT
python3 -c 'import json, random; random.seed(3); print(json.dumps([random.randrange(300, 40000) for _ in range(64)]))' \
  > "$prompt"
version=$(sed -n 's/^ *"version": "\(.*\)",/\1/p' "${NODE_MODULES:?}/node-llama-cpp/package.json")
processor=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)
echo "$processor, $threads threads; weights in bf16; a prompt of 64 tokens, $new new ones; node-llama-cpp $version"
said='import json, sys; x = json.load(sys.stdin); print("llama.cpp", sys.argv[1], 64 / x["first"], x["rate"])'
for turn in $(seq "$turns"); do
  "$bin" generate -m "$model" --threads "$threads" --tokens "$prompt" -n "$new" --ignore-eos --temperature 0 \
    2>&1 > /dev/null | sed -n "s|^prompt: \(.*\) tokens, \(.*\)/s; new: .* tokens, \(.*\)/s|segattn $turn \2 \3|p"
  node "$here/decode.mjs" "$gguf" "$prompt" "$new" "$threads" |
    python3 -c "$said" "$turn"
done | awk '
  { printf "%-10s turn %d: prompt %6.1f tokens/s, new %6.1f tokens/s\n", $1, $2, $3, $4
    if ($3 > p[$1]) p[$1] = $3; if ($4 > n[$1]) n[$1] = $4 }
  END {
    other = "llama.cpp"
    prompt = p["segattn"] / p[other]; new = n["segattn"] / n[other]
    printf "best of segattn over that of llama.cpp: prompt %.2f, new %.2f\n", prompt, new
  }'
