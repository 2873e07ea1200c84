//! Cases that reach every entry point of the attention kernels, and every shape at which such kernels have been wrong:
//! for a simulated GPU and a real one.

use segattn::attention::cuda::{Dtype, Phase};

use super::gpu::Options;
use super::{Arrangement, Shape, Values};

/// Element types and head sizes there are kernels for.
pub const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];
pub const HEAD_DIMS: [usize; 5] = [32, 64, 96, 128, 256];

/// A case and how it is run. With `query_start` there is no backward pass.
#[derive(Debug, Clone)]
pub struct Named {
    pub name: String,
    pub shape: Shape,
    pub query_start: Option<Vec<i32>>,
    pub options: Options,
}

fn named(name: impl Into<String>, shape: Shape, options: Options) -> Named {
    Named {
        name: name.into(),
        shape,
        query_start: None,
        options,
    }
}

/// Query rows of a tile of the prefill kernel, and keys of a tile.
fn tile(head_dim: usize) -> [i32; 2] {
    if head_dim == 256 { [64, 32] } else { [128, 64] }
}

/// Every length around a tile's, in one batch, over heads of three roles.
fn lengths(dtype: Dtype, head_dim: usize) -> Named {
    let [rows, keys] = tile(head_dim);
    let shape = Shape {
        segment_len: vec![0, 1, rows - 1, rows, rows + 1],
        prior_len: vec![0, 1, keys - 1, keys, keys + 1],
        past_len: vec![keys + 1, keys, keys - 1, 1, 0],
        past_gate: vec![0.25, 1.0, 0.0],
        prior_heads: vec![true, false, true],
        ..Shape::plain(1, 3, head_dim, [0; 3])
    };
    let options = Options {
        with_d_lse: dtype == Dtype::F16,
        ..Options::new(dtype)
    };
    named("every length around a tile's", shape, options)
}

/// So much past that a tile's keys are cut into several KV splits, forward and backward.
fn split_past(dtype: Dtype, head_dim: usize) -> Named {
    let shape = Shape {
        segment_len: vec![3, 1],
        past_len: vec![8192 + 40, 7],
        past_gate: vec![2.0],
        ..Shape::plain(1, 1, head_dim, [0, 0, 0])
    };
    let shape = Shape {
        prior_len: vec![5, 0],
        ..shape
    };
    let options = Options {
        phase: Some(Phase::Prefill),
        ..Options::new(dtype)
    };
    named("a past of several KV splits", shape, options)
}

/// One token of each sequence, whose keys are split into chunks; heads of a group share a tile.
fn decode(dtype: Dtype, head_dim: usize) -> Named {
    let shape = Shape {
        segment_len: vec![70, 1, 0],
        prior_len: vec![33, 0, 4],
        past_len: vec![1024 + 70, 3, 0, 64, 1, 1],
        past_gate: vec![0.5, 1.0, 0.25, 3.5, 0.0, 0.0],
        prior_heads: vec![true, true, true, false, false, false],
        ..Shape::plain(2, 3, head_dim, [0; 3])
    };
    let options = Options {
        phase: Some(Phase::Decode),
        ..Options::new(dtype)
    };
    Named {
        query_start: Some(vec![69, 0, 0]),
        ..named("decoding over chunks", shape, options)
    }
}

/// Sinks of every number around a tile's keys, alone and before other rows of the past; heads of gate 0 read no more.
fn sinks(dtype: Dtype, head_dim: usize) -> Named {
    let [rows, keys] = tile(head_dim);
    let shape = Shape {
        segment_len: vec![rows + 1, 5, 1, 40, 3, 17],
        prior_len: vec![3, 0, keys, 9, 0, 1],
        past_len: vec![keys + 9, 4, 2 * keys + 1, keys + 1, keys, 7],
        sink_len: vec![4, 4, keys, keys + 1, keys - 1, 0],
        past_gate: vec![0.25, 0.0, 3.5],
        prior_heads: vec![true, true, false],
        ..Shape::plain(1, 3, head_dim, [0; 3])
    };
    let options = Options {
        with_d_lse: dtype == Dtype::Bf16,
        phase: Some(Phase::Prefill),
        ..Options::new(dtype)
    };
    named("sinks of every number around a tile's keys", shape, options)
}

/// As [`decode`], with sinks of each KV head.
fn decode_sinks(dtype: Dtype, head_dim: usize) -> Named {
    let mut case = decode(dtype, head_dim);
    case.name = "decoding over chunks with sinks".into();
    case.shape.sink_len = vec![4, 3, 0, 63, 1, 0];
    case
}

