//! The forward attention kernels of `kernels/` on small problems of every shape that takes another path: keys split
//! into items and combined, one token over a cache, every head size and element type, and no rows at all.

#[allow(dead_code)]
mod attention;

use std::sync::{Arc, OnceLock};

use attention::{ForwardParams, Problem, Tensor};
use half::{bf16, f16};
use segattn_sim::{Buffer, Checks, Gpu, Module, SimError};

/// A problem and the kernel that solves it.
#[derive(Clone)]
struct Case {
    /// `prefill` or `decode`.
    phase: &'static str,
    /// `bf16` or `f16`.
    element: &'static str,
    dim: usize,
    q_heads: usize,
    kv_heads: usize,
    heads_per_tile: usize,
    /// Rows of q.
    rows: usize,
    segment_len: Vec<i32>,
    prior_len: Vec<i32>,
    past_len: Vec<i32>,
    query_start: Option<Vec<i32>>,
    gates: Vec<f32>,
    prior_heads: Vec<u8>,
    scale: f64,
}

impl Case {
    /// One entry, two query heads of one KV head, past and prior seen by both.
    fn new(phase: &'static str, element: &'static str, dim: usize) -> Case {
        Case {
            phase,
            element,
            dim,
            q_heads: 2,
            kv_heads: 1,
            heads_per_tile: 1,
            rows: 5,
            segment_len: vec![5],
            prior_len: vec![3],
            past_len: vec![7],
            query_start: None,
            gates: vec![0.5, 1.0],
            prior_heads: vec![1, 1],
            scale: 1.0 / (dim as f64).sqrt(),
        }
    }

    fn batch(&self) -> usize {
        self.segment_len.len()
    }

    /// Rows of a source's tensor: its longest entry, and one that is padding.
    fn source_rows(&self, source: usize) -> usize {
        let lens = [&self.past_len, &self.prior_len, &self.segment_len][source];
        lens.iter().max().map_or(0, |&len| len as usize) + 1
    }

    /// How many keys of a source the query row sees.
    fn seen(&self, source: usize, entry: usize, head: usize, position: usize) -> usize {
        match source {
            0 if self.gates[head] > 0.0 => self.past_len[entry] as usize,
            1 if self.prior_heads[head] != 0 => self.prior_len[entry] as usize,
            2 => position + 1,
            _ => 0,
        }
    }

    fn start(&self, entry: usize) -> usize {
        self.query_start
            .as_ref()
            .map_or(0, |start| start[entry] as usize)
    }

    fn decode(&self, bits: u16) -> f64 {
        match self.element {
            "f16" => f16::from_bits(bits).to_f64(),
            _ => bf16::from_bits(bits).to_f64(),
        }
    }

    /// Elements of a tensor of `rows` and `heads`.
    fn values(&self, rows: usize, heads: usize, salt: u64) -> Vec<u16> {
        let mut state = salt;
        let mut next = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let x = (state >> 40) as f32 / (1u64 << 24) as f32 * 3.0 - 1.4;
            match self.element {
                "f16" => f16::from_f32(x).to_bits(),
                _ => bf16::from_f32(x).to_bits(),
            }
        };
        (0..self.batch() * rows * heads * self.dim)
            .map(|_| next())
            .collect()
    }

    fn tensor(&self, buffer: Buffer, rows: usize, heads: usize) -> Tensor {
        let row = heads * self.dim;
        Tensor {
            data: buffer.address(),
            batch_offsets: 0,
            strides: [(rows * row) as i64, row as i64, self.dim as i64],
            rows: rows as i64,
        }
    }
}

/// Elements of q, and k and v of each source.
struct Values {
    q: Vec<u16>,
    sources: [[Vec<u16>; 2]; 3],
}

fn values(case: &Case) -> Values {
    let source = |s: usize| {
        [1, 2].map(|i| case.values(case.source_rows(s), case.kv_heads, 2 * s as u64 + i))
    };
    Values {
        q: case.values(case.rows, case.q_heads, 99),
        sources: [source(0), source(1), source(2)],
    }
}

fn module() -> &'static Arc<Module> {
    static MODULE: OnceLock<Arc<Module>> = OnceLock::new();
    MODULE.get_or_init(|| attention::module("attention_forward.cu"))
}

