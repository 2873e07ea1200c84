//! Pools and retrieval on any device: tokens, pools filled in any way, and selections from them.

#[path = "length.rs"]
pub mod length;
#[path = "rounding.rs"]
mod rounding;
#[path = "together.rs"]
mod together;

use std::ops::Range;

use half::bf16;
pub use length::{
    a_device_drops_what_the_reference_does, what_cannot_be_dropped_is_refused,
    what_is_left_is_what_it_was,
};
use rounding::rounded;
use segattn::device::reference::Reference;
use segattn::device::{
    Device, Kind, PastPool, PoolBits, PoolShape, Probes, Rows, SelectedBlocks, Selection,
    SelectionRule,
};
pub use together::calls_together_are_calls_alone;

const KV_HEADS: usize = 3;
pub const GROUP: usize = 2;
/// KV heads that read the past.
pub const HEADS: [usize; 2] = [0, 2];

/// Keys and values of a sequence, and its last queries, numbers that bf16 holds.
pub struct Tokens {
    pub dim: usize,
    pub count: usize,
    pub queries: usize,
    /// `[count, KV_HEADS * dim]`.
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// `[queries, KV_HEADS * GROUP * dim]`.
    pub q: Vec<f32>,
}

/// Numbers between -1 and 1 that bf16 holds.
fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        bf16::from_f32((s >> 40) as f32 / (1u64 << 23) as f32 - 1.0).to_f32()
    };
    (0..count).map(|_| next()).collect()
}

impl Tokens {
    /// Tokens of which every `period`th has the same key, so that scores are equal.
    pub fn repeated(mut self, period: usize) -> Self {
        let width = KV_HEADS * self.dim;
        for token in period..self.count {
            let first = token % period * width;
            self.k.copy_within(first..first + width, token * width);
        }
        self
    }

    /// The key of a token of a KV head.
    pub fn key_mut(&mut self, token: usize, head: usize) -> &mut [f32] {
        &mut self.k[(token * KV_HEADS + head) * self.dim..][..self.dim]
    }

    /// A query of a query head.
    pub fn query(&self, t: usize, q_head: usize) -> &[f32] {
        &self.q[(t * KV_HEADS * GROUP + q_head) * self.dim..][..self.dim]
    }

    /// A key as above.
    pub fn key(&self, token: usize, head: usize) -> &[f32] {
        &self.k[(token * KV_HEADS + head) * self.dim..][..self.dim]
    }

    pub fn new(dim: usize, count: usize, queries: usize, seed: u64) -> Self {
        let kv = count * KV_HEADS * dim;
        Self {
            dim,
            count,
            queries,
            k: random(seed, kv),
            v: random(seed + 1, kv),
            q: random(seed + 2, queries * KV_HEADS * GROUP * dim),
        }
    }

    /// What a pool holds of some tokens, of `k` or `v`.
    fn of_heads(&self, kv: &[f32], tokens: Range<usize>) -> Vec<f32> {
        let head =
            |token: usize, head: usize| &kv[(token * KV_HEADS + head) * self.dim..][..self.dim];
        tokens
            .flat_map(|token| HEADS.map(|h| head(token, h)).concat())
            .collect()
    }
}

fn upload<D: Device>(device: &D, values: &[f32]) -> D::Buffer {
    let mut buffer = device
        .empty(Kind::Activation, values.len())
        .expect("memory");
    device.write(&mut buffer, 0, values).expect("a write");
    buffer
}

/// Appends tokens from the pool's last one on, so many at a time, up to token `end`.
pub fn append<D: Device>(
    device: &D,
    pool: &mut D::Pool,
    tokens: &Tokens,
    end: usize,
    runs: &[usize],
) {
    let width = KV_HEADS * tokens.dim;
    let [k, v] = [&tokens.k, &tokens.v].map(|x| upload(device, x));
    for run in runs.iter().cycle() {
        let first = pool.tokens();
        let rows = (*run).min(end - first);
        let kv = [&k, &v].map(|x| Rows::packed(x, first, width));
        pool.append(device, &HEADS, kv, rows).expect("tokens");
        if pool.tokens() == end {
            return;
        }
    }
}