/// What runs every entry point of an element type and a head size.
pub fn of(dtype: Dtype, head_dim: usize) -> Vec<Named> {
    vec![
        lengths(dtype, head_dim),
        split_past(dtype, head_dim),
        decode(dtype, head_dim),
        sinks(dtype, head_dim),
        decode_sinks(dtype, head_dim),
    ]
}

/// Every mix of roles and gates, in groups of 1, 3 and 8.
pub fn roles() -> Vec<Named> {
    let gates = [0.0, 1e-3, 1.0, 3.5];
    let mixes: Vec<(f32, bool)> = gates
        .into_iter()
        .flat_map(|gate| [(gate, true), (gate, false)])
        .collect();
    let of = |kv_heads: usize, group: usize| {
        let heads = (0..kv_heads * group).map(|head| mixes[head % mixes.len()]);
        let (past_gate, prior_heads) = heads.unzip();
        let shape = Shape {
            segment_len: vec![34, 65],
            prior_len: vec![66, 31],
            past_len: (0..2 * kv_heads as i32).map(|i| 20 + 23 * i % 70).collect(),
            past_gate,
            prior_heads,
            spare_rows: 1,
            ..Shape::plain(kv_heads, group, 32, [0; 3])
        };
        let name = format!("every role in groups of {group}");
        named(name, shape, Options::new(Dtype::Bf16))
    };
    let with_sinks = |mut case: Named| {
        case.name += ", with sinks";
        case.shape.sink_len = case
            .shape
            .past_len
            .iter()
            .map(|&rows| rows.min(4))
            .collect();
        case
    };
    vec![
        of(8, 1),
        of(3, 3),
        of(1, 8),
        with_sinks(of(8, 1)),
        with_sinks(of(1, 8)),
    ]
}

/// Each source there and not there, as rows of a tensor that are all padding and as a tensor of no rows.
pub fn sources() -> Vec<Named> {
    let mut cases = Vec::new();
    for bits in 0..8 {
        for spare_rows in [0, 2] {
            let len = |bit: i32, len: i32| len * (bits >> bit & 1);
            let shape = Shape {
                spare_rows,
                past_gate: vec![1.0, 0.5],
                ..Shape::plain(1, 2, 32, [len(0, 33), len(1, 40), len(2, 9)])
            };
            let options = Options {
                read_only_prior: bits == 7,
                with_d_lse: true,
                ..Options::new(Dtype::F16)
            };
            let name = format!("sources {bits:03b}, {spare_rows} rows of padding");
            cases.push(named(name, shape, options));
        }
    }
    cases
}

/// Every arrangement in memory that the kernels take, and every kind of numbers.
pub fn arrangements_and_values() -> Vec<Named> {
    let mixed = Shape {
        segment_len: vec![40, 17],
        prior_len: vec![9, 0],
        past_len: vec![33, 5, 0, 20],
        past_gate: vec![0.0, 0.5, 1.0, 0.25],
        prior_heads: vec![true, true, false, true],
        spare_rows: 2,
        ..Shape::plain(2, 2, 64, [0; 3])
    };
    let arrangements = [
        Arrangement::Packed,
        Arrangement::HeadsOutside,
        Arrangement::BatchInside8,
        Arrangement::Offsets8,
        Arrangement::Ragged,
        Arrangement::RaggedKeys,
    ];
    let arranged = arrangements
        .into_iter()
        .enumerate()
        .map(|(i, arrangement)| {
            let shape = Shape {
                arrangement,
                ..mixed.clone()
            };
            let options = Options {
                with_d_lse: i % 2 == 0,
                read_only_prior: i == 3,
                ..Options::new(DTYPES[i % 2])
            };
            named(format!("{arrangement:?}"), shape, options)
        });
    let kinds = [
        Values::Shifted,
        Values::HeavyTails,
        Values::Huge,
        Values::Tiny,
    ];
    let valued = kinds.into_iter().enumerate().map(|(i, values)| {
        let shape = Shape {
            values,
            segment_len: vec![70],
            past_len: vec![40],
            prior_len: vec![20],
            past_gate: vec![0.5, 1.0],
            ..Shape::plain(1, 2, 64, [0; 3])
        };
        named(format!("{values:?}"), shape, Options::new(DTYPES[i % 2]))
    });
    let scales = [-0.3, 0.0, 1.5].into_iter().map(|scale| {
        let shape = Shape {
            scale: Some(scale),
            ..mixed.clone()
        };
        named(format!("scale {scale}"), shape, Options::new(Dtype::Bf16))
    });
    arranged.chain(valued).chain(scales).collect()
}
