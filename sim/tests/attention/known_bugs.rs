//! Bugs that attention kernels really had, one test each.
//!
//! - a barrier missing in backward, seen only at some optimisation levels (flash-attention#359):
//!   `backward_has_no_race_at_any_optimisation_level`
//! - a kernel that does not wait for the one before it, once in 3000 steps (flash-attention#2481):
//!   `a_kernel_that_does_not_wait_for_the_one_before_is_reported`
//! - d_q that is "deterministic" and is not (flash-attention#2244):
//!   `d_q_of_several_items_is_the_same_in_every_schedule`
//! - NaN in d_q at length 1 and at very unequal lengths (flash-attention#334, #443):
//!   `lengths_of_one_and_very_unequal_ones_give_numbers`
//! - rows that see nothing (pytorch#103963): `rows_that_see_nothing_are_zero`
//! - NaN from padding (flash-attention#1745): `padding_is_never_read`
//! - 32-bit offsets (flash-attention#1500, #2260, #2611): `far_offsets`, the module
//! - stale d_q and wrong d_v at unusual head sizes (flash-attention#2896, #2552):
//!   `a_dirty_workspace_changes_nothing_at_any_head_size`
//! - wrong d_k and d_v with grouped heads (levanter#449): `every_role_and_gate_in_groups_of_1_3_and_8` (module
//!   `variants`)
//! - empty sequences that crash or hang (flash-attention#2562, #1254): `empty_sequences_and_batches_end`
//! - a combine step that writes out of bounds (FlagGems#5235): `combine_writes_its_own_rows_only`
//! - gradients that Gaussian inputs never show to be wrong (TransformerEngine#3216):
//!   `one_hot_and_even_weights_are_exact`, and every kind of numbers in `variants`
//! - 32 lanes store, one arrives (cudnn-frontend#426): `lanes_that_store_without_arriving_are_reported`
//! - a neighbour's length that changes the tile and so the bits (vllm#51902):
//!   `a_row_alone_in_a_tile_in_another_batch_and_decoded_is_the_same` (module `bits`)

use segattn::attention::cuda::{BackwardPlan, DeviceSlice, Dtype, Phase, Products};
use segattn::cuda::kernels::{Error, File, Launch, Launcher};
use segattn_sim::{Kernels, Source, Stream};

use super::attention_cases::gpu::{self, Gpu, Options};
use super::attention_cases::variants::HEAD_DIMS;
use super::attention_cases::{Case, Shape, bits, suite};
use super::simulated::{Simulated, folder, kernels, only};

const BF16: Options = Options {
    dtype: Dtype::Bf16,
    phase: None,
    with_d_lse: false,
    read_only_prior: false,
    products: Products::Fastest,
};

/// Kernels of `bf16_d32` alone, with another text in a file.
fn changed(changed: File, optimization: u8, change: impl Fn(String) -> String) -> Kernels {
    Kernels::from_sources(|file| {
        let path = folder().join(file.stem()).with_extension("cu");
        let text = only(
            &std::fs::read_to_string(&path).expect("a kernel file"),
            "bf16_d32",
        );
        let text = if file == changed { change(text) } else { text };
        Source::new(path).with_text(text).optimization(optimization)
    })
}

/// The message of the panic that a check ends with.
fn failure(kernels: &Kernels, shape: &Shape) -> String {
    let mut gpu = Simulated::of(1, kernels);
    let case = Case::new(shape).rounded(Dtype::Bf16);
    let loaded = gpu::load(&mut gpu, &case, Dtype::Bf16);
    let written = match gpu::forward(&mut gpu, &loaded.problem, Some(Phase::Prefill)) {
        Ok(written) => written,
        Err(error) => return error.to_string(),
    };
    let failed = gpu::backward(&mut gpu, &case, &loaded, &written, BF16).err();
    failed.expect("a report").to_string()
}

