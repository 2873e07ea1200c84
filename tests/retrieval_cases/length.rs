//! Pools that are too long: what is dropped, and what is left (docs/contract.md, section 2).

use std::ops::Range;

use segattn::device::reference::Reference;
use segattn::device::{
    Device, DeviceError, Kind, PastPool, PoolBits, SelectedBlocks, SelectionRule,
};

use super::{HEADS, RULES, Tokens, append, asked, pool, shape};

/// The tokens that each head drops: `rows` of them.
pub fn lowest<D: Device>(
    device: &D,
    pool: &D::Pool,
    tokens: &Tokens,
    ring: (usize, usize),
    eligible: &[Range<usize>],
    rule: (usize, SelectionRule),
) -> Vec<Vec<usize>> {
    let dropped = asked(device, tokens, ring, eligible, rule, |probes, selection| {
        pool.lowest(device, probes, selection)
    });
    let of_heads = dropped.expect("a choice").tokens(device);
    of_heads.expect("tokens")
}

/// A device drops what the f64 reference does, where scores are equal or far enough apart, however its pool is cut.
pub fn a_device_drops_what_the_reference_does<D: Device>(device: &D, seeds: Range<u64>) {
    for seed in seeds {
        let (dim, count) = ([32, 64][seed as usize % 2], 190 + 7 * seed as usize);
        let mut tokens = Tokens::new(dim, count, 1 + 3 * seed as usize, seed);
        if seed % 3 == 1 {
            tokens = tokens.repeated(11);
        }
        let exact = pool(&Reference, &tokens, 1, &[count]);
        for (rows, rule) in RULES {
            let block_len = rule.block_len();
            // None; few; most; all that the second head can.
            let all = (count - 5) / block_len * block_len - 4usize.next_multiple_of(block_len);
            for rows in [0, rows / block_len * block_len, all - block_len, all] {
                let (eligible, rule) = ([0..count, 4..count - 5], (rows, rule));
                let expected = lowest(&Reference, &exact, &tokens, (0, 0), &eligible, rule);
                assert!(
                    expected
                        .iter()
                        .all(|head| head.len() == rows && head.is_sorted())
                );
                for (chunk, run) in [(64, 50), (count, 9)] {
                    let fast = pool(device, &tokens, chunk, &[run]);
                    let got = lowest(device, &fast, &tokens, (3, 2), &eligible, rule);
                    assert_eq!(got, expected, "seed {seed}, {rule:?}");
                }
            }
        }
    }
}

/// What is left of a pool are the other tokens of each head, with the same bits, whatever they are held in; and the
/// pool that they came from is as it was.
pub fn what_is_left_is_what_it_was<D: Device>(device: &D) {
    let count = 45;
    for (bits, dim, chunk) in [
        (PoolBits::Sixteen, 32, 8),
        (PoolBits::Sixteen, 64, 45),
        (PoolBits::Eight, 64, 8),
        (PoolBits::Four, 96, 7),
    ] {
        let tokens = Tokens::new(dim, count, 1, 90 + chunk as u64);
        let mut pool = D::Pool::new(device, shape(dim, chunk, bits));
        append(device, &mut pool, &tokens, count - 4, &[13]);
        let held = pool.read(device, 0..count - 4).expect("a read");
        for (block_len, dropped) in [
            (1, [vec![0, 1, 2, 40], vec![5, 17, 18, 33]]),
            (1, [(0..41).collect::<Vec<_>>(), (0..41).collect()]),
            (1, [vec![], vec![]]),
            // The last block is not whole, and stays.
            (
                3,
                [vec![1, 12], vec![0, 7]].map(|blocks| blocks_of(&blocks, 3)),
            ),
        ] {
            let blocks = D::Blocks::new(device, &dropped, block_len).expect("blocks");
            let mut left = pool.without(device, &blocks).expect("a pool");
            let kept = dropped.each_ref().map(|dropped| {
                let others = (0..count - 4).filter(|t| !dropped.contains(t));
                others.collect::<Vec<usize>>()
            });
            let rows = kept[0].len();
            assert_eq!(left.tokens(), rows);
            let of_kept = |all: &[f32]| -> Vec<f32> {
                let row = |i: usize, head: usize| {
                    &all[(kept[head][i] * HEADS.len() + head) * dim..][..dim]
                };
                let rows = (0..rows).flat_map(|i| [row(i, 0), row(i, 1)]);
                rows.flatten().copied().collect()
            };
            let (k, v) = left.read(device, 0..rows).expect("a read");
            assert_eq!((k, v), (of_kept(&held.0), of_kept(&held.1)), "{bits:?}");
            // It goes on like any other pool, and the first one is not touched.
            left.truncate(rows.min(30));
            append_behind(device, &mut left, &tokens, [count - 4, count]);
            append(device, &mut pool, &tokens, count, &[4]);
            let tail = |pool: &D::Pool| {
                let end = pool.tokens();
                pool.read(device, end - 4..end).expect("a read")
            };
            assert_eq!(tail(&left), tail(&pool));
            pool.truncate(count - 4);
            assert_eq!(pool.read(device, 0..count - 4).expect("a read"), held);
        }
    }
}

fn blocks_of(blocks: &[usize], block_len: usize) -> Vec<usize> {
    let tokens = |block: &usize| block * block_len..(block + 1) * block_len;
    blocks.iter().flat_map(tokens).collect()
}

/// Appends tokens of a range to a pool of any length.
fn append_behind<D: Device>(device: &D, pool: &mut D::Pool, tokens: &Tokens, range: [usize; 2]) {
    let mut some = D::Pool::new(device, shape(tokens.dim, 64, PoolBits::Sixteen));
    append(device, &mut some, tokens, range[1], &[range[1]]);
    let (k, v) = some.read(device, range[0]..range[1]).expect("a read");
    let width = HEADS.len() * tokens.dim;
    let upload = |values: &[f32]| {
        let mut buffer = device
            .empty(Kind::Activation, values.len())
            .expect("memory");
        device.write(&mut buffer, 0, values).expect("a write");
        buffer
    };
    let (k, v) = (upload(&k), upload(&v));
    let kv = [&k, &v].map(|x| segattn::device::Rows::packed(x, 0, width));
    pool.append(device, &[0, 1], kv, range[1] - range[0])
        .expect("tokens");
}

/// Calls that ask for what a pool cannot drop are typed errors.
pub fn what_cannot_be_dropped_is_refused<D: Device>(device: &D) {
    let tokens = Tokens::new(32, 20, 2, 7);
    let pool = pool(device, &tokens, 8, &[20]);
    for dropped in [[vec![1], vec![]], [vec![3], vec![1, 2]]] {
        let blocks = D::Blocks::new(device, &dropped, 1).expect("blocks");
        refused(pool.without(device, &blocks).map(drop), "dropped tokens");
    }
    let blocks = D::Blocks::new(device, &[vec![0]], 1).expect("blocks");
    refused(pool.without(device, &blocks).map(drop), "dropped tokens");
    for (rows, rule) in [(17, RULES[2].1), (24, RULES[0].1), (7, RULES[0].1)] {
        let eligible = [0..20, 4..20];
        let dropped = asked(
            device,
            &tokens,
            (0, 0),
            &eligible,
            (rows, rule),
            |probes, selection| pool.lowest(device, probes, selection),
        );
        refused(dropped.map(drop), "tokens to drop");
    }
}

fn refused(result: segattn::device::Result<()>, what: &str) {
    let error = result.expect_err(what);
    assert!(matches!(error, DeviceError::Argument { .. }), "{error:?}");
    assert!(error.to_string().contains(what), "{error}");
}
