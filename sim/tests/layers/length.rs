//! `kernels/pool_length.cuh` under every check: what a pool drops is the negative of the largest score around, and what
//! is left is copied as it is held.

use std::ops::Range;

use segattn::cuda::kernels::layer_params::{SegattnPoolHead, SegattnRetrievalParams};
use segattn_sim::{Buffer, Gpu};

use super::common::*;

/// Heads of the pool.
const HEADS: usize = 2;

fn params() -> SegattnRetrievalParams {
    SegattnRetrievalParams {
        chunks: std::ptr::null(),
        head: std::ptr::null(),
        q: NO_ROWS,
        k: NO_ROWS,
        v: NO_ROWS,
        probes: std::ptr::null_mut(),
        sums: std::ptr::null_mut(),
        lse: std::ptr::null_mut(),
        scores: std::ptr::null_mut(),
        best: std::ptr::null_mut(),
        selected: std::ptr::null_mut(),
        selected_count: std::ptr::null_mut(),
        unwanted: std::ptr::null_mut(),
        kept: std::ptr::null(),
        past_len: std::ptr::null_mut(),
        cos: std::ptr::null(),
        sin: std::ptr::null(),
        first_token: 0,
        chunk_tokens: 1,
        token: 0,
        rows: 0,
        score_pitch: 0,
        heads: HEADS as i32,
        head_dim: 32,
        group: 0,
        windows: 0,
        window: 0,
        stride: 0,
        first_query: 0,
        query_capacity: 1,
        block_len: 1,
        first_block: 0,
        blocks: 0,
        max_selected: 0,
        tiles: 0,
        window_len: 1,
        window_before: 0,
        scale_log2: 0.0,
        bits: 16,
        padding: 0,
    }
}

/// Scores of `pitch` blocks of each head, of which those in `blocks` are there.
fn unwanted(pitch: usize, block_len: usize, blocks: [Range<usize>; HEADS], window: [usize; 2]) {
    let (gpu, module) = (&mut gpu(3), module("retrieval.cu"));
    let scores: Vec<f32> = values(HEADS * pitch, 5).iter().map(|x| x - 1.5).collect();
    let [own, out] =
        ["scores", "unwanted"].map(|name| gpu.alloc(name, HEADS * pitch * 4).expect("memory"));
    let mut heads = Vec::new();
    for (head, blocks) in blocks.iter().enumerate() {
        let at = head * pitch + blocks.start..head * pitch + blocks.end;
        gpu.write(own, at.start * 4, &scores[at]);
        // Tokens of blocks that are not whole are eligible too.
        let (begin, end) = (blocks.start * block_len, (blocks.end + 1) * block_len - 1);
        heads.extend([0, begin.saturating_sub(block_len - 1) as i32, end as i32, 0]);
    }
    assert_eq!(heads.len() * 4, HEADS * size_of::<SegattnPoolHead>());
    let heads = gpu.input("heads", &heads).expect("memory");
    let params = SegattnRetrievalParams {
        head: heads.ptr(),
        scores: own.ptr(),
        unwanted: out.ptr(),
        score_pitch: pitch as i64,
        block_len: block_len as i32,
        window_len: window[0] as i32,
        window_before: window[1] as i32,
        ..params()
    };
    let blocks_of_threads = (HEADS * pitch).div_ceil(256);
    retrieve(
        gpu,
        &module,
        "pool_unwanted_f32",
        blocks_of_threads,
        &[params],
    );
    let mut written = 0;
    for (head, blocks) in blocks.iter().enumerate() {
        let of_head = &scores[head * pitch..];
        for block in blocks.clone() {
            // The blocks whose window has this one.
            let holds = |best: &usize| {
                let first = *best as isize - window[1] as isize;
                (first..first + window[0] as isize).contains(&(block as isize))
            };
            let around = blocks.clone().filter(holds).map(|best| of_head[best]);
            let expected = -around.fold(f32::NEG_INFINITY, f32::max);
            let got: Vec<f32> = gpu.download_range(out, (head * pitch + block) * 4, 1);
            assert_eq!(got, [expected], "head {head}, block {block}, {window:?}");
            written += 4;
        }
    }
    let unwritten: usize = gpu.unwritten(out).iter().map(|range| range.len()).sum();
    assert_eq!(unwritten, HEADS * pitch * 4 - written, "others are written");
}

#[test]
fn what_is_dropped_is_the_negative_of_the_largest_score_around() {
    unwanted(300, 1, [0..300, 7..261], [9, 3]);
    unwanted(300, 1, [2..300, 0..140], [9, 0]);
    unwanted(130, 1, [0..130, 50..51], [40, 39]);
    unwanted(130, 1, [0..130, 3..9], [1, 0]);
    unwanted(70, 8, [0..70, 2..69], [1, 0]);
    unwanted(70, 3, [70..70, 1..2], [1, 0]);
}

/// A pool of chunks, keys and values of each, full of bytes that tell each place.
struct Held {
    chunks: Vec<[Buffer; 2]>,
    table: Buffer,
}

#[derive(Clone, Copy)]
struct Case {
    bits: usize,
    dim: usize,
    tokens: usize,
    chunk_tokens: usize,
    block_len: usize,
    /// Rows of a launch.
    at_once: usize,
}

impl Case {
    /// Bytes of a head of a token, and of the magnitudes of its groups, which lie behind those of all.
    fn of_head(&self) -> [usize; 2] {
        let groups = if self.bits < 16 { self.dim / 32 * 2 } else { 0 };
        [self.dim * self.bits / 8, groups]
    }