#[test]
fn backward_has_no_race_at_any_optimisation_level() {
    let shape = Shape {
        past_gate: vec![0.5, 0.0],
        ..Shape::plain(1, 2, 32, [130, 33, 40])
    };
    for level in 0..=3 {
        let kernels = changed(File::AttentionBackward, level, |text| text);
        suite::check(
            &mut Simulated::of(u64::from(level), &kernels),
            &shape,
            None,
            BF16,
        );
    }
}

/// Runs a plan with one launch missing: what a kernel sees that does not wait for it.
struct Impatient<'a> {
    stream: Stream<'a>,
    launches: usize,
    skipped: usize,
}

impl Launcher for Impatient<'_> {
    unsafe fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.upload(to, bytes) }
    }

    unsafe fn zero(&mut self, at: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.zero(at, bytes) }
    }

    unsafe fn launch<P: Copy>(&mut self, launch: &Launch, params: &P) -> Result<(), Error> {
        self.launches += 1;
        if self.launches == self.skipped + 1 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.stream.launch(launch, params) }
    }
}

#[test]
fn a_kernel_that_does_not_wait_for_the_one_before_is_reported() {
    // Prepare, d_q, the sum of its parts, d_k and d_v: the later ones read what the first two write.
    let case = Case::new(&Shape::plain(1, 1, 32, [2, 0, 8192 + 40])).rounded(Dtype::Bf16);
    for skipped in [0, 1] {
        let mut simulated = Simulated::new(1);
        let loaded = gpu::load(&mut simulated, &case, Dtype::Bf16);
        let written =
            gpu::forward(&mut simulated, &loaded.problem, None).unwrap_or_else(|e| panic!("{e}"));
        let (saved, gradients) = gpu::backward_arguments(&mut simulated, &loaded, &written, BF16);
        let plan = BackwardPlan::new(&loaded.problem, &saved, &gradients, kernels())
            .unwrap_or_else(|e| panic!("{e}"));
        let bytes = plan.workspace_bytes();
        let workspace = DeviceSlice::new(simulated.output("workspace", bytes), bytes);
        let mut launcher = Impatient {
            stream: Stream {
                gpu: &mut simulated.gpu,
                kernels: kernels(),
            },
            launches: 0,
            skipped,
        };
        // SAFETY: the simulator checks every access.
        let result = unsafe { plan.run(&mut launcher, workspace) };
        let error = result.expect_err("a report").to_string();
        assert!(error.contains("read of memory never written"), "{error}");
        assert!(error.contains("of workspace"), "{error}");
    }
}

#[test]
fn d_q_of_several_items_is_the_same_in_every_schedule() {
    let case = Case::new(&Shape::plain(1, 1, 32, [2, 0, 8192 + 70])).rounded(Dtype::Bf16);
    let run = |seed| bits::both(&mut Simulated::new(seed), &case, BF16).1;
    let first = run(0);
    for seed in 1..5 {
        assert!(run(seed) == first, "seed {seed}");
    }
}

#[test]
fn lengths_of_one_and_very_unequal_ones_give_numbers() {
    // The suite refuses a NaN where the reference has a number.
    let shape = Shape {
        segment_len: vec![1, 1, 1, 129],
        prior_len: vec![0, 1, 300, 1],
        past_len: vec![0, 1, 1, 300],
        ..Shape::plain(1, 2, 64, [0; 3])
    };
    suite::check(&mut Simulated::new(1), &shape, None, BF16);
}

