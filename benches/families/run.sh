#!/usr/bin/env bash
# run.sh OUT: a Qwen3 of 1.7B beside a Llama of its sizes, with random weights: tokens a second of training, of training
# adapters, and of decoding, in two rounds in which the GPUs change places. Then small models: heads of 100 elements,
# trained; adapters trained, merged and read by every command; equal bits of scoring and generation.
# Wants $SEGATTN (release, cuda), make.py and benches/ranks/model.py beside it, python3, two GPUs or one, 30 GB in
# /dev/shm or $TMPDIR. SIZE=tiny DEVICE=cpu is a trial. Ends by itself; logs go to OUT as they appear.
set -u
here=$(cd "$(dirname "$0")" && pwd)
OUT=$(mkdir -p "$1" && cd "$1" && pwd)
bin=${SEGATTN:-$here/segattn} size=${SIZE:-full} device=${DEVICE:-cuda} limit=${LIMIT:-145}
began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*" | tee -a "$OUT/summary.txt"; }
room() { df -Pk "$1" 2>/dev/null | awk 'NR == 2 {print $4}'; }
base=/dev/shm
[ "$(room /dev/shm || echo 0)" -gt 40000000 ] 2>/dev/null || base=${TMPDIR:-/tmp}
work=$(mktemp -d "$base/families.XXXX")
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$work"' EXIT
cd "$work"
{ nvidia-smi; nproc; free -g; df -h "$base"; "$bin" --version; } > "$OUT/machine.txt" 2>&1
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); [ "$gpus" -ge 1 ] || gpus=1
figures() { python3 "$here/make.py" "$@" 2>&1 | tail -1; }
figures models . "$size" | tee -a "$OUT/summary.txt"
say "weights and prompts in $base: $(du -sm . | cut -f1) MiB"
length=$([ "$size" = full ] && echo 8192 || echo 64)
steps=${STEPS:-14}
left() { echo $((limit - (SECONDS - began))); }
limited() { # SECONDS COMMAND...: at most so long, and not beyond the end
  local most=$1 rest; shift; rest=$(left)
  [ "$rest" -ge 5 ] || { echo "left out, no time"; return 1; }
  timeout -k 2 "$((most < rest ? most : rest))" "$@"
}

train() { # MODEL NAME OPTIONS...: ended without a checkpoint once it has made its steps
  local run=$2 pid model=$1 until=$((SECONDS + 50)); shift 2
  [ "$(left)" -ge 5 ] || { say "$run: left out, no time"; return; }
  "$bin" train --data.train ids.bin --data.bin-type u32 --data.cache "" --model.folder "$model" \
    --model.segment.segment-len 0 --training.sequence-len "$length" --training.batch 1 --training.steps 1000 \
    --training.validate-every 0 --checkpoint.every 0 --training.output "$run" --device "$device" "$@" \
    > "$OUT/$run.log" 2>&1 & pid=$!
  disown $pid
  while kill -0 $pid 2>/dev/null; do
    [ "$(grep -c loss "$run/metrics.jsonl" 2>/dev/null)" -ge "$steps" ] 2>/dev/null && kill -9 $pid
    [ $SECONDS -ge $until ] || [ "$(left)" -lt 1 ] && kill -9 $pid
    sleep 0.2
  done
  if [ -s "$run/metrics.jsonl" ]; then say "$run tokens/s: $(figures steps "$run")"
  else say "$run: no steps; $(tail -c 300 "$OUT/$run.log")"; fi
}
decode() { # MODEL NAME NEW PROMPTS...
  local name=$2 model=$1 new=$3; shift 3
  limited 40 "$bin" generate -m "$model" -n "$new" --ignore-eos --temperature 0 --device "$device" "$@" \
    > /dev/null 2> "$OUT/$name.log" || say "$name: exit $?; $(tail -c 300 "$OUT/$name.log")"
  say "$name tokens/s: $(figures rate "$OUT/$name.log")"
}
speed() { # MODEL GPU ROUND
  local model=$1 round=$3 i eight=()
  [ "$device" = cpu ] || export CUDA_VISIBLE_DEVICES=$2
  for i in 0 1 2 3 4 5 6 7; do eight+=(--tokens "prompt-$i.json"); done
  train "$model" "$model-train-$round"
  train "$model" "$model-lora-$round" --lora.r 16 --lora.alpha 32
  decode "$model" "$model-one-$round" 256 --tokens prompt-0.json
  decode "$model" "$model-eight-$round" 256 "${eight[@]}"
}
round() { # ROUND GPU-OF-QWEN3 GPU-OF-LLAMA
  if [ "$gpus" -ge 2 ]; then
    speed qwen3 "$2" "$1" & local one=$!
    speed llama "$3" "$1" & wait $one $!
  else speed qwen3 0 "$1"; speed llama 0 "$1"; fi
}

# Decoding on the CPU with weights in 16 bits and in 32, two threads, in turns; memory by /usr/bin/time, where it is.
widths() {
  local turn dtype time=
  [ -x /usr/bin/time ] && time="/usr/bin/time -f %MKB"
  for turn in 1 2; do
    for dtype in bfloat16 float32; do
      limited 40 $time "$bin" generate -m "smol-$dtype" --threads 2 --tokens short.json -n 100 --ignore-eos \
        --temperature 0 > /dev/null 2> "$OUT/smol-$dtype-$turn.log"
      say "cpu $dtype $turn: $(tail -n 2 "$OUT/smol-$dtype-$turn.log" | tr '\n' ' ')"
    done
  done
}

