//! Golden vectors: what every function of `kernels/ptx.cuh` gave on a GPU (H200, by `sim/golden/record.cu`) against
//! what the simulator takes it to mean. Exact where the instruction is; the bounds of the others stand here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use safetensors::SafeTensors;
use segattn_sim::{Checks, Gpu, Module, Source};

/// Functions of `ptx.cuh` whose meaning no record could show.
const NOT_RECORDED: [(&str, &str); 17] = [
    ("shared_memory", "an address; used by the copies' kernels"),
    ("shared_address", "an address; used by the copies' kernels"),
    ("pack", "pack_two under another name"),
    ("mbarrier_init", "no result"),
    ("fence_mbarrier_init", "no result"),
    ("mbarrier_arrive", "no result: it orders"),
    ("mbarrier_wait", "no result: it orders"),
    ("barrier_sync", "no result: it orders"),
    ("complete_before", "no result: it orders"),
    (
        "mbarrier_arrive_expect_bytes",
        "no result: it orders or copies; sim/tests/bulk.rs",
    ),
    (
        "tensor_copy",
        "no result: it orders or copies; sim/tests/bulk.rs",
    ),
    ("griddep_launch_dependents", "no result: it orders launches"),
    ("griddep_wait", "no result: it orders launches"),
    ("setmaxnreg_increase", "no result"),
    ("setmaxnreg_decrease", "no result"),
    (
        "matrix_descriptor",
        "an address; tile.cuh makes it for the products' kernels",
    ),
    ("wgmma_type", "a number of the simulator"),
];

/// Relative error of ex2.approx.ftz: 2^-22 by NVIDIA's account, and half a unit of our own exp2f.
const EXP2: f64 = 3.0 / (1 << 23) as f64;
/// Absolute error of lg2.approx.ftz where the result is below 1, relative above.
const LOG2: f64 = 3.0 / (1 << 23) as f64;
/// Error of one product of 16 x 8 x 16 in units of the largest of its 17 summands: tensor cores align them all to that
/// one and cut off what lies below 2^-24 of it (2^-23 with the sum's own rounding), while the simulator adds one after
/// another.
const MMA: f64 = 17.0 / (1 << 23) as f64;

#[repr(C)]
#[derive(Clone, Copy)]
struct GoldenParams {
    input: *const u8,
    more: *const u8,
    out: *mut u8,
    count: i32,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

const BYTES: &[u8] = include_bytes!("../golden/vectors.safetensors");

fn vectors() -> SafeTensors<'static> {
    SafeTensors::deserialize(BYTES).expect("safetensors")
}

/// A recorded tensor.
fn recorded<T: bytemuck::Pod>(name: &str) -> Vec<T> {
    let vectors = vectors();
    let tensor = vectors
        .tensor(name)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    bytemuck::allocation::pod_collect_to_vec(tensor.data())
}

fn module() -> &'static Arc<Module> {
    static MODULE: OnceLock<Arc<Module>> = OnceLock::new();
    MODULE.get_or_init(|| {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
        let source = Source::new(folder().join("instructions.cu")).include(&kernels);
        Module::compile(&source).unwrap_or_else(|error| panic!("{error}"))
    })
}

/// What the GPU gave, and what the simulator gives for the same inputs.
fn both<T: bytemuck::Pod>(name: &str, count: usize) -> [Vec<T>; 2] {
    let expected: Vec<T> = recorded(&format!("{name}.out"));
    let got = simulated(name, name, count, expected.len(), 32);
    [expected, got]
}

/// What the simulator gives for `outs` values of a kernel with the inputs of `inputs`.
fn simulated<T: bytemuck::Pod>(
    name: &str,
    inputs: &str,
    count: usize,
    outs: usize,
    threads: u32,
) -> Vec<T> {
    let mut gpu = Gpu::new(1, Checks::All);
    let bytes = |part: &str| {
        vectors()
            .tensor(&format!("{inputs}.{part}"))
            .map(|t| t.data().to_vec())
    };
    let input = gpu
        .input("in", &bytes("in").expect("inputs"))
        .expect("memory");
    let more = bytes("more").map_or(std::ptr::null_mut(), |more| {
        gpu.input("more", &more).expect("memory").ptr()
    });
    let out = gpu.alloc("out", outs * size_of::<T>()).expect("memory");
    let params = GoldenParams {
        input: input.ptr(),
        more,
        out: out.ptr(),
        count: count as i32,
    };
    let kernel = module().kernel(&format!("golden_{name}")).expect("kernel");
    // Products of a warpgroup need two tiles of 32 KiB.
    let shared_bytes = if threads == 32 { 2048 } else { 65536 };
    let result = gpu.launch(&kernel, [1; 3], [threads, 1, 1], shared_bytes, &params);
    result.unwrap_or_else(|error| panic!("{error}"));
    assert!(gpu.unwritten(out).is_empty(), "{name}");
    gpu.download(out)
}

