//! What must have equal bits (docs/contract.md, section 4): a row alone, in a tile, in another batch, decoded.

use segattn::attention::cuda::{Dtype, Phase};

use super::gpu::{self, Gpu, Grads, Options, Outcome};
use super::{Arrangement, Case, Shape};

/// Runs a forward pass.
fn forward(gpu: &mut impl Gpu, case: &Case<f64>, dtype: Dtype, phase: Phase) -> Outcome {
    let loaded = gpu::load(gpu, case, dtype);
    let written = gpu::forward(gpu, &loaded.problem, Some(phase))
        .unwrap_or_else(|e| panic!("{e}: {:?}", case.shape));
    gpu::outcome(gpu, case, &written)
}

/// Runs forward and backward.
pub fn both(gpu: &mut impl Gpu, case: &Case<f64>, options: Options) -> (Outcome, Grads) {
    let loaded = gpu::load(gpu, case, options.dtype);
    let written = gpu::forward(gpu, &loaded.problem, options.phase)
        .unwrap_or_else(|e| panic!("{e}: {:?}", case.shape));
    let outcome = gpu::outcome(gpu, case, &written);
    let grads = gpu::backward(gpu, case, &loaded, &written, options)
        .unwrap_or_else(|e| panic!("{e}: {:?}", case.shape));
    (outcome, grads)
}

/// out and lse of every head at a row.
fn row(
    case: &Case<f64>,
    outcome: &Outcome,
    batch_index: usize,
    row: usize,
) -> (Vec<u16>, Vec<u32>) {
    let [_, rows, heads, dim] = case.q.shape;
    let at = (batch_index * rows + row) * heads * dim;
    let lse = (0..heads).map(|head| outcome.lse[(batch_index * heads + head) * rows + row]);
    (outcome.rows[at..at + heads * dim].to_vec(), lse.collect())
}

/// A segment of several tiles whose past has several chunks, beside a short one. Heads 0 and 1 read alike.
fn mixed(head_dim: usize) -> Shape {
    Shape {
        segment_len: vec![131, 9],
        prior_len: vec![40, 0],
        past_len: vec![1100, 30],
        sink_len: vec![4, 0],
        past_gate: vec![0.5, 0.25, 0.0, 0.0],
        prior_heads: vec![true, true, true, true],
        spare_rows: 1,
        ..Shape::plain(2, 2, head_dim, [0; 3])
    }
}

/// Rows of a whole segment in one tile after another are, to the bit, those computed alone, in a batch of other lengths
/// and order, and by decoding.
pub fn rows_stand_alone(gpu: &mut impl Gpu, dtype: Dtype, head_dim: usize) {
    let case = Case::new(&mixed(head_dim)).rounded(dtype);
    let whole = forward(gpu, &case, dtype, Phase::Prefill);
    let alone = |batch_index, row: usize| (batch_index, row..row + 1);
    let one = |part| vec![part];
    let excerpts = [
        ("one row alone", Phase::Prefill, one(alone(0, 130))),
        ("one row decoded", Phase::Decode, one(alone(0, 64))),
        ("rows of another tile", Phase::Prefill, one((0, 61..71))),
        (
            "another batch",
            Phase::Prefill,
            vec![(1, 0..9), (0, 0..34), alone(1, 8)],
        ),
        (
            "a batch of decoded rows",
            Phase::Decode,
            vec![
                alone(0, 0),
                alone(0, 63),
                alone(1, 8),
                alone(0, 127),
                (0, 122..131),
            ],
        ),
    ];
    for (what, phase, parts) in excerpts {
        let excerpt = case.excerpt(&parts);
        let outcome = forward(gpu, &excerpt, dtype, phase);
        for (i, (batch_index, rows)) in parts.into_iter().enumerate() {
            for (at, query) in rows.enumerate() {
                let got = row(&excerpt, &outcome, i, at);
                let same = got == row(&case, &whole, batch_index, query);
                assert!(
                    same,
                    "{what}: other bits in row {query} of batch element {batch_index}, {dtype} D {head_dim}"
                );
            }
        }
    }
}

/// The gradients of a batch element are, to the bit, those it has alone.
pub fn neighbours_change_no_gradient(gpu: &mut impl Gpu, dtype: Dtype, head_dim: usize) {
    let shape = Shape {
        segment_len: vec![1, 70, 0],
        prior_len: vec![33, 3, 8],
        past_len: vec![0, 40, 5],
        sink_len: vec![0, 3, 5],
        past_gate: vec![0.5, 1.0, 0.0],
        ..Shape::plain(1, 3, head_dim, [0; 3])
    };
    let case = Case::new(&shape).rounded(dtype);
    let options = Options::new(dtype);
    let whole = both(gpu, &case, options).1;
    for batch_index in 0..2 {
        let excerpt = case.excerpt(&[(batch_index, 0..shape.segment_len[batch_index] as usize)]);
        let alone = both(gpu, &excerpt, options).1;
        let lens = [shape.segment_len[batch_index], shape.prior_len[batch_index]];
        for ((name, got), (_, expected)) in alone.tensors.iter().zip(&whole.tensors) {
            let len = lens[usize::from(name.starts_with("d_prior"))] as usize;
            let (heads, rows) = match *name {
                "d_q" => (3, case.q.shape[1]),
                "d_prior_k" | "d_prior_v" => (1, case.prior_k.shape[1]),
                _ => (1, case.k.shape[1]),
            };
            let width = heads * head_dim;
            let expected = &expected[batch_index * rows * width..][..len * width];
            assert!(
                got[..len * width] == *expected,
                "{name} of batch element {batch_index} alone has other bits"
            );
        }
        assert_eq!(
            alone.d_past_gate,
            whole.d_past_gate[batch_index * 3..][..3],
            "d_past_gate of batch element {batch_index}"
        );
    }
}

