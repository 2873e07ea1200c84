//! Safe calls with sizes, offsets, ids and lists that do not fit: a typed error before any kernel runs, never an access
//! outside a buffer. There is no unsafe code here.

#![allow(
    clippy::single_range_in_vec_init,
    clippy::reversed_empty_ranges,
    reason = "ranges of tokens, good and wrong ones"
)]

use crate::common::{gpu, upload};
use segattn::attention::PerSource;
use segattn::device::gpu::Gpu;
use segattn::device::{
    Accumulate, Attention, Device, DeviceError, Heads, KeyStore, Kind, Lesson, OutOfMemory,
    PastHeads, PastPool, PoolBits, PoolShape, Probes, QkNormGrad, Recording, Result, Rows, RowsMut,
    SegmentCache, SelectedBlocks, Selection, SelectionRule, SlotSpan, StepRows,
};
use segattn_sim::{Checks, Driver};

type Sim = Gpu<Driver>;
type Buffer = <Sim as Device>::Buffer;
type Pool = <Sim as Device>::Pool;
type Blocks = <Sim as Device>::Blocks;

/// The offending argument of a refused call.
fn refused<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
    match result.expect_err("a call that does not fit") {
        DeviceError::Argument { argument, .. } => argument,
        DeviceError::Attention(error) => panic!("{error}"),
        error => panic!("{error}"),
    }
}

fn out_of_memory<T: std::fmt::Debug>(result: Result<T>) -> OutOfMemory {
    match result.expect_err("more than all memory") {
        DeviceError::OutOfMemory(out) => out,
        error => panic!("{error}"),
    }
}

fn exact(gpu: &Sim, len: usize) -> Buffer {
    upload(gpu, Kind::Exact, &vec![1.0; len])
}

fn activations(gpu: &Sim, len: usize) -> Buffer {
    upload(gpu, Kind::Activation, &vec![1.0; len])
}

/// A step of `count` rows in one span of slot 0.
fn rows(count: usize) -> StepRows {
    StepRows {
        tokens: vec![1; count],
        angles: (0..count).collect(),
        cache_rows: (0..count).collect(),
        probe_rows: vec![None; count],
        spans: vec![SlotSpan {
            row: 0,
            rows: count,
            start: 0,
            slot: 0,
        }],
        reach: 16,
    }
}

#[test]
fn sizes_beyond_all_memory_are_errors() {
    let gpu = gpu(1, Checks::All);
    for len in [usize::MAX, usize::MAX / 2, usize::MAX / 4 + 1, 1 << 62] {
        for kind in [Kind::Exact, Kind::Activation] {
            out_of_memory(gpu.empty(kind, len));
            out_of_memory(gpu.zeros(kind, len));
        }
    }
    let values = exact(&gpu, 8);
    refused(gpu.matrix(&values, usize::MAX, 8, false));
    refused(gpu.matrix(&values, 2, 8, false));
    // Nothing is lost.
    assert_eq!(gpu.memory_use().buffers.used, 32);
    assert_eq!(gpu.read(&values, 0..8).expect("a read"), [1.0; 8]);
}

#[test]
fn ranges_outside_a_buffer_are_errors() {
    let gpu = gpu(2, Checks::All);
    let (mut a, mut b) = (exact(&gpu, 64), exact(&gpu, 64));
    for start in [61, 64, usize::MAX - 3, usize::MAX] {
        assert_eq!(refused(gpu.write(&mut a, start, &[1.0; 4])), "range");
    }
    assert_eq!(refused(gpu.read(&a, 61..65)), "range");
    assert_eq!(refused(gpu.read(&a, usize::MAX - 1..usize::MAX)), "range");
    for (start, stride, count, width) in [
        (0, 8, 9, 8),
        (1, 8, 8, 8),
        (0, usize::MAX, 3, 8),
        (usize::MAX, 8, 1, 8),
        (0, 0, usize::MAX, 65),
        (0, 8, 2, usize::MAX),
    ] {
        for accumulate in [Accumulate::No, Accumulate::Yes] {
            let from = Rows {
                buffer: &a,
                start,
                stride,
            };
            let to = RowsMut::packed(&mut b, 0, 8);
            assert_eq!(
                refused(gpu.copy(from, to, count, width, accumulate)),
                "rows"
            );
            let to = RowsMut {
                buffer: &mut b,
                start,
                stride,
            };
            let from = Rows::packed(&a, 0, 8);
            assert_eq!(
                refused(gpu.copy(from, to, count, width, accumulate)),
                "rows"
            );
        }
    }
    assert_eq!(gpu.read(&b, 0..64).expect("a read"), [1.0; 64]);
}