fn assert_bits(name: &str, count: usize) {
    let [expected, got] = both::<u32>(name, count);
    assert_eq!(got, expected, "{name}");
}

/// Equal bits, or both no number: which of them is the hardware's own affair.
fn assert_floats(name: &str, count: usize) {
    let [expected, got] = both::<f32>(name, count);
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let same = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
        assert!(
            same,
            "{name} {i}: {got:e} ({:#x}), on the GPU {expected:e} ({:#x})",
            got.to_bits(),
            expected.to_bits()
        );
    }
}

/// Records of a kernel whose input has `width` values of 4 bytes.
fn count(name: &str, width: usize) -> usize {
    recorded::<u32>(&format!("{name}.in")).len() / width
}

#[test]
fn every_function_of_the_vocabulary_is_recorded() {
    let text = std::fs::read_to_string(folder().join("../../kernels/ptx.cuh")).expect("ptx.cuh");
    let mut functions: BTreeSet<&str> = BTreeSet::new();
    for definition in text.lines().filter(|line| line.starts_with("SEGATTN_FN ")) {
        let before = definition.split('(').next().unwrap_or_default();
        functions.extend(before.split_whitespace().last());
    }
    let kernels =
        std::fs::read_to_string(folder().join("instructions.cu")).expect("instructions.cu");
    for name in functions {
        let used = kernels.contains(&format!(" {name}(")) || kernels.contains(&format!(" {name}<"));
        let exempt = NOT_RECORDED.iter().any(|(exempt, _)| *exempt == name);
        assert!(
            used || exempt,
            "{name} of ptx.cuh is neither recorded nor in NOT_RECORDED"
        );
    }
}

#[test]
fn rounding_is_the_hardware_s() {
    assert_floats("fma_rn", count("fma_rn", 4));
    assert_floats("mul_rn", count("mul_rn", 2));
    assert_floats("max_f32", count("max_f32", 2));
    assert_bits("pack_two_bf16", count("pack_two_bf16", 2));
    assert_bits("pack_two_f16", count("pack_two_f16", 2));
    let halves = |name: &str| recorded::<u16>(&format!("{name}.in")).len();
    assert_floats("widen_bf16", halves("widen_bf16"));
    assert_floats("widen_f16", halves("widen_f16"));
    assert_bits("opaque", count("opaque", 1));
}

#[test]
fn lanes_exchange_and_count_as_on_the_hardware() {
    assert_bits("shuffle_xor", count("shuffle_xor", 32));
    assert_bits("shuffle_xor_bits", count("shuffle_xor_bits", 32));
    assert_bits("uniform", count("uniform", 32));
    assert_bits("warp_any", count("warp_any", 1));
    assert_bits("atomic_add", count("atomic_add", 1));
}

#[test]
fn matrices_and_copies_land_where_the_hardware_puts_them() {
    assert_bits("ldmatrix_x4", count("ldmatrix_x4", 32 * 4));
    assert_bits("ldmatrix_x4_trans", count("ldmatrix_x4_trans", 32 * 4));
    assert_bits("cp_async_16", count("cp_async_16", 32 * 4));
}