fn problem(gpu: &mut Gpu, case: &Case, values: &Values) -> Result<Problem, SimError> {
    let q = gpu.input("q", &values.q)?;
    let mut tensors = [case.tensor(q, case.rows, case.q_heads); 7];
    for (i, source) in [2, 1, 0].into_iter().enumerate() {
        for (j, data) in values.sources[source].iter().enumerate() {
            let name = ["past", "prior", "current"][source];
            let rows = case.source_rows(source);
            tensors[1 + 2 * i + j] = case.tensor(gpu.input(name, data)?, rows, case.kv_heads);
        }
    }
    let query_start = match &case.query_start {
        Some(start) => gpu.input("query_start", start)?.address(),
        None => 0,
    };
    Ok(Problem {
        q_k_v_prior_past: tensors,
        segment_len: gpu.input("segment_len", &case.segment_len)?.address(),
        prior_len: gpu.input("prior_len", &case.prior_len)?.address(),
        past_len: gpu.input("past_len", &case.past_len)?.address(),
        query_start,
        past_gate: gpu.input("past_gate", &case.gates)?.address(),
        prior_heads: gpu.input("prior_heads", &case.prior_heads)?.address(),
        past_len_strides: [1, 0],
        batch: case.batch() as i32,
        q_heads: case.q_heads as i32,
        kv_heads: case.kv_heads as i32,
        scale: case.scale as f32,
    })
}

/// out, lse and the most items of a tile.
fn run(case: &Case, values: &Values, seed: u64) -> Result<(Vec<u16>, Vec<f32>, usize), SimError> {
    let name = format!("{}_{}_d{}", case.phase, case.element, case.dim);
    let info: [i32; 7] = module()
        .constant(&format!("attention_{name}_info"))
        .expect("info");
    let [threads, shared, _, tile_rows, key_rows, item_keys, _] = info.map(|x| x as usize);
    let steps: usize = (0..3)
        .map(|s| (case.source_rows(s) - 1).div_ceil(key_rows))
        .sum();
    let max_items = steps.div_ceil(item_keys / key_rows).max(1);
    let blocks = 3;
    let query_rows = case.batch() * case.q_heads * case.rows;

    let mut gpu = Gpu::new(seed, Checks::All);
    let problem = problem(&mut gpu, case, values)?;
    let out = gpu.alloc("out", query_rows * case.dim * 2)?;
    let lse = gpu.alloc("lse", query_rows * 4)?;
    let partial_rows = max_items * query_rows;
    let params = ForwardParams {
        problem,
        out: case.tensor(out, case.rows, case.q_heads),
        lse: lse.address(),
        partial_out: gpu
            .alloc("partial_out", partial_rows * case.dim * 4)?
            .address(),
        partial_state: gpu.alloc("partial_state", partial_rows * 8)?.address(),
        fold: gpu
            .alloc("fold", blocks * case.dim * tile_rows * 4)?
            .address(),
        next_item: gpu.upload("next_item", &[0u32])?.address(),
        heads_per_tile: case.heads_per_tile as i32,
        tiles: (case.rows * case.heads_per_tile).div_ceil(tile_rows) as i32,
        max_items: max_items as i32,
    };
    let kernel = |entry: &str| module().kernel(&format!("{entry}_{name}")).expect("kernel");
    let (grid, block) = ([blocks as u32, 1, 1], [threads as u32, 1, 1]);
    gpu.launch(&kernel("attention"), grid, block, shared, &params)?;
    if max_items > 1 {
        let grid = [query_rows.div_ceil(4) as u32, 1, 1];
        gpu.launch(&kernel("combine"), grid, [128, 1, 1], 0, &params)?;
    }
    assert!(gpu.unwritten(out).is_empty() && gpu.unwritten(lse).is_empty());
    Ok((gpu.download(out), gpu.download(lse), max_items))
}

/// The formula for one row: its output and lse.
fn exact(case: &Case, values: &Values, [entry, head, row]: [usize; 3]) -> (Vec<f64>, f64) {
    let (dim, position) = (case.dim, case.start(entry) + row);
    let q = &values.q[((entry * case.rows + row) * case.q_heads + head) * dim..][..dim];
    let kv = head / (case.q_heads / case.kv_heads);
    let (mut sum, mut out) = (0.0, vec![0.0; dim]);
    for source in 0..3 {
        let gate = [f64::from(case.gates[head]), 1.0, 1.0][source];
        for key in 0..case.seen(source, entry, head, position) {
            let at = ((entry * case.source_rows(source) + key) * case.kv_heads + kv) * dim;
            let [k, v] = values.sources[source].each_ref().map(|t| &t[at..at + dim]);
            let products = q
                .iter()
                .zip(k)
                .map(|(&a, &b)| case.decode(a) * case.decode(b));
            let weight = gate * (products.sum::<f64>() * case.scale).exp();
            sum += weight;
            out.iter_mut()
                .zip(v)
                .for_each(|(o, &v)| *o += weight * case.decode(v));
        }
    }
    (out.iter().map(|o| o / sum).collect(), sum.ln())
}