#[test]
fn ids_beyond_a_table_are_errors() {
    let gpu = gpu(3, Checks::All);
    let table = gpu
        .matrix(&exact(&gpu, 27 * 64), 27, 64, false)
        .expect("a matrix");
    let mut y = activations(&gpu, 64);
    for token in [27, 1_000_000, u32::MAX] {
        let tokens = vec![token];
        let step = gpu.step(StepRows { tokens, ..rows(1) }).expect("a step");
        let to = RowsMut::packed(&mut y, 0, 64);
        assert_eq!(refused(gpu.embed(&table, &step, to)), "token");
        let mut d_table = exact(&gpu, 27 * 64);
        let d_y = Rows::packed(&y, 0, 64);
        let refusal = gpu.embed_grad(d_y, 64, &[token], &mut d_table);
        assert_eq!(refused(refusal), "token");
        let (mut logits, mut scores) = (exact(&gpu, 27), exact(&gpu, 1));
        let refusal = gpu.log_probabilities(
            RowsMut::packed(&mut logits, 0, 27),
            27,
            &[token],
            Some(&[1.0]),
            RowsMut::packed(&mut scores, 0, 1),
        );
        assert_eq!(refused(refusal), "target");
        let teacher = exact(&gpu, 27);
        let mut divergences = exact(&gpu, 1);
        let mut taught = |target: u32, scales: &[[f64; 2]], vocab: usize| {
            let lesson = Lesson {
                teacher: Rows::packed(&teacher, 0, vocab),
                temperature: 1.0,
                scales,
            };
            let to = [&mut scores, &mut divergences].map(|to| RowsMut::packed(to, 0, 1));
            let rows = RowsMut::packed(&mut logits, 0, vocab);
            refused(gpu.divergences(rows, vocab, &[target], &lesson, to))
        };
        assert_eq!(taught(token, &[[1.0; 2]], 27), "target");
        assert_eq!(taught(1, &[[1.0; 2]; 2], 27), "scales");
        assert_eq!(taught(1, &[[1.0; 2]], 28), "rows");
        let refusal = gpu.log_probabilities(
            RowsMut::packed(&mut logits, 0, 27),
            27,
            &[1],
            Some(&[1.0, 1.0]),
            RowsMut::packed(&mut scores, 0, 1),
        );
        assert_eq!(refused(refusal), "scales");
    }
    let (mut logits, mut scores) = (exact(&gpu, 54), exact(&gpu, 1));
    let refusal = gpu.log_probabilities(
        RowsMut::packed(&mut logits, 0, 27),
        27,
        &[1, 2],
        None,
        RowsMut::packed(&mut scores, 0, 1),
    );
    assert_eq!(refused(refusal), "range");
}

#[test]
fn norms_of_groups_that_vectors_do_not_fit_are_errors() {
    let gpu = gpu(3, Checks::All);
    let (x, rstd, weight) = (activations(&gpu, 8), exact(&gpu, 2), exact(&gpu, 4));
    let (mut y, mut d_weight) = (activations(&gpu, 8), exact(&gpu, 4));
    let rows = || Rows::packed(&x, 0, 8);
    let (to, scales) = (RowsMut::packed(&mut y, 0, 8), Rows::packed(&rstd, 0, 2));
    let refusals = [
        refused(gpu.rms_norm_grad(rows(), rows(), scales, [1, 2], &weight, to)),
        refused(gpu.rms_norm_weight_grad(rows(), rows(), scales, [1, 2], &mut d_weight)),
        refused(gpu.rms_norm_weight_grad(rows(), rows(), scales, [1, 0], &mut d_weight)),
    ];
    assert_eq!(
        refusals,
        ["width of a norm", "width of a norm", "groups of a norm"]
    );
}