    fn chunk_bytes(&self) -> usize {
        self.chunk_tokens * HEADS * self.of_head().iter().sum::<usize>()
    }

    /// The bytes of a token's head in a chunk.
    fn places(&self, token: usize, head: usize) -> [Range<usize>; 2] {
        let unit = token % self.chunk_tokens * HEADS + head;
        let [elements, groups] = self.of_head();
        let behind = self.chunk_tokens * HEADS * elements;
        [
            unit * elements..(unit + 1) * elements,
            behind + unit * groups..behind + (unit + 1) * groups,
        ]
    }

    fn pool(&self, gpu: &mut Gpu, tokens: usize) -> Held {
        let count = tokens.div_ceil(self.chunk_tokens);
        let chunk = |_| ["k", "v"].map(|name| gpu.alloc(name, self.chunk_bytes()).expect("memory"));
        let chunks: Vec<[Buffer; 2]> = (0..count).map(chunk).collect();
        let addresses = chunks.iter().flatten().map(|b| b.address() as u64);
        let table = gpu.input("chunks", &addresses.collect::<Vec<u64>>());
        Held {
            table: table.expect("memory"),
            chunks,
        }
    }

    /// A byte of a token's head, of keys or of values.
    fn byte(&self, token: usize, head: usize, kind: usize, at: usize) -> u8 {
        (token * 31 + head * 101 + kind * 57 + at * 7 + 13) as u8
    }
}

/// Drops these blocks of each head, as many of each.
fn keep(case: &Case, dropped: [&[i32]; HEADS]) {
    let (gpu, module) = (&mut gpu(4), module("retrieval.cu"));
    let from = case.pool(gpu, case.tokens);
    for token in 0..case.tokens {
        for (head, kind) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let mut at = 0;
            for place in case
                .places(token, head)
                .into_iter()
                .filter(|p| !p.is_empty())
            {
                let bytes = place.clone().map(|_| {
                    at += 1;
                    case.byte(token, head, kind, at)
                });
                let bytes: Vec<u8> = bytes.collect();
                gpu.write(
                    from.chunks[token / case.chunk_tokens][kind],
                    place.start,
                    &bytes,
                );
            }
        }
    }
    let kept = case.tokens - dropped[0].len() * case.block_len;
    let to = case.pool(gpu, kept);
    // A list has room for one more.
    let most = dropped[0].len() + 1;
    let lists = gpu.alloc("dropped", HEADS * most * 4).expect("memory");
    for (head, list) in dropped.iter().enumerate() {
        gpu.write(lists, head * most * 4, list);
    }
    let counts = dropped.map(|list| list.len() as i32);
    let counts = gpu.input("counts", &counts).expect("memory");
    let params = SegattnRetrievalParams {
        chunks: from.table.ptr(),
        kept: to.table.ptr(),
        selected: lists.ptr(),
        selected_count: counts.ptr(),
        chunk_tokens: case.chunk_tokens as i64,
        head_dim: case.dim as i32,
        block_len: case.block_len as i32,
        max_selected: most as i32,
        bits: case.bits as i32,
        ..params()
    };
    for first in (0..kept).step_by(case.at_once) {
        let rows = case.at_once.min(kept - first);
        let params = SegattnRetrievalParams {
            token: first as i64,
            rows: rows as i64,
            ..params
        };
        let threads = rows * HEADS * case.dim / 8;
        retrieve(
            gpu,
            &module,
            "pool_keep_bf16",
            threads.div_ceil(256),
            &[params],
        );
    }
    let mut written = [0; 2];
    for (head, dropped) in dropped.iter().enumerate() {
        let stays = |token: &usize| !dropped.contains(&((token / case.block_len) as i32));
        for (row, token) in (0..case.tokens).filter(stays).enumerate() {
            for (kind, written) in written.iter_mut().enumerate() {
                let mut at = 0;
                for place in case.places(row, head) {
                    let chunk = to.chunks[row / case.chunk_tokens][kind];
                    let got: Vec<u8> = gpu.download_range(chunk, place.start, place.len());
                    for byte in got {
                        at += 1;
                        let expected = case.byte(token, head, kind, at);
                        assert_eq!(byte, expected, "head {head}, row {row}, token {token}");
                        *written += 1;
                    }
                }
            }
        }
    }
    for (kind, written) in written.into_iter().enumerate() {
        let all = to.chunks.len() * case.chunk_bytes();
        let chunks = to.chunks.iter().map(|chunk| gpu.unwritten(chunk[kind]));
        let unwritten: usize = chunks.flatten().map(|range| range.len()).sum();
        assert_eq!(unwritten, all - written, "rows behind the last are written");
    }
}

#[test]
fn what_is_left_is_copied_as_it_is_held() {
    for (bits, dim) in [(16, 64), (8, 64), (4, 96), (16, 32)] {
        let case = Case {
            bits,
            dim,
            tokens: 61,
            chunk_tokens: 16,
            block_len: 1,
            at_once: 16,
        };
        keep(&case, [&[0, 1, 2, 17, 60], &[5, 6, 30, 31, 32]]);
        keep(&case, [&[], &[]]);
        let all: Vec<i32> = (0..59).collect();
        keep(&case, [&all, &all]);
        // Blocks, of which the last is not whole; a launch that is no chunk.
        let case = Case {
            block_len: 4,
            at_once: 23,
            ..case
        };
        keep(&case, [&[0, 9, 14], &[3, 4, 13]]);
    }
}
