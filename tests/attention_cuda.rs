//! The attention kernels on a real GPU: the suite of the simulated one, at size. Where there is no GPU every test says
//! so and passes, unless `SEGATTN_REQUIRE_GPU` is set. `SEGATTN_REPEAT` says how often equal bits are asked for.
//!
//! `cargo test --release --features cuda --test attention_cuda`, or `tests/portable.sh` for a machine without Rust.

mod attention_cases;

use std::io::Write;
use std::sync::{Arc, OnceLock};

use attention_cases::gpu::{Gpu, Options};
use attention_cases::variants::{self, Named};
use attention_cases::{Case, Shape, Values, bits, suite};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use segattn::attention::cuda::slices::{Input, Output, Workspace};
use segattn::attention::cuda::{BackwardPlan, DeviceSlice, Dtype, Error, ForwardPlan};
use segattn::attention::{Gates, Len, Lengths, Problem};
use segattn::cuda::kernels::{DriverKernels, Kernels};

/// The kernels on GPU 0, loaded once; `None`, said once, where there is none.
fn kernels() -> Option<&'static DriverKernels> {
    static KERNELS: OnceLock<Option<DriverKernels>> = OnceLock::new();
    let open = || match segattn::cuda::open(0) {
        Ok(context) => Some(DriverKernels::new(&context).expect("kernels")),
        Err(error) => {
            let required = std::env::var_os("SEGATTN_REQUIRE_GPU").is_some();
            assert!(!required && error.is_absent(), "{error}");
            // Not by a macro, whose output the test harness keeps to itself.
            let said = writeln!(std::io::stderr(), "SKIPPED, no kernel runs here: {error}");
            said.expect("standard error");
            None
        }
    };
    KERNELS.get_or_init(open).as_ref()
}

/// A real GPU: a stream and the memory of a test.
struct Real {
    kernels: &'static DriverKernels,
    stream: Arc<CudaStream>,
    memory: Vec<(u64, CudaSlice<u8>)>,
}

impl Real {
    fn new() -> Option<Self> {
        let kernels = kernels()?;
        Some(Real {
            kernels,
            stream: kernels.context().new_stream().expect("a stream"),
            memory: Vec::new(),
        })
    }

    fn keep(&mut self, slice: CudaSlice<u8>) -> u64 {
        let address = slice.device_ptr(&self.stream).0;
        self.memory.push((address, slice));
        address
    }
}

impl Gpu for Real {
    fn kernels(&self) -> &impl Kernels {
        self.kernels
    }

    fn input(&mut self, _: &str, bytes: &[u8]) -> u64 {
        // An allocation of no bytes is an error.
        let slice = match bytes {
            [] => self.stream.alloc_zeros(256),
            bytes => self.stream.clone_htod(bytes),
        };
        self.keep(slice.expect("memory"))
    }

    fn output(&mut self, name: &str, bytes: usize) -> u64 {
        self.input(name, &vec![0xff; bytes])
    }

    fn download(&mut self, address: u64, bytes: usize) -> Vec<u8> {
        let found = self.memory.iter().find(|(at, _)| *at == address);
        let slice = &found.expect("a buffer").1;
        let all = self.stream.clone_dtoh(slice).expect("what was written");
        all[..bytes].to_vec()
    }

    fn forward(&mut self, plan: &ForwardPlan, workspace: DeviceSlice) -> Result<(), Error> {
        // SAFETY: the suite's addresses are those of `memory`, of the lengths it asked for.
        unsafe { plan.run(&mut self.kernels.on(&self.stream)?, workspace) }
    }

    fn backward(&mut self, plan: &BackwardPlan, workspace: DeviceSlice) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { plan.run(&mut self.kernels.on(&self.stream)?, workspace) }
    }
}

fn check_all(cases: Vec<Named>) {
    for case in cases {
        let Some(mut gpu) = Real::new() else { return };
        eprintln!("{}", case.name);
        suite::check(&mut gpu, &case.shape, case.query_start, case.options);
    }
}

/// Element types and head sizes.
fn variants() -> impl Iterator<Item = (Dtype, usize)> {
    let dtypes = variants::DTYPES.into_iter();
    dtypes.flat_map(|dtype| variants::HEAD_DIMS.map(|dim| (dtype, dim)))
}

#[test]
fn every_variant_agrees_with_the_formula() {
    for (dtype, head_dim) in variants() {
        eprintln!("{dtype} head_dim {head_dim}");
        check_all(variants::of(dtype, head_dim));
    }
}