#[test]
fn rows_that_see_nothing_are_zero() {
    let shape = Shape {
        segment_len: vec![0, 3],
        prior_len: vec![5, 0],
        past_len: vec![7, 0],
        spare_rows: 130,
        ..Shape::plain(1, 1, 32, [0; 3])
    };
    let case = Case::new(&shape).rounded(Dtype::Bf16);
    let (outcome, grads) = bits::both(&mut Simulated::new(1), &case, BF16);
    let [_, rows, _, dim] = case.q.shape;
    for (entry, len) in [(0, 0), (1, 3)] {
        let padding = entry * rows + len..(entry + 1) * rows;
        assert!(
            outcome.lse[padding.clone()]
                .iter()
                .all(|&x| x == f32::NEG_INFINITY.to_bits())
        );
        assert!(
            outcome.rows[padding.start * dim..padding.end * dim]
                .iter()
                .all(|&x| x == 0)
        );
        let (_, d_q) = &grads.tensors[0];
        assert!(
            d_q[padding.start * dim..padding.end * dim]
                .iter()
                .all(|&x| x == 0)
        );
    }
    // Entry 0 has keys and no query: its gradients are zero as well.
    for (name, shape) in [
        ("d_prior_k", case.prior_k.shape),
        ("d_prior_v", case.prior_v.shape),
    ] {
        let (_, d) = grads
            .tensors
            .iter()
            .find(|(n, _)| *n == name)
            .expect("a gradient");
        assert!(d[..shape[1] * dim].iter().all(|&x| x == 0), "{name}");
    }
    assert_eq!(grads.d_past_gate[0], 0);
}

#[test]
fn padding_is_never_read() {
    // Beyond every length lies NaN, in every tensor and in d_lse; a product with any of it would not be a number.
    let shape = Shape {
        segment_len: vec![33, 1],
        prior_len: vec![1, 31],
        past_len: vec![31, 1],
        spare_rows: 64,
        ..Shape::plain(1, 2, 64, [0; 3])
    };
    let options = Options {
        with_d_lse: true,
        ..BF16
    };
    suite::check(&mut Simulated::new(1), &shape, None, options);
}

#[test]
fn a_dirty_workspace_changes_nothing_at_any_head_size() {
    for head_dim in HEAD_DIMS {
        let shape = Shape {
            past_gate: vec![0.5, 0.0],
            ..Shape::plain(1, 2, head_dim, [35, 3, 40])
        };
        let case = Case::new(&shape).rounded(Dtype::F16);
        let options = Options::new(Dtype::F16);
        let run = |dirt| {
            let mut gpu = Simulated::new(1).dirty(dirt);
            bits::both(&mut gpu, &case, options)
        };
        assert!(run(0x3c) == run(0xff), "head_dim {head_dim}");
    }
}

#[test]
fn empty_sequences_and_batches_end() {
    for batch in [0, 1, 3] {
        let shape = Shape {
            segment_len: vec![0; batch],
            prior_len: vec![0; batch],
            past_len: vec![0; batch],
            ..Shape::plain(2, 2, 32, [0; 3])
        };
        for spare_rows in [0, 1] {
            let shape = Shape {
                spare_rows,
                ..shape.clone()
            };
            suite::check(&mut Simulated::new(1), &shape, None, BF16);
        }
    }
}

#[test]
fn combine_writes_its_own_rows_only() {
    // A number of rows that is no multiple of a block's four, of which one row is split into chunks and its
    // neighbours are not; the case's arrangement leaves room between rows, which must stay as it was.
    let shape = Shape {
        segment_len: vec![3, 2, 0],
        prior_len: vec![0; 3],
        past_len: vec![1100, 3, 0],
        arrangement: super::attention_cases::Arrangement::BatchInside8,
        ..Shape::plain(1, 1, 96, [0; 3])
    };
    let options = Options {
        phase: Some(Phase::Decode),
        ..BF16
    };
    suite::check(&mut Simulated::new(1), &shape, Some(vec![2, 1, 0]), options);
}