/// Checks every value of an approximation; `error` is that of a result, in units of the bound.
fn assert_approximates(name: &str, bound: f64, error: impl Fn(f64, f64) -> f64) {
    let inputs: Vec<f32> = recorded(&format!("{name}.in"));
    let [expected, got] = both::<f32>(name, inputs.len());
    let mut largest = 0f64;
    for ((x, got), expected) in inputs.iter().zip(&got).zip(&expected) {
        if got.is_nan()
            || expected.is_nan()
            || got.is_infinite()
            || expected.is_infinite()
            || *expected == 0.0
        {
            let same = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
            assert!(same, "{name}({x:e}): {got:e}, on the GPU {expected:e}");
        } else {
            largest = largest.max(error(f64::from(*got), f64::from(*expected)));
            assert!(
                largest <= bound,
                "{name}({x:e}): {got:e}, on the GPU {expected:e}"
            );
        }
    }
    println!("{name}: largest error {largest:e}, bound {bound:e}");
}

#[test]
fn exponentials_and_logarithms_are_within_their_bounds() {
    assert_approximates("exp2_approx", EXP2, |got, expected| {
        (got / expected - 1.0).abs()
    });
    assert_approximates("log2_approx", LOG2, |got, expected| {
        (got - expected).abs() / expected.abs().max(1.0)
    });
}

/// Element `i` of a record's A (16 x 16) or B (16 x 8) in registers, by the layout of the instruction.
fn operand(
    registers: &[u32],
    lane: usize,
    register: usize,
    half: usize,
    value: fn(u16) -> f64,
) -> f64 {
    value((registers[lane * 6 + register] >> (16 * half)) as u16)
}

/// The largest summand of every accumulator of a record: products by the fragment layouts of m16n8k16, and the sum
/// before.
fn largest_terms(registers: &[u32], sums: &[f32], value: fn(u16) -> f64) -> Vec<f64> {
    let a = |row: usize, k: usize| {
        let lane = row % 8 * 4 + k % 8 / 2;
        operand(registers, lane, row / 8 + k / 8 * 2, k % 2, value)
    };
    let b = |k: usize, column: usize| {
        operand(registers, column * 4 + k % 8 / 2, 4 + k / 8, k % 2, value)
    };
    let of = |i: usize| {
        let (lane, e) = (i / 4, i % 4);
        let (row, column) = (lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2);
        let products = (0..16).map(|k| (a(row, k) * b(k, column)).abs());
        products.fold(f64::from(sums[i]).abs(), f64::max)
    };
    (0..sums.len()).map(of).collect()
}

fn check_products(name: &str, value: fn(u16) -> f64) {
    let (operands, sums): (Vec<u32>, Vec<f32>) = (
        recorded(&format!("{name}.in")),
        recorded(&format!("{name}.more")),
    );
    let [expected, got] = both::<f32>(name, operands.len() / (32 * 6));
    let (_, header) = SafeTensors::read_metadata(BYTES).expect("a header");
    let exact: usize = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get("exact")?.parse().ok())
        .expect("metadata `exact`");
    let mut largest = 0f64;
    for (i, (got, expected)) in got.chunks(128).zip(expected.chunks(128)).enumerate() {
        let terms = largest_terms(&operands[i * 192..][..192], &sums[i * 128..][..128], value);
        for ((got, expected), term) in got.iter().zip(expected).zip(terms) {
            let what =
                format!("{name} {i}: {got:e}, on the GPU {expected:e}, largest summand {term:e}");
            if i < exact || !got.is_finite() || !expected.is_finite() {
                let same =
                    got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
                assert!(same, "{what}");
            } else if got != expected {
                largest = largest.max((f64::from(*got) - f64::from(*expected)).abs() / term);
                assert!(largest <= MMA, "{what}");
            }
        }
    }
    println!("{name}: largest error {largest:e}, bound {MMA:e}");
}

#[test]
fn products_are_exact_on_integers_and_bounded_on_numbers() {
    check_products("mma_16x8x16_bf16", |bits| {
        half::bf16::from_bits(bits).to_f64()
    });
    check_products("mma_16x8x16_f16", |bits| {
        half::f16::from_bits(bits).to_f64()
    });
}

/// Rows and columns of the products of a warpgroup, and the depth of the four together (instructions.cu).
const WGMMA: [usize; 3] = [64, 128, 64];

/// The kernels of one type, and the columns of each: the last of the 128.
fn warpgroup_kernels(dtype: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for a in ["rs", "ss"] {
        for b in ["k_major", "mn_major"] {
            for n in [64, 128] {
                found.push((format!("wgmma_{a}_{b}_{n}_{dtype}"), n));
            }
        }
    }
    found
}

