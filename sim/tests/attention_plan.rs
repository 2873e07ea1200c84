//! The crate's own host side on the simulated GPU: the plans that run on a real one, against the formula in f64, with
//! NaN in everything that must not be read and in every output and workspace.

#[path = "../../tests/attention_cases/mod.rs"]
mod attention_cases;

use std::path::Path;
use std::sync::OnceLock;

use attention_cases::gpu::{Gpu, Options};
use attention_cases::{Arrangement, Shape, suite};
use segattn::attention::cuda::{self, BackwardPlan, DeviceSlice, Dtype, Error, ForwardPlan, Phase};
use segattn_sim::{Buffer, Checks, Kernels, Stream};

/// A simulated GPU and its buffers.
struct Simulated {
    gpu: segattn_sim::Gpu,
    buffers: Vec<Buffer>,
}

fn kernels() -> &'static Kernels {
    static KERNELS: OnceLock<Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
        Kernels::compile(&folder).unwrap_or_else(|error| panic!("{error}"))
    })
}

impl Simulated {
    fn new() -> Self {
        Simulated {
            gpu: segattn_sim::Gpu::new(1, Checks::All),
            buffers: Vec::new(),
        }
    }

    fn keep(&mut self, buffer: Buffer) -> u64 {
        self.buffers.push(buffer);
        buffer.address() as u64
    }

    fn stream(&mut self) -> Stream<'_> {
        Stream {
            gpu: &mut self.gpu,
            kernels: kernels(),
        }
    }
}

impl Gpu for Simulated {
    fn kernels(&self) -> &impl cuda::Kernels {
        kernels()
    }

    fn input(&mut self, name: &str, bytes: &[u8]) -> u64 {
        let buffer = self.gpu.input(name, bytes).expect("memory");
        self.keep(buffer)
    }

    fn output(&mut self, name: &str, bytes: usize) -> u64 {
        let buffer = self.gpu.alloc(name, bytes).expect("memory");
        self.keep(buffer)
    }

    fn download(&mut self, address: u64, bytes: usize) -> Vec<u8> {
        let buffer = self
            .buffers
            .iter()
            .find(|buffer| buffer.address() as u64 == address);
        let buffer = *buffer.expect("a buffer");
        self.gpu.download_range(buffer, 0, bytes)
    }

    fn forward(&mut self, plan: &ForwardPlan, workspace: DeviceSlice) -> Result<(), Error> {
        // SAFETY: the simulator checks every access.
        unsafe { plan.run(&mut self.stream(), workspace) }
    }

    fn backward(&mut self, plan: &BackwardPlan, workspace: DeviceSlice) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { plan.run(&mut self.stream(), workspace) }
    }
}

fn small() -> Shape {
    Shape {
        segment_len: vec![40, 17],
        prior_len: vec![9, 0],
        past_len: vec![33, 5, 0, 20],
        past_gate: vec![0.0, 0.5, 1.0, 0.25],
        prior_heads: vec![true, true, false, true],
        spare_rows: 2,
        ..Shape::plain(2, 2, 32, [0; 3])
    }
}

#[test]
fn every_arrangement_and_element_type_agrees_with_the_formula() {
    for (i, arrangement) in [
        Arrangement::Packed,
        Arrangement::HeadsOutside,
        Arrangement::BatchInside8,
        Arrangement::Offsets8,
    ]
    .into_iter()
    .enumerate()
    {
        let shape = Shape {
            arrangement,
            ..small()
        };
        let dtype = [Dtype::Bf16, Dtype::F16][i % 2];
        let options = Options {
            with_d_lse: i % 2 == 0,
            read_only_prior: i == 3,
            ..Options::new(dtype)
        };
        suite::check(&mut Simulated::new(), &shape, None, options);
    }
}

#[test]
fn prefill_and_decode_give_the_same_bits() {
    let shape = Shape {
        past_gate: vec![0.5, 0.5, 0.0, 0.0],
        prior_heads: vec![true, true, false, false],
        segment_len: vec![5, 3],
        past_len: vec![1100, 70],
        ..small()
    };
    let run = |phase| {
        let options = Options {
            phase: Some(phase),
            ..Options::new(Dtype::Bf16)
        };
        suite::check(&mut Simulated::new(), &shape, Some(vec![3, 1]), options).0
    };
    assert!(run(Phase::Prefill) == run(Phase::Decode));
}