/// Scores that are all 0, of a power of two of keys: every weight is the same power of two, out the mean of V. And one
/// key that takes all the weight: out is its row of V. Both without any rounding.
#[test]
fn one_hot_and_even_weights_are_exact() {
    for (dtype, head_dim) in [(Dtype::Bf16, 64), (Dtype::F16, 128)] {
        let shape = Shape::plain(1, 1, head_dim, [4, 4, 8]);
        let mut case = Case::new(&shape).rounded(dtype);
        let integer = |i: usize| ((i * 7) % 17) as f64 - 8.0;
        for tensor in [&mut case.v, &mut case.prior_v, &mut case.past_v] {
            tensor
                .data
                .iter_mut()
                .enumerate()
                .for_each(|(i, x)| *x = 4.0 * integer(i));
        }
        for tensor in [&mut case.k, &mut case.prior_k, &mut case.past_k] {
            tensor.data.fill(0.0);
        }
        let outcome = bits::both(&mut Simulated::new(1), &case, Options::new(dtype)).0;
        // The last row sees all 16 keys.
        let tensors = [(&case.past_v, 8), (&case.prior_v, 4), (&case.v, 4)];
        for column in 0..head_dim {
            let sums =
                tensors.map(|(v, rows)| (0..rows).map(|row| v.row(0, row, 0)[column]).sum::<f64>());
            let mean = sums.iter().sum::<f64>() / 16.0;
            assert_eq!(
                outcome.rows[3 * head_dim + column],
                gpu::to_bits(dtype, mean),
                "mean, column {column}"
            );
        }
        // A key that every query meets with a score of thousands.
        case.q.data.fill(8.0);
        case.prior_k.row_mut(0, 2, 0).fill(64.0);
        let (outcome, grads) = bits::both(&mut Simulated::new(1), &case, Options::new(dtype));
        for row in 0..4 {
            let expected = case
                .prior_v
                .row(0, 2, 0)
                .iter()
                .map(|&x| gpu::to_bits(dtype, x));
            assert!(
                outcome.rows[row * head_dim..(row + 1) * head_dim]
                    .iter()
                    .copied()
                    .eq(expected),
                "row {row}"
            );
        }
        // The weight is exactly 1, so the sum of all rows' d_out is the key's d_v, and nothing moves the scores.
        for (name, values) in &grads.tensors {
            let numbers = values.iter().map(|&x| gpu::to_f64(dtype, x));
            if matches!(*name, "d_q" | "d_k" | "d_prior_k") {
                assert!(
                    numbers.clone().all(|x| x == 0.0),
                    "{name}: {:?}",
                    numbers.collect::<Vec<_>>()
                );
            }
        }
    }
}

#[test]
fn lanes_that_store_without_arriving_are_reported() {
    // Every thread stores its part of d_k; those of one warp alone wait for the others before they read it.
    let header = std::fs::read_to_string(folder().join("key_grad.cuh")).expect("a kernel file");
    let kernels = changed(File::AttentionBackward, 2, |text| {
        let store = header.find("void store_key_rows").expect("store_key_rows");
        let barrier = store
            + header[store..]
                .find("__syncthreads()")
                .expect("its barrier");
        let header = format!(
            "{}__syncwarp(){}",
            &header[..barrier],
            &header[barrier + "__syncthreads()".len()..]
        );
        let include = "#include \"key_grad.cuh\"";
        assert!(text.contains(include));
        text.replace(include, &header)
    });
    let message = failure(&kernels, &Shape::plain(1, 1, 32, [130, 0, 0]));
    assert!(
        message.contains("race in attention_key_grad_bf16_d32"),
        "{message}"
    );
    assert!(message.contains("attention_backward.cu:"), "{message}");
    // And copies whose lanes do not all wait for their own.
    let kernels = changed(File::AttentionForward, 2, |text| {
        let begin = text.find("arrive_and_wait<").expect("a wait");
        let end = begin + text[begin..].find(';').expect("a statement");
        let wait = text[begin..end].replace("arrive_and_wait", "cp_async_wait");
        format!(
            "{}if (threadIdx.x % 32 == 0) {wait}; __syncthreads(){}",
            &text[..begin],
            &text[end..]
        )
    });
    let message = failure(&kernels, &Shape::plain(1, 1, 32, [130, 0, 0]));
    assert!(message.contains("not waited for"), "{message}");
}