#[test]
fn norms_of_heads_beyond_their_buffers_are_errors() {
    let gpu = gpu(6, Checks::All);
    let heads = Heads {
        q: 2,
        kv: 1,
        dim: 32,
    };
    // Three rows of two heads and one, and too little for a fourth.
    let (rows, weight) = (activations(&gpu, 3 * 128), exact(&gpu, 32));
    let [q_rstd, k_rstd] = [6, 3].map(|count| exact(&gpu, count));
    let call = |count: usize, weights: [&Buffer; 2]| {
        let all = Rows::packed(&rows, 0, 128);
        let grad = QkNormGrad {
            d_y: all,
            x: all,
            rstd: [Rows::packed(&q_rstd, 0, 2), Rows::packed(&k_rstd, 0, 1)],
            rows: count,
            heads,
        };
        let mut d_x = activations(&gpu, 3 * 128);
        let [mut d_q, mut d_k] = weights.map(|weight| exact(&gpu, gpu.len(weight)));
        let d_weights = [Some(&mut d_q), Some(&mut d_k)];
        let to = RowsMut::packed(&mut d_x, 0, 128);
        [
            gpu.qk_norm_grad(&grad, weights, to),
            gpu.qk_norm_weight_grad(&grad, d_weights),
        ]
    };
    assert!(call(3, [&weight, &weight]).iter().all(Result::is_ok));
    assert_eq!(call(4, [&weight, &weight]).map(refused), ["rows", "rows"]);
    let none = exact(&gpu, 0);
    let refusals = call(3, [&weight, &none]).map(refused);
    assert_eq!(refusals, ["groups of a norm", "groups of a norm"]);
}

#[test]
fn angles_beyond_the_tables_are_errors() {
    let gpu = gpu(4, Checks::All);
    let (x, table) = (activations(&gpu, 128), exact(&gpu, 32));
    let tables = (&table, &table);
    let heads = Heads {
        q: 2,
        kv: 1,
        dim: 32,
    };
    for angles in [[0, 2], [2, 0], [0, usize::MAX], [100_000, 100_001]] {
        let mut y = activations(&gpu, 128);
        let (from, to) = (Rows::packed(&x, 0, 64), RowsMut::packed(&mut y, 0, 64));
        let refusal = gpu.rope(from, to, 2, 32, tables, &angles, false, Accumulate::No);
        assert_eq!(refused(refusal), "angle");
        let mut d_qkv = activations(&gpu, 256);
        let (q, kv) = (Rows::packed(&x, 0, 64), Rows::packed(&x, 0, 32));
        let to = RowsMut::packed(&mut d_qkv, 0, 128);
        let refusal = gpu.join_qkv([q, kv, kv], heads, tables, &angles, to);
        assert_eq!(refused(refusal), "angle");
    }
    let mut y = activations(&gpu, 128);
    let (from, to) = (Rows::packed(&x, 0, 64), RowsMut::packed(&mut y, 0, 64));
    let refusal = gpu.rope(from, to, 2, 12, tables, &[0], false, Accumulate::No);
    assert_eq!(refused(refusal), "head_dim");
}

/// Slots of `rows` rows without prior and past.
fn cache(gpu: &Sim, slots: usize, rows: usize) -> SegmentCache<Buffer> {
    let empty = || gpu.empty(Kind::Activation, 0).expect("nothing");
    SegmentCache {
        rows: PerSource {
            past: 0,
            prior: 0,
            current: rows,
        },
        k: activations(gpu, slots * rows * 32),
        raw_k: empty(),
        v: activations(gpu, slots * rows * 32),
        prior_k: empty(),
        prior_v: empty(),
        past_k: empty(),
        past_v: empty(),
        prior_len: vec![0; slots],
        past_len: vec![0; slots],
        sink_len: Vec::new(),
    }
}