/// A pool of all tokens, with memory for `chunk` tokens at a time, appended so many at a time.
pub fn pool<D: Device>(device: &D, tokens: &Tokens, chunk: usize, runs: &[usize]) -> D::Pool {
    let mut pool = D::Pool::new(device, shape(tokens.dim, chunk, PoolBits::Sixteen));
    append(device, &mut pool, tokens, tokens.count, runs);
    pool
}

fn shape(head_dim: usize, run: usize, bits: PoolBits) -> PoolShape {
    PoolShape {
        heads: HEADS.len(),
        head_dim,
        run,
        bits,
    }
}

/// The tokens that each head selects. The queries begin at row `ring.0` of a ring that has `ring.1` rows to spare.
pub fn select<D: Device>(
    device: &D,
    pool: &D::Pool,
    tokens: &Tokens,
    ring: (usize, usize),
    eligible: &[Range<usize>],
    rule: (usize, SelectionRule),
) -> Vec<Vec<usize>> {
    let selected = asked(device, tokens, ring, eligible, rule, |probes, selection| {
        pool.select(device, probes, selection)
    });
    let selected = selected.expect("a selection");
    let of_heads = selected.tokens(device).expect("tokens");
    for (head, tokens) in of_heads.iter().enumerate() {
        assert_eq!(selected.count(head), tokens.len());
    }
    of_heads
}

/// Calls `f` with the queries and what they are to choose.
fn asked<D: Device, T>(
    device: &D,
    tokens: &Tokens,
    ring: (usize, usize),
    eligible: &[Range<usize>],
    (rows, rule): (usize, SelectionRule),
    f: impl FnOnce(&Probes<'_, D::Buffer>, &Selection<'_>) -> T,
) -> T {
    let width = KV_HEADS * GROUP * tokens.dim;
    let capacity = tokens.queries + ring.1;
    let mut q = vec![f32::NAN; capacity * width];
    for (t, query) in tokens.q.chunks(width).enumerate() {
        q[(ring.0 + t) % capacity * width..][..width].copy_from_slice(query);
    }
    let q = upload(device, &q);
    let probes = Probes {
        q: Rows::packed(&q, 0, width),
        rows: tokens.queries,
        first: ring.0 % capacity,
        capacity,
        group: GROUP,
    };
    let selection = Selection {
        scale: None,
        kv_heads: &HEADS,
        eligible,
        rows,
        rule,
    };
    f(&probes, &selection)
}

const fn blocks(block_len: usize, probe_window: usize, probe_stride: usize) -> SelectionRule {
    SelectionRule::Blocks {
        block_len,
        probe_window,
        probe_stride,
    }
}

const fn windows(window_len: usize, window_before: usize) -> SelectionRule {
    SelectionRule::Windows {
        window_len,
        window_before,
    }
}

/// The rules that are tried, and how many rows each selects.
const RULES: [(usize, SelectionRule); 6] = [
    (24, blocks(8, 3, 2)),
    (7, blocks(3, 100, 1)),
    (24, windows(8, 4)),
    (37, windows(1, 0)),
    (45, windows(7, 1)),
    (9, windows(20, 19)),
];