/// Solves the case in two schedules, of the same bits, and compares with the formula; the most items of a tile.
fn check(case: &Case) -> usize {
    let values = values(case);
    let (out, lse, items) = run(case, &values, 0).unwrap_or_else(|e| panic!("{e}"));
    let (out_1, lse_1, _) = run(case, &values, 1).unwrap_or_else(|e| panic!("{e}"));
    let bits = |lse: &[f32]| lse.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(out == out_1 && bits(&lse) == bits(&lse_1), "other bits");
    for (i, &got_lse) in lse.iter().enumerate() {
        let [entry, head, row] = [
            i / case.rows / case.q_heads,
            i / case.rows % case.q_heads,
            i % case.rows,
        ];
        let at = ((entry * case.rows + row) * case.q_heads + head) * case.dim;
        let got = &out[at..at + case.dim];
        if case.start(entry) + row >= case.segment_len[entry] as usize {
            assert!(got_lse == f32::NEG_INFINITY && got.iter().all(|&x| x == 0));
            continue;
        }
        let (want, want_lse) = exact(case, &values, [entry, head, row]);
        assert!(
            (f64::from(got_lse) - want_lse).abs() < 2e-4,
            "lse of {entry} {head} {row}: {}, {want_lse}",
            got_lse
        );
        for (&got, want) in got.iter().zip(want) {
            let got = case.decode(got);
            assert!(
                (got - want).abs() < 0.012,
                "{entry} {head} {row}: {got} {want}"
            );
        }
    }
    items
}

#[test]
fn every_head_size_and_element_type_agrees_with_the_formula() {
    for element in ["bf16", "f16"] {
        for dim in [32, 64, 96, 128, 256] {
            check(&Case::new("prefill", element, dim));
            let mut decode = Case::new("decode", element, dim);
            decode.rows = 1;
            decode.query_start = Some(vec![4]);
            decode.heads_per_tile = 2;
            check(&decode);
        }
    }
}

#[test]
fn one_token_over_a_long_past_is_split_and_combined() {
    for (element, dim) in [("bf16", 32), ("f16", 64), ("bf16", 96), ("f16", 256)] {
        let mut case = Case::new("decode", element, dim);
        case.rows = 2;
        case.heads_per_tile = 2;
        case.segment_len = vec![30, 4];
        case.query_start = Some(vec![28, 3]);
        case.prior_len = vec![0, 70];
        case.past_len = vec![2100, 5];
        assert_eq!(check(&case), 3);
    }
}

#[test]
fn sections_of_a_decoded_row_are_combined_in_order() {
    let mut case = Case::new("decode", "bf16", 32);
    (case.rows, case.heads_per_tile) = (1, 2);
    case.query_start = Some(vec![4]);
    case.past_len = vec![9000];
    assert_eq!(check(&case), 9);
}

#[test]
fn chunks_and_sections_of_a_segment_are_folded_and_combined() {
    for (element, past_len, items) in [("bf16", 2100, 1), ("f16", 8200, 2)] {
        let mut case = Case::new("prefill", element, 32);
        case.rows = 129;
        case.segment_len = vec![129];
        case.past_len = vec![past_len];
        case.gates = vec![0.25, 0.0];
        assert_eq!(check(&case), items);
    }
}

#[test]
fn a_long_segment_without_past_or_prior_crosses_chunks() {
    let mut case = Case::new("prefill", "bf16", 32);
    case.q_heads = 1;
    (case.gates, case.prior_heads) = (vec![0.0], vec![0]);
    case.rows = 1100;
    case.segment_len = vec![1090];
    case.past_len = vec![300];
    assert_eq!(check(&case), 1);
}

#[test]
fn entries_of_no_row_and_of_one_row_and_empty_sources_are_padding_or_themselves() {
    for phase in ["prefill", "decode"] {
        let mut case = Case::new(phase, "bf16", 64);
        case.rows = 3;
        case.segment_len = vec![0, 1, 3, 2];
        case.prior_len = vec![4, 0, 0, 9];
        case.past_len = vec![6, 0, 5, 0];
        check(&case);
        case.scale = -case.scale;
        check(&case);
        case.segment_len = vec![0; 4];
        check(&case);
    }
}