fn split(gpu: &Sim, step: StepRows, cache: &mut SegmentCache<Buffer>) -> Result<()> {
    let (count, table) = (step.tokens.len(), exact(gpu, 16 * 16));
    let (qkv, mut q) = (activations(gpu, count * 128), activations(gpu, count * 64));
    let mut probes = activations(gpu, 4 * 64);
    let heads = Heads {
        q: 2,
        kv: 1,
        dim: 32,
    };
    let store = KeyStore {
        cache,
        probes: Some(&mut probes),
    };
    gpu.split_qkv(
        Rows::packed(&qkv, 0, 128),
        None,
        heads,
        (&table, &table),
        &gpu.step(step)?,
        RowsMut::packed(&mut q, 0, 64),
        Some(store),
    )
}

#[test]
fn places_outside_the_slots_are_errors() {
    let gpu = gpu(5, Checks::All);
    let mut cache = cache(&gpu, 1, 8);
    split(&gpu, rows(4), &mut cache).expect("rows that fit");
    let wrong = |change: &dyn Fn(&mut StepRows)| {
        let mut rows = rows(4);
        change(&mut rows);
        rows
    };
    let cases: [(&str, StepRows); 4] = [
        ("cache row", wrong(&|r| r.cache_rows[2] = 8)),
        ("probe row", wrong(&|r| r.probe_rows[1] = Some(4))),
        ("angle", wrong(&|r| r.angles[3] = 16)),
        ("cache row", wrong(&|r| r.cache_rows[0] = usize::MAX)),
    ];
    for (argument, rows) in cases {
        assert_eq!(refused(split(&gpu, rows, &mut cache)), argument);
    }
}

#[test]
fn a_step_whose_lists_differ_is_an_error() {
    let gpu = gpu(6, Checks::All);
    let good = || rows(2);
    let mut step = gpu.step(good()).expect("a step");
    let changes: [&dyn Fn(&mut StepRows); 7] = [
        &|r| r.angles = vec![0; 10_000],
        &|r| r.angles.clear(),
        &|r| r.cache_rows.push(0),
        &|r| r.probe_rows.clear(),
        &|r| r.spans[0].rows = 3,
        &|r| r.spans[0].row = usize::MAX,
        &|r| r.spans[0].start = 15,
    ];
    for change in changes {
        let mut rows = good();
        change(&mut rows);
        refused(gpu.step(rows.clone()));
        refused(gpu.renew(&mut step, rows));
    }
    refused(gpu.renew(&mut step, rows(3)));
    let mut other_reach = good();
    other_reach.reach = 32;
    refused(gpu.renew(&mut step, other_reach));
    gpu.renew(&mut step, good()).expect("the same rows");
}

/// Calls of a step are recorded with its tables: what is put there later is held to what the calls relied on.
#[test]
fn a_renewed_step_stays_within_what_its_calls_rely_on() {
    let gpu = gpu(7, Checks::All);
    let table = gpu
        .matrix(&exact(&gpu, 8 * 64), 8, 64, false)
        .expect("a matrix");
    let mut y = activations(&gpu, 64);
    let mut step = gpu.step(rows(1)).expect("a step");
    let (_, recording) = gpu
        .record(|| gpu.embed(&table, &step, RowsMut::packed(&mut y, 0, 64)))
        .expect("a recording")
        .expect("a device that records");
    let tokens = vec![8];
    let refusal = gpu.renew(&mut step, StepRows { tokens, ..rows(1) });
    assert_eq!(refused(refusal), "token");
    recording.replay().expect("a replay of what was there");
}

#[test]
fn a_recording_is_not_replayed_on_memory_that_is_gone() {
    let gpu = gpu(8, Checks::All);
    let x = exact(&gpu, 64);
    for drop_source in [false, true] {
        let (from, mut to) = (exact(&gpu, 64), exact(&gpu, 64));
        let (_, recording) = gpu
            .record(|| {
                let (from, to) = (Rows::packed(&from, 0, 64), RowsMut::packed(&mut to, 0, 64));
                gpu.copy(from, to, 1, 64, Accumulate::No)
            })
            .expect("a recording")
            .expect("a device that records");
        recording.replay().expect("a replay");
        let _kept = if drop_source {
            drop(from);
            to
        } else {
            drop(to);
            from
        };
        assert_eq!(refused(recording.replay()), "recorded calls");
    }
    assert_eq!(gpu.read(&x, 0..64).expect("a read"), [1.0; 64]);
}