/// A pool holds the same tokens however it was filled, cut and read.
pub fn pools_take_any_runs<D: Device>(device: &D) {
    let tokens = Tokens::new(32, 45, 1, 3);
    let all =
        |range: Range<usize>| [&tokens.k, &tokens.v].map(|x| tokens.of_heads(x, range.clone()));
    for (chunk, runs) in [
        (8, &[45][..]),
        (8, &[8]),
        (8, &[1, 7, 9, 3, 17]),
        (64, &[5]),
        (1, &[2]),
    ] {
        let mut pool = pool(device, &tokens, chunk, runs);
        for range in [0..45, 0..0, 7..8, 3..30, 44..45, 45..45] {
            let (k, v) = pool.read(device, range.clone()).expect("a read");
            assert_eq!([k, v], all(range));
        }
        for (keep, then) in [(60, 45), (45, 45), (31, 37), (8, 9), (9, 45), (0, 5)] {
            pool.truncate(keep);
            assert_eq!(pool.tokens(), keep.min(45));
            if keep < then {
                append(device, &mut pool, &tokens, then, &[2, 11]);
            }
            let (k, v) = pool.read(device, 0..then).expect("a read");
            assert_eq!([k, v], all(0..then));
        }
        for end in [5, 6, 29, 45] {
            let [k, v] = all(pool.tokens()..end);
            pool.write(device, &k, &v).expect("a write");
        }
        let (k, v) = pool.read(device, 0..45).expect("a read");
        assert_eq!([k, v], all(0..45));
    }
}

/// What is selected does not depend on how the pool was filled, nor on where the ring begins.
pub fn selections_do_not_depend_on_chunks_and_rings<D: Device>(device: &D) {
    for (seed, (dim, count, queries)) in [(32, 300, 5), (64, 70, 1), (32, 150, 9)]
        .into_iter()
        .enumerate()
    {
        let tokens = Tokens::new(dim, count, queries, 100 + seed as u64);
        let eligible = [0..count, 5..count - 13];
        for rule in RULES {
            let whole = pool(device, &tokens, count, &[count]);
            let expected = select(device, &whole, &tokens, (0, 0), &eligible, rule);
            assert!(
                expected
                    .iter()
                    .all(|head| head.is_sorted() && !head.is_empty())
            );
            for (chunk, runs, ring) in [
                (7, &[1, 30, 4][..], (2, 0)),
                (64, &[64], (3, 4)),
                (count, &[9], (1, 1)),
            ] {
                let mut pool = pool(device, &tokens, chunk, runs);
                pool.truncate(count - 3);
                append(device, &mut pool, &tokens, count, &[2]);
                assert_eq!(
                    select(device, &pool, &tokens, ring, &eligible, rule),
                    expected
                );
            }
        }
    }
}

/// A device selects what the f64 reference does, where scores are equal or far enough apart.
pub fn a_device_selects_what_the_reference_does<D: Device>(device: &D, seeds: Range<u64>) {
    for seed in seeds {
        let (dim, count) = ([32, 64][seed as usize % 2], 200 + 7 * seed as usize);
        let mut tokens = Tokens::new(dim, count, 1 + 3 * seed as usize, seed);
        if seed % 3 == 1 {
            tokens = tokens.repeated(11);
        }
        if seed % 3 == 2 {
            // One token has nearly all of the attention; the shares of the others are below what f32 holds.
            let query = tokens.query(0, HEADS[0] * GROUP).to_vec();
            let key = tokens.key_mut(140, HEADS[0]).iter_mut().zip(query);
            key.for_each(|(k, q)| *k = 128.0 * q);
        }
        let exact = pool(&Reference, &tokens, 1, &[count]);
        let fast = pool(device, &tokens, 64, &[50]);
        for rule in RULES {
            for eligible in [
                [0..count, 4..count - 5],
                [7..8, 100..100],
                [0..17, 183..count],
                [120..140, 3..131],
            ] {
                let expected = select(&Reference, &exact, &tokens, (0, 0), &eligible, rule);
                let got = select(device, &fast, &tokens, (3, 2), &eligible, rule);
                assert_eq!(got, expected, "seed {seed}, {rule:?}, {eligible:?}");
            }
        }
    }
}

