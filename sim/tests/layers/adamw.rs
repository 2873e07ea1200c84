//! `kernels/adamw.cu` under every check: the norm against f64, every element against the CPU's arithmetic, to the bit.

use half::bf16;
use segattn::cuda::kernels::layer_params::{
    SegattnAdamwParams, SegattnAdamwResult, SegattnAdamwTensor,
};
use segattn_sim::{Buffer, Gpu};

use super::common::*;

const NAMES: [&str; 3] = ["adamw_norm_f32", "adamw_scale_f32", "adamw_update_f32"];
const BETAS: [f64; 2] = [0.9, 0.95];
const EPS: f32 = 1e-8;
const UPDATE: i32 = 3;

/// A tensor before an update: w, g, m, v.
#[derive(Clone)]
struct Tensor {
    state: [Vec<f32>; 4],
    with_weights: bool,
    lr: f64,
    decay: f64,
    floor: f32,
    changes: bool,
}

fn tensor(len: usize, salt: u64) -> Tensor {
    let mut state = [0, 1, 2, 3].map(|i| values(len, salt * 4 + i));
    state[3].iter_mut().for_each(|v| *v = v.abs());
    Tensor {
        state,
        with_weights: true,
        lr: 1e-3,
        decay: 0.1,
        floor: -1.0,
        changes: true,
    }
}

/// Tensors of one, of several and of many chunks, of every group; odd lengths.
fn tensors() -> Vec<Tensor> {
    let gates = Tensor {
        floor: 0.5,
        with_weights: false,
        decay: 0.0,
        ..tensor(7, 1)
    };
    let frozen = Tensor {
        changes: false,
        ..tensor(100, 2)
    };
    vec![
        tensor(1, 3),
        gates,
        tensor(17_001, 4),
        frozen,
        tensor(16_384, 5),
        tensor(99, 6),
    ]
}

impl Tensor {
    fn scalars(&self) -> [f32; 2] {
        let bias = 1.0 - BETAS[0].powi(UPDATE);
        [(self.lr / bias) as f32, (1.0 - self.lr * self.decay) as f32]
    }

    /// The update as the CPU does it.
    fn update(&mut self, clip: f32) {
        let [step, keep] = self.scalars();
        let [b1, b2, r1, r2] =
            [BETAS[0], BETAS[1], 1.0 - BETAS[0], 1.0 - BETAS[1]].map(|x| x as f32);
        let root = (1.0 / (1.0 - BETAS[1].powi(UPDATE)).sqrt()) as f32;
        let [w, g, m, v] = &mut self.state;
        for i in 0..w.len() {
            let g = g[i] * clip;
            m[i] = b1 * m[i] + r1 * g;
            v[i] = b2 * v[i] + r2 * (g * g);
            let next = keep * w[i] - step * (m[i] / (v[i].sqrt() * root + EPS));
            w[i] = match self.floor {
                floor if floor < 0.0 => next,
                floor if w[i] > 0.0 => next.max(floor),
                _ => w[i],
            };
        }
    }
}

/// What is on the GPU after a step: state and bf16 weights of every tensor, and the result.
struct After {
    state: Vec<[Vec<f32>; 4]>,
    weights: Vec<Vec<bf16>>,
    grad_norm: f64,
    clip: f32,
    applied: bool,
}

fn step(gpu: &mut Gpu, tensors: &[Tensor], clip_norm: f64, only_measure: bool) -> After {
    let module = module("adamw.cu");
    let info: [i32; 7] = module.constant("adamw_update_f32_info").expect("info");
    let chunk = info[5] as usize;
    let (mut table, mut buffers, mut chunks) = (Vec::new(), Vec::new(), 0usize);
    for tensor in tensors {
        let state: Vec<Buffer> = tensor
            .state
            .iter()
            .map(|x| gpu.upload("state", x).expect("memory"))
            .collect();
        let len = tensor.state[0].len();
        let weights = gpu.alloc("weights", len * 2).expect("memory");
        let [step, keep] = tensor.scalars();
        table.extend_from_slice(bytes(&SegattnAdamwTensor {
            values: state[0].ptr(),
            grads: state[1].ptr(),
            m: state[2].ptr(),
            v: state[3].ptr(),
            weights: if tensor.with_weights {
                weights.ptr()
            } else {
                std::ptr::null_mut()
            },
            len: len as i64,
            first_chunk: chunks as i64,
            step,
            keep,
            floor: tensor.floor,
            changes: tensor.changes.into(),
        }));
        chunks += len.div_ceil(chunk);
        buffers.push((state, weights));
    }
    let table = gpu.input("tensors", &table).expect("memory");
    let chunk_squares = gpu.alloc("chunk_squares", chunks * 8).expect("memory");
    let result = gpu
        .alloc("result", size_of::<SegattnAdamwResult>())
        .expect("memory");
    let params = SegattnAdamwParams {
        tensors: table.ptr(),
        chunk_squares: chunk_squares.ptr(),
        result: result.ptr(),
        chunks: chunks as i64,
        clip_norm,
        count: tensors.len() as i32,
        only_measure: only_measure.into(),
        beta1: BETAS[0] as f32,
        beta2: BETAS[1] as f32,
        rest1: (1.0 - BETAS[0]) as f32,
        rest2: (1.0 - BETAS[1]) as f32,
        root: (1.0 / (1.0 - BETAS[1].powi(UPDATE)).sqrt()) as f32,
        eps: EPS,
    };
    for (name, blocks) in NAMES.iter().zip([chunks, 1, chunks]) {
        launch(gpu, &module, name, blocks, None, &params);
    }
    let (mut state, mut weights) = (Vec::new(), Vec::new());
    for (tensor, (buffers, low)) in tensors.iter().zip(&buffers) {
        state.push(std::array::from_fn(|i| gpu.download(buffers[i])));
        weights.push(
            match tensor.with_weights && gpu.unwritten(*low).is_empty() {
                true => gpu.download(*low),
                false => Vec::new(),
            },
        );
    }
    After {
        state,
        weights,
        grad_norm: gpu.download_range::<f64>(result, 0, 1)[0],
        clip: gpu.download_range::<f32>(result, 8, 1)[0],
        applied: gpu.download_range::<i32>(result, 12, 1)[0] == 1,
    }
}

