#!/usr/bin/env bash
# Packs every crate and the Python package, compiles each crate from its package alone, and prints their sizes:
#
#   benches/packages.sh FOLDER [options of maturin, e.g. --zig] > benches/runs/DATE-packages.txt
#
# Needs maturin. Crates that are not published yet are found in each other's packages, and nowhere else.
set -euo pipefail
if [ $# -lt 1 ]; then sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; fi
root=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$1" && mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
cd "$root"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
size() { stat -c %s "$1" | awk '{ printf "%5.2f MiB", $1 / 1048576 }'; }

# Packing alone; compiling comes below.
pack=(--no-verify --allow-dirty --target-dir "$folder/target")
cargo package -p segattn-kernels -p segattn -p segattn-capi "${pack[@]}" >&2
mkdir "$folder/unpacked"
unpack() {
  tar -xzf "$folder/target/package/$1-$version.crate" -C "$folder/unpacked"
  patches+=(--config "patch.crates-io.$1.path='$folder/unpacked/$1-$version'")
}
patches=()
for crate in segattn-kernels segattn; do unpack "$crate"; done
# Cargo notes in the lock file what it was given here.
cp candle/Cargo.lock "$folder/"
trap 'cp "$folder/Cargo.lock" candle/' EXIT
cargo package --manifest-path candle/Cargo.toml "${pack[@]}" "${patches[@]}" >&2
for crate in segattn-capi segattn-candle; do unpack "$crate"; done

# compiles CRATE OPTION...: from its package, where the build of kernels finds no nvcc.
compiles() {
  local crate=$1
  shift
  (cd "$folder/unpacked/$crate-$version" &&
    PATH=${CARGO_HOME:-$HOME/.cargo}/bin:/usr/bin:/bin NVCC= CUDA_HOME= \
      cargo check --target-dir "$folder/target" "${patches[@]}" "$@" >&2)
  echo "$crate: $(size "$folder/target/package/$crate-$version.crate") packed, compiles alone${*:+ with $*}"
}
compiles segattn-kernels
compiles segattn
compiles segattn --features cuda
compiles segattn-capi --features cuda
compiles segattn-candle
echo
for features in "" cuda; do
  maturin build --release --manifest-path python/Cargo.toml --target-dir "$folder/target" \
    --out "$folder/wheel$features" ${features:+--features "$features"} "$@" >&2
  for wheel in "$folder/wheel$features"/*.whl; do
    echo "$(basename "$wheel")${features:+ with $features}: $(size "$wheel")"
  done
done
