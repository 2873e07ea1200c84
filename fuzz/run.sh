#!/usr/bin/env bash
# run.sh SECONDS CORES OUT: all formats for SECONDS on CORES, from 16 on. Half of the cores take safetensors, gguf,
# config and tokenizer all the time; the other half takes the others one after the other, each for as long. OUT gets
# summary.txt (a line a format, anew every 20 s, without the pieces of 100 s that still run), crashes/ with the first
# ten inputs of each format that fail, logs/ with what was said of them, and at last corpus.tar.xz with what was found.
# Beside this file: any.xz, the target `any` built with AddressSanitizer and stripped, and corpus.tar.xz, the folder
# that `SEGATTN_CORPUS=corpus cargo test --test formats` writes; a corpus-more.tar.xz is begun with too.
set -u
seconds=$1 cores=$2 out=$3
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out/crashes" "$out/logs"; out=$(cd "$out" && pwd)
work=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo /tmp)")
trap 'rm -rf "$work"' EXIT
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 1' TERM INT
xz -dc "$here/any.xz" > "$work/any" && chmod +x "$work/any"
tar -xJf "$here/corpus.tar.xz" -C "$work"
[ ! -f "$here/corpus-more.tar.xz" ] || tar -xJf "$here/corpus-more.tar.xz" -C "$work"
export TMPDIR=$work/tmp RAYON_NUM_THREADS=1 SEGATTN_FORMAT=
export ASAN_OPTIONS=detect_odr_violation=0:detect_leaks=0:quarantine_size_mb=64:malloc_context_size=12
mkdir "$TMPDIR" "$work/found"
main=(safetensors gguf config tokenizer) others=()
for f in $(cd "$work/corpus" && ls -d */ | tr -d /); do
  case " ${main[*]} " in *" $f "*) ;; *) others+=("$f");; esac
  ls "$work/corpus/$f" | wc -l > "$work/$f.seeds"
done
begin=$SECONDS
# Keeps a process of the format at work from now to second $3; number $2 tells the processes apart.
work_until() {
  local f=$1 n=$2 end=$3 left at rc words=() log=$work/$1-$2.log
  trap 'kill $! 2>/dev/null; exit' TERM
  [ ! -s "$work/corpus/$f.dict" ] || words=(-dict="$work/corpus/$f.dict")
  while left=$((begin + end - SECONDS)); [ "$left" -gt 1 ]; do
    [ "$left" -lt 150 ] || left=100
    at=$SECONDS
    SEGATTN_FORMAT=$f timeout -k 10 $((left + 60)) nice -n 10 "$work/any" "$work/corpus/$f" "${words[@]}" \
      -max_total_time="$left" -rss_limit_mb=4096 -timeout=20 -print_final_stats=1 -reload=1 -detect_leaks=0 \
      -artifact_prefix="$work/found/$f-" > "$log" 2>&1 & wait $!
    rc=$?
    awk -v f="$f" -v s=$((SECONDS - at)) '/stat::number_of_executed_units/ {n = $2} /^#[0-9]/ {seen = substr($1, 2)}
      END {print f, s, n ? n : seen + 0}' "$log" >> "$work/pieces"
    [ $rc -eq 0 ] || keep "$f" "$n" "$log" $rc
  done
}
# The failing inputs, as long as there are few, and what was said.
keep() {
  local f=$1 input
  for input in "$work/found/$f"-*; do
    [ -f "$input" ] || continue
    [ "$(ls "$out/crashes" | grep -c "^$f-")" -ge 10 ] || cp "$input" "$out/crashes/"
    mv "$input" "$work/$f.$(basename "$input").failed"
  done
  echo "exit status $4" >> "$3"
  [ "$(ls "$out/logs" | grep -c "^$f-")" -ge 10 ] || tail -c 12000 "$3" > "$out/logs/$f-$2-$SECONDS.log"
  sleep 1
}
summary() {
  touch "$work/pieces"
  {
    echo "format process_seconds executions new_inputs failing_inputs"
    for f in "${main[@]}" "${others[@]}"; do
      awk -v f="$f" '$1 == f {s += $2; n += $3} END {printf "%s %d %d", f, s, n}' "$work/pieces"
      echo " $(($(ls "$work/corpus/$f" | wc -l) - $(cat "$work/$f.seeds")))" \
        "$(ls "$work" | grep -c "^$f\..*\.failed$")"
    done
    echo "after $((SECONDS - begin)) of $seconds s"
  } > "$out/summary.new"
  mv "$out/summary.new" "$out/summary.txt"
}
each=$((cores / 8)); [ $each -ge 1 ] || each=1
for f in "${main[@]}"; do
  for n in $(seq $each); do work_until "$f" "$n" "$seconds" & done
done
# The others' time is one line of SECONDS for each core, cut at the ends of the cores: a format may go on on the next.
slots=$((cores - 4 * each)); [ $slots -ge 1 ] || slots=1
share=$((slots * seconds / ${#others[@]}))
for slot in $(seq 0 $((slots - 1))); do
  for i in "${!others[@]}"; do
    to=$(((i + 1) * share - slot * seconds)) from=$((i * share - slot * seconds))
    [ $to -gt 0 ] && [ $from -lt "$seconds" ] || continue
    work_until "${others[i]}" "slot$slot" $((to < seconds ? to : seconds))
  done &
done
while sleep 20; summary; [ -n "$(jobs -rp)" ] && [ $((SECONDS - begin)) -lt $((seconds + 90)) ]; do :; done
wait
summary
cat "$out/summary.txt"
tar -cf - -C "$work" corpus | xz -T0 > "$out/corpus.tar.xz"