/// A table entry as bytes. It has no padding, so that all of them are values.
fn bytes(tensor: &SegattnAdamwTensor) -> &[u8] {
    let pointer = std::ptr::from_ref(tensor).cast::<u8>();
    // SAFETY: a struct without padding, for as long as it is borrowed.
    unsafe { std::slice::from_raw_parts(pointer, size_of::<SegattnAdamwTensor>()) }
}

fn exact_norm(tensors: &[Tensor]) -> f64 {
    let squares = tensors
        .iter()
        .flat_map(|t| &t.state[1])
        .map(|g| f64::from(*g).powi(2));
    squares.sum::<f64>().sqrt()
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn every_tensor_is_updated_as_on_the_cpu_to_the_bit() {
    for clip_norm in [-1.0, 3.0, 1e9] {
        let mut tensors = tensors();
        let after = step(&mut gpu(1), &tensors, clip_norm, false);
        let norm = exact_norm(&tensors);
        assert!(
            (after.grad_norm - norm).abs() < 1e-12 * norm,
            "{}, {norm}",
            after.grad_norm
        );
        assert_eq!(
            after.clip,
            if clip_norm == 3.0 {
                (3.0 / after.grad_norm) as f32
            } else {
                1.0
            }
        );
        assert!(after.applied);
        for (i, tensor) in tensors.iter_mut().enumerate() {
            if tensor.changes {
                tensor.update(after.clip);
                let rounded: Vec<bf16> =
                    tensor.state[0].iter().map(|w| bf16::from_f32(*w)).collect();
                assert_eq!(
                    bits(&after.weights[i]),
                    if tensor.with_weights {
                        bits(&rounded)
                    } else {
                        vec![]
                    }
                );
            }
            assert!(
                (0..4).all(|s| same(&after.state[i][s], &tensor.state[s])),
                "tensor {i}"
            );
        }
    }
}

#[test]
fn nothing_is_touched_where_a_gradient_is_not_finite_or_only_the_norm_is_wanted() {
    for (bad, at, tensor) in [
        (Some(f32::NAN), 17_000, 2),
        (Some(f32::NEG_INFINITY), 5, 3),
        (None, 0, 0),
    ] {
        let mut tensors = tensors();
        if let Some(bad) = bad {
            tensors[tensor].state[1][at] = bad;
        }
        let after = step(&mut gpu(1), &tensors, 1.0, bad.is_none());
        assert_eq!(after.grad_norm.is_finite(), bad.is_none());
        assert!(!after.applied);
        assert!(after.weights.iter().all(Vec::is_empty));
        for (got, tensor) in after.state.iter().zip(&tensors) {
            assert!((0..4).all(|s| same(&got[s], &tensor.state[s])));
        }
    }
}

#[test]
fn huge_gradients_have_a_finite_norm() {
    let mut tensors = vec![tensor(500, 1)];
    tensors[0].state[1].fill(1e38);
    let after = step(&mut gpu(1), &tensors, 1.0, false);
    assert!(after.applied && (after.grad_norm / (1e38 * 500f64.sqrt()) - 1.0).abs() < 1e-6);
    assert!(after.state[0][0].iter().all(|w| w.is_finite()));
}

#[test]
fn twenty_schedules_give_the_same_norm_to_the_bit() {
    let tensors = vec![tensor(17_000, 1), tensor(33, 2)];
    let norm = |seed| {
        step(&mut gpu(seed), &tensors, 1.0, true)
            .grad_norm
            .to_bits()
    };
    let first = norm(0);
    assert!((1..20).all(|seed| norm(seed) == first));
}