# Small models, one command after the other.
run() { # NAME COMMAND...
  local name=$1 code; shift
  limited 40 "$bin" "$@" --device "$device" > "$OUT/$name.out" 2> "$OUT/$name.log"; code=$?
  say "$name: exit $code $([ $code = 0 ] || tail -c 400 "$OUT/$name.log") $(tail -n 1 "$OUT/$name.out" | cut -c1-90)"
  return $code
}
bits() { # NAME OPTIONS...: new tokens' log-probabilities, and those of scoring the whole
  local name=$1; shift
  run "$name-generate" generate --tokens words.json -n 300 --seed 3 --ignore-eos --logprobs "$name.json" "$@"
  [ -s "$name.json" ] || return
  python3 -c 'import json, sys; print(json.load(open("words.json")) + json.load(open(sys.argv[1]))["tokens"])' \
    "$name.json" > "$name-whole.json"
  run "$name-score" score --tokens "$name-whole.json" --out "$name-scores.json" "$@"
  say "$name: $(figures same "$name.json" "$name-scores.json")"
}
learn=(--data.train text.txt --data.cache "" --training.sequence-len 1024 --training.batch 2 --training.steps 6
  --training.validate-every 0 --checkpoint.every 0
  --schedule.kind constant --schedule.warmup-steps 0 --schedule.lr 1e-3)
hundred() {
  bits hundred -m hundred
  run hundred-lora train "${learn[@]}" --model.folder hundred --training.output hundred-lora --lora.r 8 &&
    bits hundred-adapter -m hundred --adapter hundred-lora/checkpoints/step-0000000006
  run hundred-train train "${learn[@]}" --model.folder hundred --training.output hundred-run &&
    bits hundred-trained -m hundred-run/checkpoints/step-0000000006
}
adapters() {
  local adapter=small-lora/checkpoints/step-0000000006 with server address
  run small-lora train "${learn[@]}" --model.folder small --training.output small-lora --lora.r 16 || return
  with=(-m small --adapter $adapter)
  bits small-adapter "${with[@]}"
  limited 40 "$bin" merge-lora small $adapter -o merged > "$OUT/merge.log" 2>&1 || say "merge: $(cat "$OUT/merge.log")"
  bits small-merged -m merged
  run small-base-score score -m small --tokens words.json
  run small-adapter-score-words score "${with[@]}" --tokens words.json
  run small-merged-score-words score -m merged --tokens words.json
  run small-eval eval "${with[@]}" --task perplexity --data text.txt --lengths 1024
  printf 'one\ntwo\n' | limited 30 "$bin" chat "${with[@]}" --template template.jinja -n 20 --device "$device" \
    > "$OUT/small-chat.out" 2> "$OUT/small-chat.log"
  say "small-chat: exit $? $(wc -c < "$OUT/small-chat.out") bytes"
  "$bin" serve "${with[@]}" --port 0 --name small --device "$device" 2> "$OUT/small-serve.log" & server=$!
  for _ in $(seq 100); do
    address=$(sed -n 's|^small at http://\(.*\)$|\1|p' "$OUT/small-serve.log"); [ -n "$address" ] && break; sleep 0.1
  done
  python3 - "$address" > "$OUT/small-serve.out" 2>&1 <<'PY'
import json, sys, urllib.request
asked = {"model": "small", "prompt": json.load(open("words.json")), "max_tokens": 300, "seed": 3, "temperature": 1,
         "ignore_eos": True, "return_token_ids": True, "logprobs": 0}
request = urllib.request.Request(f"http://{sys.argv[1].strip()}/v1/completions", json.dumps(asked).encode(),
                                 {"content-type": "application/json"})
choice = json.load(urllib.request.urlopen(request, timeout=30))["choices"][0]
expected = json.load(open("small-adapter.json"))["tokens"]
print("server's tokens equal those of generate:", choice.get("token_ids") == expected, len(expected))
PY
  say "small-serve: $(tail -n 1 "$OUT/small-serve.out")"
  kill $server 2>/dev/null; wait $server 2>/dev/null
}
round 1 0 1
say "== small models, and beside them weights of 16 bits on the CPU"
widths & narrow=$!
if [ "$gpus" -ge 2 ]; then
  ([ "$device" = cpu ] || export CUDA_VISIBLE_DEVICES=0; hundred) & one=$!
  ([ "$device" = cpu ] || export CUDA_VISIBLE_DEVICES=1; adapters) & wait $one $!
else hundred; adapters; fi
wait $narrow
say "== second round"
round 2 1 0
python3 - "$OUT/summary.txt" <<'PY' | tee -a "$OUT/summary.txt"
import re, sys
found = {}
for line in open(sys.argv[1]):
    said = re.search(r"(qwen3|llama)-(train|lora|one|eight)-(\d) tokens/s: ([\d.]+)", line)
    if said:
        found.setdefault(said[2], {}).setdefault(said[1], []).append(float(said[4]))
print("| tokens a second | Qwen3 | Llama | Qwen3 over Llama |\n|---|---|---|---|")
for what, by in found.items():
    mean = {m: sum(x) / len(x) for m, x in by.items()}
    if len(mean) == 2:
        print(f"| {what} | {by['qwen3']} | {by['llama']} | {mean['qwen3'] / mean['llama']:.3f} |")
PY
say "done"