#[test]
fn memory_of_another_device_is_an_error() {
    let (gpu, other) = (gpu(9, Checks::All), gpu(9, Checks::All));
    let (x, mut y) = (exact(&other, 8), exact(&gpu, 8));
    let (from, to) = (Rows::packed(&x, 0, 8), RowsMut::packed(&mut y, 0, 8));
    assert_eq!(refused(gpu.copy(from, to, 1, 8, Accumulate::No)), "memory");
    assert_eq!(refused(gpu.read(&x, 0..8)), "memory");
}

/// A pool of one head of 32 with 16 tokens.
fn pool(gpu: &Sim) -> Pool {
    let shape = PoolShape {
        heads: 1,
        head_dim: 32,
        run: 8,
        bits: PoolBits::Sixteen,
    };
    let mut pool = Pool::new(gpu, shape);
    for _ in 0..2 {
        pool.write(gpu, &[1.0; 256], &[1.0; 256]).expect("a run");
    }
    pool
}

#[test]
fn heads_and_rows_that_a_pool_does_not_have_are_errors() {
    let gpu = gpu(10, Checks::All);
    let mut pool = pool(&gpu);
    let rows = activations(&gpu, 8 * 64);
    let kv = [Rows::packed(&rows, 0, 64); 2];
    refused(pool.append(&gpu, &[], kv, 8));
    refused(pool.append(&gpu, &[0, 1], kv, 8));
    refused(pool.append(&gpu, &[2], kv, 8));
    refused(pool.append(&gpu, &[usize::MAX], kv, 8));
    refused(pool.append(&gpu, &[1], kv, 9));
    refused(pool.append(&gpu, &[1], kv, usize::MAX));
    refused(pool.write(&gpu, &[1.0; 255], &[1.0; 255]));
    refused(pool.write(&gpu, &[1.0; 256], &[1.0; 224]));
    refused(pool.write(&gpu, &[1.0; 256], &[]));
    refused(pool.read(&gpu, 0..17));
    refused(pool.read(&gpu, usize::MAX..1));
    assert_eq!(pool.tokens(), 16);
    pool.append(&gpu, &[1], kv, 3).expect("three tokens");
    refused(pool.read(&gpu, 0..20));
    assert_eq!(pool.read(&gpu, 16..19).expect("a read").0, [1.0; 96]);
}

#[test]
fn blocks_that_a_pool_does_not_have_are_errors() {
    let gpu = gpu(11, Checks::All);
    let pool = pool(&gpu);
    for tokens in [
        vec![0],
        vec![1, 2],
        vec![0, 2],
        vec![2, 3, 0, 1],
        vec![usize::MAX - 1, usize::MAX],
    ] {
        refused(Blocks::new(&gpu, &[tokens], 2));
    }
    refused(Blocks::new(&gpu, &[vec![0, 1]], 0));
    let table = exact(&gpu, 16 * 16);
    let gather = |tokens: &[Vec<usize>], kv_heads: &[usize], ends: &[usize]| {
        let blocks = Blocks::new(&gpu, tokens, 2)?;
        let (mut k, mut v) = (activations(&gpu, 8 * 32), activations(&gpu, 8 * 32));
        let kv = [&mut k, &mut v].map(|rows| RowsMut::packed(rows, 0, 32));
        let past = PastHeads { kv_heads, ends };
        pool.gather(&gpu, &blocks, &past, (&table, &table), kv)
    };
    gather(&[vec![0, 1, 14, 15]], &[0], &[4]).expect("blocks that are there");
    refused(gather(&[vec![16, 17]], &[0], &[4]));
    refused(gather(&[vec![80_000, 80_001]], &[0], &[4]));
    refused(gather(&[vec![0, 1]], &[1], &[4]));
    refused(gather(&[vec![0, 1]], &[], &[4]));
    refused(gather(&[vec![0, 1]], &[0], &[]));
    refused(gather(&[vec![0, 1]], &[0], &[1]));
    refused(gather(&[vec![0, 1]], &[0], &[17]));
    refused(gather(&[vec![0, 1], vec![0, 1]], &[0], &[4]));
    refused(gather(&[(0..10).collect()], &[0], &[12]));
}