/// Row and column of accumulator `i` of c and out.
fn place(i: usize) -> (usize, usize) {
    let (e, thread, tile) = (i % 4, i / 4 % 128, i / 512);
    let (warp, lane) = (thread / 32, thread % 32);
    (
        warp * 16 + lane / 4 + e / 2 * 8,
        tile * 8 + lane % 4 * 2 + e % 2,
    )
}

/// FNV-1a over the values' bytes, low word first: what record.cu keeps of results that are told apart by no bit.
fn digest(values: &[f32]) -> [u32; 2] {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    [hash as u32, (hash >> 32) as u32]
}

/// Whatever way the operands come, a product of a warpgroup has the bits of a chain of m16n8k16 on the GPU.
#[test]
fn products_of_a_warpgroup_have_the_bits_of_a_chain_on_the_hardware() {
    for dtype in ["bf16", "f16"] {
        let chain: Vec<f32> = recorded(&format!("mma_chain_{dtype}.out"));
        for (name, n) in warpgroup_kernels(dtype) {
            let columns = |part: &[f32]| digest(&part[(WGMMA[1] - n) * WGMMA[0]..]);
            let parts = chain.chunks(WGMMA[0] * WGMMA[1]).flat_map(columns);
            let got: Vec<u32> = recorded(&format!("{name}.out"));
            assert_eq!(got, parts.collect::<Vec<u32>>(), "{name}");
        }
    }
}

/// The bound of an accumulator after four products, each of MMA in its own largest summand; 0 where all sums are exact.
fn chain_bound(a: &[f64], b: &[f64], start: f64, exact: bool) -> f64 {
    let (mut sum, mut bound) = (start, 0.0);
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        let products = || a.iter().zip(b).map(|(a, b)| a * b);
        bound += MMA * products().fold(sum.abs(), |most, x| most.max(x.abs()));
        sum += products().sum::<f64>();
    }
    if exact { 0.0 } else { bound }
}

fn check_products_of_a_warpgroup(dtype: &str, value: fn(u16) -> f64) {
    let [rows, cols, depth] = WGMMA;
    let inputs = format!("mma_chain_{dtype}");
    let operands: Vec<u16> = recorded(&format!("{inputs}.in"));
    let operands: Vec<f64> = operands.into_iter().map(value).collect();
    let (a, b) = operands.split_at(rows * depth);
    let sums: Vec<f32> = recorded(&format!("{inputs}.more"));
    let expected: Vec<f32> = recorded(&format!("{inputs}.out"));
    let bound = |i: usize, start: f32| {
        let (row, col) = place(i);
        let (a, b) = (&a[row * depth..][..depth], &b[col * depth..][..depth]);
        chain_bound(a, b, f64::from(start), row % 2 == 0 && col % 2 == 0)
    };
    let mut kernels = warpgroup_kernels(dtype);
    kernels.push((inputs.clone(), cols));
    let (mut exact, mut largest) = (0, 0f64);
    for (name, n) in kernels {
        let left_out = (cols - n) * rows;
        let got: Vec<f32> = simulated(&name, &inputs, 1, 2 * n * rows, 128);
        for (part, got) in got.chunks(n * rows).enumerate() {
            for (i, got) in (left_out..).zip(got) {
                let expected = expected[part * rows * cols + i];
                let bound = bound(i, if part == 0 { 0.0 } else { sums[i] });
                let error = (f64::from(*got) - f64::from(expected)).abs();
                exact += usize::from(bound == 0.0);
                assert!(
                    error <= bound,
                    "{name} {part} {i}: {got:e}, on the GPU {expected:e}, bound {bound:e}"
                );
                largest = largest.max(if bound == 0.0 {
                    0.0
                } else {
                    error / bound * MMA
                });
            }
        }
    }
    assert!(exact > rows * cols, "{exact} sums of integers");
    println!("{dtype}: {exact} sums exact, largest error of the others {largest:e}, bound {MMA:e}");
}

#[test]
fn products_of_a_warpgroup_are_exact_on_integers_and_bounded_on_numbers() {
    check_products_of_a_warpgroup("bf16", |bits| half::bf16::from_bits(bits).to_f64());
    check_products_of_a_warpgroup("f16", |bits| half::f16::from_bits(bits).to_f64());
}
