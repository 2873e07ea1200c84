#!/usr/bin/env bash
# run.sh SECONDS CORES OUT: all targets at once for SECONDS. safetensors, gguf, config and tokenizer get six parts of
# CORES each to one part of each other target, in processes. OUT gets summary.txt (a line a target), crashes/, logs/ and
# corpus.tar.xz with what was found. Beside this file: fuzz.tar.xz with `any`, the target built with AddressSanitizer
# and stripped, and `corpus/`, as `SEGATTN_CORPUS=corpus cargo test --test formats` writes it; a corpus-more.tar.xz is
# begun with too.
set -u
seconds=$1 cores=$2 out=$3
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out/crashes" "$out/logs"; out=$(cd "$out" && pwd)
work=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo /tmp)"); trap 'rm -rf "$work"' EXIT
tar -xJf "$here/fuzz.tar.xz" -C "$work"
[ ! -f "$here/corpus-more.tar.xz" ] || tar -xJf "$here/corpus-more.tar.xz" -C "$work"
export TMPDIR=$work/tmp RAYON_NUM_THREADS=1 SEGATTN_FORMAT=
export ASAN_OPTIONS=detect_odr_violation=0:quarantine_size_mb=64:malloc_context_size=12
mkdir "$TMPDIR"
formats=$(cd "$work/corpus" && ls -d */ | tr -d /)
declare -A parts seeds; total=0
for f in $formats; do
  parts[$f]=1; case $f in safetensors | gguf | config | tokenizer) parts[$f]=6;; esac
  total=$((total + parts[$f])); seeds[$f]=$(ls "$work/corpus/$f" | wc -l)
done
end=$((SECONDS + seconds))
# One process until the time is over; begun again after a crash.
work_at() {
  local f=$1 n=$2 left i=0 words=()
  [ ! -s "$work/corpus/$f.dict" ] || words=(-dict="$work/corpus/$f.dict")
  while left=$((end - SECONDS)); [ $left -gt 1 ]; do
    SEGATTN_FORMAT=$f timeout -k 10 $((left + 40)) nice -n 10 "$work/any" "$work/corpus/$f" "${words[@]}" \
      -max_total_time=$left -rss_limit_mb=4096 -timeout=20 -print_final_stats=1 -reload=1 \
      -artifact_prefix="$out/crashes/$f-" \
      > "$work/$f-$n-$i.log" 2>&1
    # Restarts at once would fill OUT where every run crashes.
    i=$((i + 1)); [ $i -lt 20 ] || sleep 2
    tail -c 20000 "$work/$f-$n-$((i - 1)).log" > "$out/logs/$f-$n-$((i % 8)).log"
  done
}
for f in $formats; do
  count=$(((cores * parts[$f] + total - 1) / total)); [ $count -ge 1 ] || count=1
  echo "$count" > "$work/$f.count"
  for n in $(seq $count); do work_at "$f" "$n" & done
done
wait
{
  echo "format processes runs executions new_units crashes"
  for f in $formats; do
    runs=$(ls "$work/$f"-*.log | wc -l)
    executions=$(cat "$work/$f"-[0-9]*.log | awk '/stat::number_of_executed_units/ {n += $2} END {print n + 0}')
    crashes=$(ls "$out/crashes" | grep -c "^$f-")
    new=$(($(ls "$work/corpus/$f" | wc -l) - seeds[$f]))
    echo "$f $(cat "$work/$f.count") $runs $executions $new $crashes"
  done
} | tee "$out/summary.txt"
tar -cJf "$out/corpus.tar.xz" -C "$work" corpus