#[test]
fn selections_that_a_pool_does_not_allow_are_errors() {
    let gpu = gpu(12, Checks::All);
    let pool = pool(&gpu);
    let queries = activations(&gpu, 4 * 64);
    let probes = |rows, first, capacity| Probes {
        q: Rows::packed(&queries, 0, 64),
        rows,
        first,
        capacity,
        group: 2,
    };
    let blocks = |block_len, probe_window, probe_stride| SelectionRule::Blocks {
        block_len,
        probe_window,
        probe_stride,
    };
    let select = |probes: Probes<'_, Buffer>, kv_heads: &[usize], eligible: &[_], rule| {
        let (rows, of) = (4, eligible);
        let selection = Selection {
            scale: None,
            kv_heads,
            eligible: of,
            rows,
            rule,
        };
        pool.select(&gpu, &probes, &selection)
    };
    let good = blocks(2, 2, 2);
    for (queries, rule) in [
        (probes(4, 0, 4), good),
        (probes(3, 3, 4), good),
        // A window is cut to the queries that there are.
        (probes(4, 0, 4), blocks(2, 5, 2)),
    ] {
        let selected = select(queries, &[0], &[0..16], rule).expect("a selection");
        assert_eq!(selected.count(0), 4);
    }
    for queries in [
        probes(5, 0, 5),
        probes(5, 0, 4),
        probes(4, 4, 4),
        probes(0, 0, 4),
        probes(0, 0, 0),
    ] {
        refused(select(queries, &[0], &[0..16], good));
    }
    for rule in [blocks(0, 2, 2), blocks(2, 0, 2), blocks(2, 2, 0)] {
        refused(select(probes(4, 0, 4), &[0], &[0..16], rule));
    }
    for (kv_heads, eligible) in [
        (&[0][..], &[0..18][..]),
        (&[0], &[usize::MAX..1]),
        (&[1], &[0..16]),
        (&[], &[0..16]),
        (&[0], &[]),
    ] {
        refused(select(probes(4, 0, 4), kv_heads, eligible, good));
    }
}

#[test]
fn attention_on_slots_that_are_not_there_is_an_error() {
    let gpu = gpu(13, Checks::All);
    let cache = cache(&gpu, 1, 8);
    let q = activations(&gpu, 4 * 64);
    let attend = |step_rows: StepRows, spans: &[SlotSpan], lse_len: usize, kind: Kind| {
        let (mut out, mut lse) = (activations(&gpu, 4 * 64), gpu.zeros(kind, lse_len)?);
        let call = Attention {
            scale: None,
            heads: Heads {
                q: 2,
                kv: 1,
                dim: 32,
            },
            past_gate: &[0.0; 2],
            prior_heads: &[false; 2],
            spans,
            q: Rows::packed(&q, 0, 64),
            cache: &cache,
        };
        let mut step = gpu.step(step_rows)?;
        let (out, lse) = (
            RowsMut::packed(&mut out, 0, 64),
            RowsMut::packed(&mut lse, 0, 2),
        );
        gpu.attention(&call, &mut step, 0, out, lse)
    };
    let good = rows(4);
    attend(good.clone(), &good.spans, 8, Kind::Exact).expect("rows that fit");
    assert_eq!(
        refused(attend(good.clone(), &[], 8, Kind::Exact)),
        "spans of the step"
    );
    assert_eq!(
        refused(attend(good.clone(), &good.spans, 7, Kind::Exact)),
        "range"
    );
    let refusal = attend(good.clone(), &good.spans, 8, Kind::Activation);
    assert_eq!(refused(refusal), "kind of a buffer");
    let mut elsewhere = good.clone();
    elsewhere.spans[0].slot = 1;
    let spans = elsewhere.spans.clone();
    assert_eq!(refused(attend(elsewhere, &spans, 8, Kind::Exact)), "slot");
    // A segment that is longer than its slot.
    let mut longer = good;
    longer.spans[0].start = 8;
    let spans = longer.spans.clone();
    attend(longer, &spans, 8, Kind::Exact).expect_err("rows outside the slot");
}