/// Batch elements of unequal lengths without padding have, to the bit, the results that they have with padding. Nothing
/// is written behind the last.
pub fn packing_changes_no_bit(gpu: &mut impl Gpu, dtype: Dtype, head_dim: usize) {
    let past = Shape {
        segment_len: vec![3, 0, 1, 5],
        prior_len: vec![5, 1, 0, 9],
        past_len: vec![8192 + 40, 7, 0, 66],
        past_gate: vec![2.0],
        ..Shape::plain(1, 1, head_dim, [0; 3])
    };
    let lengths = Shape {
        segment_len: vec![0, 129, 1, 7, 64],
        prior_len: vec![65, 0, 1, 3, 64],
        past_len: vec![1, 65, 3, 0, 9],
        sink_len: vec![0, 4, 3, 0, 9],
        past_gate: vec![0.25, 1.0, 0.0],
        prior_heads: vec![true, false, true],
        ..Shape::plain(1, 3, head_dim, [0; 3])
    };
    let decoded = Some(vec![0, 128, 0, 5, 60]);
    let runs = [
        (&past, None, Some(Phase::Prefill)),
        (&lengths, None, None),
        (&lengths, decoded.clone(), Some(Phase::Prefill)),
        (&lengths, decoded, Some(Phase::Decode)),
    ];
    for (i, (shape, query_start, phase)) in runs.into_iter().enumerate() {
        // Keys without padding, too, where the queries are whole segments.
        let arranged = match i {
            1 => [Arrangement::Packed, Arrangement::RaggedKeys],
            _ => [Arrangement::Packed, Arrangement::Ragged],
        };
        let run = |gpu: &mut _, arrangement| {
            let shape = Shape {
                arrangement,
                ..shape.clone()
            };
            let case = Case::starting_at(&shape, query_start.clone()).rounded(dtype);
            let options = Options {
                phase,
                with_d_lse: i % 2 == 1,
                ..Options::new(dtype)
            };
            results(gpu, &case, options)
        };
        let [padded, packed] = arranged.map(|arrangement| run(gpu, arrangement));
        for ((name, expected), (_, got)) in padded.iter().zip(packed) {
            assert!(
                *expected == got,
                "{name} of run {i}, {dtype} D {head_dim}: other bits"
            );
        }
    }
}

/// The bits of every result, without padding, by name. Gradients where the queries are whole segments.
fn results(
    gpu: &mut impl Gpu,
    case: &Case<f64>,
    options: Options,
) -> Vec<(&'static str, Vec<u32>)> {
    let loaded = gpu::load(gpu, case, options.dtype);
    let written = gpu::forward(gpu, &loaded.problem, options.phase)
        .unwrap_or_else(|e| panic!("{e}: {:?}", case.shape));
    let outcome = gpu::outcome(gpu, case, &written);
    let (shape, heads) = (&case.shape, case.shape.q_heads());
    let start = |b: usize| case.query_start.as_ref().map_or(0, |start| start[b]);
    let lens: Vec<usize> = (0..shape.batch())
        .map(|b| (shape.segment_len[b] - start(b)) as usize)
        .collect();
    let lse = (0..shape.batch()).flat_map(|b| (0..heads).map(move |head| (b, head)));
    let lse = lse.flat_map(|(b, head)| &outcome.lse[case.q.first_number(b, head)..][..lens[b]]);
    let row_starts = |rows: &dyn Fn(usize) -> usize| {
        let mut starts = vec![0];
        for b in 0..shape.batch() {
            starts.push(starts[b] + rows(b));
        }
        starts
    };
    // The valid rows of a tensor with so many rows of each batch element.
    let valid = |bits: &[u16], width: usize, rows: &dyn Fn(usize) -> usize, lens: &[usize]| {
        let starts = row_starts(rows);
        let of = |b: usize| &bits[starts[b] * width..][..lens[b] * width];
        (0..shape.batch())
            .flat_map(of)
            .map(|x| u32::from(*x))
            .collect::<Vec<u32>>()
    };
    let (dim, of_q) = (shape.head_dim, |b: usize| case.q.rows_of(b));
    let mut results = vec![
        ("lse", lse.copied().collect()),
        ("out", valid(&outcome.rows, heads * dim, &of_q, &lens)),
    ];
    if case.query_start.is_some() {
        return results;
    }
    let grads = gpu::backward(gpu, case, &loaded, &written, options)
        .unwrap_or_else(|e| panic!("{e}: {:?}", case.shape));
    let prior: Vec<usize> = shape.prior_len.iter().map(|rows| *rows as usize).collect();
    let kv_width = shape.kv_heads * dim;
    for (name, bits) in &grads.tensors {
        let bits = match *name {
            "d_q" => valid(bits, heads * dim, &of_q, &lens),
            "d_prior_k" | "d_prior_v" => {
                valid(bits, kv_width, &|b| case.prior_k.rows_of(b), &prior)
            }
            _ if case.q.is_ragged() => valid(bits, kv_width, &of_q, &lens),
            _ => valid(bits, kv_width, &|b| case.k.rows_of(b), &lens),
        };
        results.push((name, bits));
    }
    results.push(("d_past_gate", grads.d_past_gate));
    results
}