/// Keys so large that products overflow: the numbers of tokens are still those of the rule, the same in any chunks.
pub fn keys_of_any_finite_size_give_a_selection<D: Device>(device: &D) {
    let mut tokens = Tokens::new(32, 150, 2, 9);
    let largest = bf16::MAX.to_f32();
    for (i, k) in tokens.k.iter_mut().enumerate() {
        match i / 32 % 5 {
            0 => *k = largest.copysign(*k),
            1 => *k = largest,
            2 => *k = -largest,
            _ => {}
        }
    }
    for (rows, rule) in RULES {
        let mut found = Vec::new();
        for (chunk, runs) in [(150, [150]), (7, [13])] {
            let pool = pool(device, &tokens, chunk, &runs);
            found.push(select(
                device,
                &pool,
                &tokens,
                (1, 1),
                &[0..150, 5..130],
                (rows, rule),
            ));
        }
        assert_eq!(found[0], found[1]);
        for tokens in &found[0] {
            assert_eq!(tokens.len(), rows / rule.block_len() * rule.block_len());
            assert!(tokens.is_sorted_by(|a, b| a < b));
        }
    }
}

/// A pool of 8 and of 4 bits holds what docs/contract.md, section 2, says, and writes back what it gave.
pub fn pools_round_to_their_bits<D: Device>(device: &D) {
    let narrow = device.element_bytes(Kind::Activation) == 2;
    for (bits, limit) in [(PoolBits::Eight, 127.0), (PoolBits::Four, 7.0)] {
        for dim in [32, 64, 96, 128] {
            let mut tokens = Tokens::new(dim, 21, 1, 50 + dim as u64);
            // Groups of zeros, of very small and of large numbers, and one that is not finite.
            tokens.key_mut(3, HEADS[1])[..32].fill(0.0);
            tokens.key_mut(4, HEADS[0]).fill(f32::MIN_POSITIVE);
            tokens.key_mut(5, HEADS[0])[0] = 2f32.powi(100);
            tokens.key_mut(6, HEADS[1])[9] = f32::INFINITY;
            let mut pool = D::Pool::new(device, shape(dim, 8, bits));
            append(device, &mut pool, &tokens, 21, &[4, 1, 9]);
            let held = pool.read(device, 0..21).expect("a read");
            let mut distinct = 0;
            for (held, given) in [(&held.0, &tokens.k), (&held.1, &tokens.v)] {
                let given = tokens.of_heads(given, 0..21);
                for (held, given) in held.chunks(32).zip(given.chunks(32)) {
                    let expected = rounded(given, limit, narrow);
                    assert_same(held, &expected, &format!("{bits:?} {dim} {given:?}"));
                    distinct += usize::from(held != given);
                }
            }
            assert!(distinct > 2 * 21, "{distinct} groups were rounded");
            pool.truncate(7);
            let [k, v] = [&held.0, &held.1].map(|x| &x[7 * 2 * dim..]);
            pool.write(device, k, v).expect("a write");
            let again = pool.read(device, 0..21).expect("a read");
            assert_same(&again.0, &held.0, "keys again");
            assert_same(&again.1, &held.1, "values again");
        }
    }
}

/// Scores and selections of a pool of fewer bits are those of one that holds the same numbers in the device's own type.
pub fn pools_of_fewer_bits_select_by_what_they_hold<D: Device>(device: &D) {
    for (bits, dim, count) in [(PoolBits::Eight, 64, 300), (PoolBits::Four, 96, 150)] {
        let tokens = Tokens::new(dim, count, 5, 70);
        let mut packed = D::Pool::new(device, shape(dim, 64, bits));
        append(device, &mut packed, &tokens, count, &[50]);
        let (k, v) = packed.read(device, 0..count).expect("a read");
        let mut plain = D::Pool::new(device, shape(dim, 64, PoolBits::Sixteen));
        plain.write(device, &k, &v).expect("a write");
        for rule in RULES {
            let of = |pool| {
                select(
                    device,
                    pool,
                    &tokens,
                    (2, 1),
                    &[0..count, 5..count - 13],
                    rule,
                )
            };
            assert_eq!(of(&packed), of(&plain), "{bits:?} {rule:?}");
        }
    }
}

fn assert_same(got: &[f32], expected: &[f32], what: &str) {
    for (got, expected) in got.iter().zip(expected) {
        let both_nan = got.is_nan() && expected.is_nan();
        assert!(
            both_nan || got == expected,
            "{what}: expected {expected}, got {got}"
        );
    }
    assert_eq!(got.len(), expected.len());
}
