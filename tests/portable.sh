#!/usr/bin/env bash
# Makes a folder that tests, shows and measures the GPU kernels on a machine without Rust:
#
#   tests/portable.sh FOLDER [cargo options, e.g. --release]
#
# needs cargo, a C compiler and nvcc; SEGATTN_CUDA_ARCHS=90 keeps it small. On the machine with the GPU,
# `FOLDER/run.sh` says its options.
set -euo pipefail
if [ $# -lt 1 ]; then sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; fi
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
cd "$root"

# Copies what cargo built, stripped, under its target's name.
take() {
  cargo "$@" --features cuda --message-format=json-render-diagnostics |
    sed -n 's/.*"name":"\([^"]*\)","src_path".*"executable":"\([^"]*\)".*/\1 \2/p' |
    while read -r name path; do
      strip -o "$folder/$name" "$path"
      echo "$name  $(du -h "$folder/$name" | cut -f1)"
    done
}
take test --no-run --test attention_cuda --test decode_cuda --test memory_cuda "$@"
take build --bin segattn --example attention_slices --example attention_pointers "$@"
# Benches are always optimised: cargo bench knows no --release.
options=()
for option in "$@"; do
  case "$option" in
    --release | -r) ;;
    *) options+=("$option") ;;
  esac
done
take bench --no-run --bench attention --bench model ${options[@]+"${options[@]}"}
mv "$folder/attention" "$folder/bench_attention"
mv "$folder/model" "$folder/bench_model"
cp benches/attention_gpu/peers.py "$folder/"
cp benches/model/gpu/peers.py "$folder/model_peers.py"

# The C interface: its example, linked with the static library.
archive=$(cargo build -p segattn-capi --features cuda --message-format=json-render-diagnostics "$@" |
  sed -n 's/.*"\([^"]*libsegattn_c\.a\)".*/\1/p')
if [ -n "$archive" ]; then
  ${CC:-cc} -O2 -Icapi/include capi/examples/attention.c "$archive" -Wl,--gc-sections -lpthread -ldl -lm \
    -o "$folder/attention_c"
  strip "$folder/attention_c"
else
  echo "no C program: cargo made no libsegattn_c.a"
fi

# The Python package with its tests, for a python3 there that has PyTorch and pytest.
if cargo build --manifest-path python/Cargo.toml --features cuda --release; then
  mkdir -p "$folder/python"
  cp -r python/segattn python/tests python/examples python/README.md "$folder/python/"
  rm -f "$folder/python/segattn/_native.abi3.so"
  strip -o "$folder/python/segattn/_native.abi3.so" python/target/release/lib_native.so
else
  echo "no Python package: it did not compile"
fi

# The crate for candle, whose own kernels and libraries need a CUDA toolkit here and there.
if (cd candle && take test --no-run --test gpu "$@"); then
  mv "$folder/gpu" "$folder/candle_gpu"
else
  echo "no test of candle: it did not compile"
fi

# A server with many clients.
cp tests/serving/many_clients.py configs/train.toml "$folder/"

# Golden vectors of the instruction wrappers, recorded again there and compared bit by bit.
nvcc=${NVCC:-$(command -v nvcc || true)}
if [ -n "$nvcc" ] && "$nvcc" -std=c++17 -O2 -gencode=arch=compute_90a,code=sm_90a -Ikernels \
  -L"$(dirname "$nvcc")/../lib" sim/golden/record.cu -o "$folder/golden_record"; then
  cp sim/golden/vectors.safetensors "$folder/golden.safetensors"
else
  echo "no golden vectors: the recorder did not compile"
fi

cat > "$folder/run.sh" <<'RUN'
#!/usr/bin/env bash
# run.sh [--repeat N] [--serve SECONDS] [--sanitizer] [--bench] [--model]
#   tests on GPU 0; --repeat: equal bits over N repetitions (default 1000); --serve: how long 64 clients ask a server
#   (default 30); --sanitizer: once more, small, under compute-sanitizer's memcheck and racecheck; --bench, --model:
#   afterwards the bench of attention, of whole models, against PyTorch where python3 has it
set -uo pipefail
cd "$(dirname "$0")"
repeat=1000 serve=30 sanitizer= bench= model=
while [ $# -gt 0 ]; do
  case "$1" in
    --repeat) repeat=$2; shift ;;
    --serve) serve=$2; shift ;;
    --sanitizer) sanitizer=1 ;;
    --bench) bench=1 ;;
    --model) model=1 ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
  shift
done
failed=
step() {
  echo "== $*"
  local begin=$SECONDS
  "$@" || { failed="$failed; $*"; echo "FAILED"; }
  echo "== $((SECONDS - begin)) s"
}
golden() {
  ./golden_record golden_here.safetensors && cmp golden_here.safetensors golden.safetensors
}
# A model that has seen a little text, and a server of it.
served() {
  ./segattn train train.toml --device cuda --data.train many_clients.py \
    --training.sequence-len 512 --training.steps 3 --training.output served &&
    python3 many_clients.py ./segattn served/checkpoints/step-* "$serve" --device cuda
}
export SEGATTN_REQUIRE_GPU=1
step ./segattn doctor
step ./attention_slices
step ./attention_pointers
if [ -x attention_c ]; then step ./attention_c; step ./attention_c --cuda; fi
if [ -x golden_record ]; then step golden; fi
if [ -x candle_gpu ]; then step ./candle_gpu; fi
rm -rf served
step served
if [ -d python ] && python3 -c 'import torch, pytest'; then
  PYTHONPATH=python step python3 -m pytest -q python/tests
else
  echo "no tests of the Python package: python3 has no torch or no pytest"
fi
SEGATTN_REPEAT=$repeat step ./attention_cuda --test-threads 4
step ./decode_cuda --test-threads 1
step ./memory_cuda --test-threads 1
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    options=(--tool "$tool" --report-api-errors no --error-exitcode 9)
    # racecheck does not follow the mbarriers that order Hopper's kernels; the simulated GPU does.
    if [ $tool = racecheck ]; then options+=(--kernel-name-exclude kernel_substring=hopper); fi
    SEGATTN_REPEAT=1 step compute-sanitizer "${options[@]}" ./attention_cuda --test-threads 1 every_role repeated
  done
fi
if [ -n "$bench" ]; then SEGATTN_BENCH_PEERS=$PWD/peers.py SEGATTN_BENCH_RUNS=$PWD step ./bench_attention --bench; fi
if [ -n "$model" ]; then SEGATTN_BENCH_PEERS=$PWD/model_peers.py SEGATTN_BENCH_RUNS=$PWD step ./bench_model --bench; fi
[ -z "$failed" ] && echo "all well" || { echo "failed$failed"; exit 1; }
RUN
chmod +x "$folder/run.sh"
echo "$folder: $(du -sh "$folder" | cut -f1)"