#[test]
fn every_role_source_arrangement_and_kind_of_numbers_agrees_with_the_formula() {
    check_all(variants::roles());
    check_all(variants::sources());
    check_all(variants::arrangements_and_values());
}

/// What the simulated GPU is too slow for.
fn at_size() -> Vec<Named> {
    let case = |name: &str, shape, query_start| Named {
        name: name.into(),
        shape,
        query_start,
        options: Options::new(Dtype::Bf16),
    };
    let long_past = Shape {
        past_gate: vec![0.5, 0.0],
        ..Shape::plain(1, 2, 64, [150, 30, 8300])
    };
    let chunks = Shape {
        prior_heads: vec![false],
        past_gate: vec![0.0],
        ..Shape::plain(1, 1, 128, [2200, 0, 0])
    };
    let mixed = Shape {
        segment_len: vec![700, 513, 1],
        prior_len: vec![128, 100, 64],
        past_len: vec![2000, 0, 5],
        past_gate: vec![0.0, 1.0, 0.5, 0.0, 0.0, 2.0],
        prior_heads: vec![true, false, true, false, true, true],
        values: Values::Shifted,
        ..Shape::plain(2, 3, 128, [0; 3])
    };
    let decode = Shape {
        segment_len: vec![1701, 2, 1],
        prior_len: vec![512, 0, 64],
        past_len: vec![17_000, 130, 0],
        ..Shape::plain(2, 8, 128, [0; 3])
    };
    vec![
        case("a long past of one head", long_past, None),
        case("a segment of several chunks", chunks, None),
        case("three entries of mixed roles", mixed, None),
        case("decoding", decode, Some(vec![1700, 1, 0])),
    ]
}

#[test]
fn problems_at_size_agree_with_the_formula() {
    check_all(at_size());
}

#[test]
fn random_problems_agree_with_the_formula() {
    if kernels().is_none() {
        return;
    }
    let strategy = attention_cases::shapes(
        prop_oneof![1..20i32, 60..70i32, 120..140i32],
        vec![32, 64, 96, 128, 256],
        vec![1, 3, 8],
        vec![Values::Centered, Values::Shifted],
    );
    let mut runner = TestRunner::new(Config {
        cases: 24,
        failure_persistence: None,
        ..Config::default()
    });
    let ran = runner.run(
        &(strategy, any::<bool>(), any::<bool>(), any::<bool>()),
        |(mut shape, is_f16, with_d_lse, read_only_prior)| {
            use attention_cases::Arrangement::{BatchInside, BatchInside8, Offsets, Offsets8};
            shape.arrangement = match shape.arrangement {
                BatchInside => BatchInside8,
                Offsets => Offsets8,
                other => other,
            };
            let options = Options {
                with_d_lse,
                read_only_prior,
                ..Options::new([Dtype::Bf16, Dtype::F16][usize::from(is_f16)])
            };
            suite::check(&mut Real::new().expect("a GPU"), &shape, None, options);
            Ok(())
        },
    );
    ran.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    for (dtype, head_dim) in variants() {
        let Some(mut gpu) = Real::new() else { return };
        bits::rows_stand_alone(&mut gpu, dtype, head_dim);
        bits::neighbours_change_no_gradient(&mut gpu, dtype, head_dim);
        bits::packing_changes_no_bit(&mut gpu, dtype, head_dim);
    }
}

#[test]
fn gradients_of_gates_keep_their_bound() {
    for (dtype, head_dim) in variants() {
        let Some(mut gpu) = Real::new() else { return };
        suite::gates_keep_their_bound(&mut gpu, dtype, head_dim);
    }
}

#[test]
fn repeated_runs_have_equal_bits() {
    let repeat = std::env::var("SEGATTN_REPEAT").ok();
    let repeat: usize = repeat.map_or(20, |n| n.parse().expect("SEGATTN_REPEAT: a number"));
    for (head_dim, past_len) in [(64, vec![0, 1030]), (128, vec![9000, 5])] {
        let shape = Shape {
            segment_len: vec![700, 513],
            prior_len: vec![128, 100],
            past_len,
            past_gate: vec![0.0, 1.0, 0.5, 1.0],
            prior_heads: vec![true, false, true, true],
            ..Shape::plain(2, 2, head_dim, [0; 3])
        };
        let case = Case::new(&shape).rounded(Dtype::Bf16);
        let options = Options {
            with_d_lse: true,
            ..Options::new(Dtype::Bf16)
        };
        let mut first = None;
        for i in 0..repeat {
            let Some(mut gpu) = Real::new() else { return };
            let got = bits::both(&mut gpu, &case, options);
            let first = first.get_or_insert_with(|| got.clone());
            assert!(*first == got, "head_dim {head_dim}: run {i} has other bits");
        }
    }
}

/// A problem of one batch element, one head of 64, on slices.
fn on_slices(data: &CudaSlice<bf16>) -> Problem<'_, Input<'_, bf16>> {
    let tensor = Input::packed(data, [1, data.len() / 64, 1, 64]);
    Problem::causal(tensor, tensor, tensor)
}

#[test]
fn slices_on_two_streams_are_ordered_without_the_host() {
    let Some(kernels) = kernels() else { return };
    let streams = [(); 2].map(|()| kernels.context().new_stream().expect("a stream"));
    let ones = vec![bf16::ONE; 4096 * 64];
    let mut workspace = Workspace::default();
    for _ in 0..20 {
        let mut data = streams[0].alloc_zeros::<bf16>(ones.len()).expect("memory");
        let mut out = streams[0].alloc_zeros::<bf16>(ones.len()).expect("memory");
        let mut lse = streams[0].alloc_zeros::<f32>(4096).expect("memory");
        streams[0].memcpy_htod(&ones, &mut data).expect("a copy");
        let problem = on_slices(&data);
        let written = Output::packed(&mut out, [1, 4096, 1, 64]);
        let mut call = kernels
            .forward(&streams[1], &problem, written, &mut lse)
            .expect("a call");
        call.run(&mut workspace).expect("a run");
        drop(call);
        // Read on the first stream, which has to wait for the second.
        let got = streams[0].clone_dtoh(&out).expect("a copy");
        assert!(got.iter().all(|&x| x == bf16::ONE));
    }
}

#[test]
fn wrong_slices_are_refused_by_name_and_the_next_call_works() {
    let Some(kernels) = kernels() else { return };
    let stream = kernels.context().new_stream().expect("a stream");
    let data = stream.alloc_zeros::<bf16>(256 * 64).expect("memory");
    let mut out = stream.alloc_zeros::<bf16>(256 * 64).expect("memory");
    let mut lse = stream.alloc_zeros::<f32>(256).expect("memory");
    let mut refused = |problem: Problem<'_, Input<'_, bf16>>| {
        let written = Output::packed(&mut out, [1, 256, 1, 64]);
        let call = kernels.forward(&stream, &problem, written, &mut lse);
        call.err().map(|error| error.to_string())
    };
    let problem = on_slices(&data);
    let gates = Gates::Device {
        past_gate: 256,
        reads_past: &[true],
    };
    let past_gate = refused(problem.past(problem.k, problem.v, gates));
    assert!(past_gate.is_some_and(|said| said.starts_with("past_gate: ")));
    let lengths = refused(problem.lengths(Lengths::segment(Len::Device(256))));
    assert!(lengths.is_some_and(|said| said.starts_with("segment_len: ")));
    let k = refused(Problem {
        k: Input::packed(&data, [1, 512, 1, 64]),
        v: Input::packed(&data, [1, 512, 1, 64]),
        ..problem.lengths(Lengths::segment(&[512]).query_start(&[256]))
    });
    assert!(k.is_some_and(|said| said.starts_with("k: batch element 0: ")));
    assert_eq!(refused(problem), None);
}

#[test]
fn out_of_memory_is_an_error_and_the_next_call_works() {
    let Some(kernels) = kernels() else { return };
    let stream = kernels.context().new_stream().expect("a stream");
    let mut workspace = Workspace::default();
    let error = workspace.reserve(&stream, 1 << 50).expect_err("a petabyte");
    let said = error.to_string();
    assert!(
        said.starts_with("out of device memory: allocating 1125899906842624 bytes"),
        "{said}"
    );
    assert_eq!(workspace.bytes(), 0);
    workspace.reserve(&stream, 1 << 20).expect("a megabyte");
    assert_eq!(workspace.bytes(), 1 << 20);
    let second = segattn::cuda::open(4096).expect_err("4096 GPUs");
    assert!(second.to_string().starts_with("GPU 4096: "), "{second}");
}
