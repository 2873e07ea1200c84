//! The GEMMs of attention on one tile of keys, for any instruction set.
//!
//! **Bits.** The roundings of a row do not depend on the number of rows or keys of the tile. A score is one chain of
//! multiply-adds over `head_dim`; an output element is one chain over the keys that the row sees. Keys that it does not
//! see are skipped, not multiplied by zero, so that a NaN in them has no effect.

use super::simd::{LANES, Lanes};

/// Keys of a tile, counted from the first row of their source.
pub(super) const KEYS: usize = 64;
/// Prefetch distance in rows of values.
const KEYS_AHEAD: usize = 16;
/// Number of vectors in a row of scores.
pub(super) const KEY_VECTORS: usize = KEYS / LANES;

/// Rows of `head_dim` elements, `stride` apart, somewhere in a tensor.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

impl Rows<'_> {
    /// Asserts that `count` rows of `len` elements are in bounds, for unchecked reads afterwards.
    #[inline(always)]
    fn assert_holds(&self, count: usize, len: usize) {
        assert!(count == 0 || (count - 1) * self.stride + len <= self.data.len());
    }
}

/// Rows `a` against a transposed tile of keys.
pub(super) struct Scores<'a> {
    pub a: Rows<'a>,
    /// `[head_dim, KEYS]`.
    pub keys: &'a [f32],
    /// `[rows]`: keys that each row sees, a prefix.
    pub counts: &'a [usize],
    pub head_dim: usize,
    /// `[rows, KEYS]`.
    pub s: &'a mut [f32],
}

/// `c[row] = alpha[row] * c[row] + sum over j in spans[row] of w[row, j] * b[j]`, `j` ascending.
pub(super) struct Accumulate<'a> {
    /// Row 0 of `head_dim` elements.
    pub c: *mut f32,
    pub c_stride: usize,
    /// `[rows]`; `None` is 1.
    pub alpha: Option<&'a [f32]>,
    /// `w[row, j]` is at `row * w_row + j * w_step`.
    pub w: &'a [f32],
    pub w_row: usize,
    pub w_step: usize,
    /// `[rows]`: first and end.
    pub spans: &'a [[usize; 2]],
    /// Rows `j` of `head_dim` elements.
    pub b: Rows<'a>,
    pub head_dim: usize,
}

/// Writes the transpose of `count` rows to `to` `[head_dim, KEYS]`; columns up to the next multiple of
/// 16 are zero, those beyond are left alone.
///
/// # Safety
/// The instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn transpose<L: Lanes>(
    from: Rows<'_>,
    count: usize,
    head_dim: usize,
    to: &mut [f32],
) {
    from.assert_holds(count, head_dim);
    assert!(count <= KEYS && head_dim.is_multiple_of(8) && to.len() >= head_dim * KEYS);
    // SAFETY: rows below `count` and columns below `head_dim` only, which the assertions cover.
    unsafe {
        for key in (0..count).step_by(LANES) {
            for d in (0..head_dim).step_by(LANES) {
                let rows = from.data.as_ptr().add(key * from.stride + d);
                let block = load_block::<L>(rows, from.stride, count - key, head_dim - d);
                let columns = LANES.min(head_dim - d);
                for (i, vector) in block.iter().enumerate().take(columns) {
                    vector.store(to.as_mut_ptr().add((d + i) * KEYS + key));
                }
            }
        }
    }
}

/// The transpose of `count` rows of `width` elements, at most 16 of each; zeros for the rest. Prefetches the rows
/// of the next tile, which are too far apart for the hardware prefetcher.
#[inline(always)]
unsafe fn load_block<L: Lanes>(
    rows: *const f32,
    stride: usize,
    count: usize,
    width: usize,
) -> [L; LANES] {
    // SAFETY: `count` rows of `width` elements are the caller's; a prefetch may have any address.
    unsafe {
        let mut block = [L::splat(0.0); LANES];
        if count >= LANES && width >= LANES {
            for (i, vector) in block.iter_mut().enumerate() {
                let row = rows.add(i * stride);
                L::prefetch(row.wrapping_add(KEYS * stride));
                *vector = L::load(row);
            }
        } else {
            for (i, vector) in block.iter_mut().enumerate().take(count) {
                let row = rows.add(i * stride);
                *vector = if width < LANES {
                    L::load_half(row)
                } else {
                    L::load(row)
                };
            }
        }
        L::transpose(&mut block);
        block
    }
}

/// `s[row, key] = a[row] . key` for the keys a row sees; the other elements of `s` may become anything.
///
/// # Safety
/// The instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn scores<L: Lanes>(args: Scores<'_>) {
    let Scores {
        a,
        keys,
        counts,
        head_dim,
        s,
    } = args;
    let rows = counts.len();
    a.assert_holds(rows, head_dim);
    assert!(keys.len() >= head_dim * KEYS && s.len() >= rows * KEYS);
    assert!(counts.iter().all(|&count| count <= KEYS));
    let (keys, stride) = (keys.as_ptr(), a.stride);
    // SAFETY: rows below `rows` and whole vectors of a tile, which the assertions cover.
    unsafe {
        let mut row = 0;
        while row < rows {
            let a = a.data.as_ptr().add(row * stride);
            let s = s.as_mut_ptr().add(row * KEYS);
            let counts = &counts[row..];
            row += match rows - row {
                6.. => score_rows::<L, 6>((a, stride), keys, counts, head_dim, s),
                4.. => score_rows::<L, 4>((a, stride), keys, counts, head_dim, s),
                2.. => score_rows::<L, 2>((a, stride), keys, counts, head_dim, s),
                _ => score_rows::<L, 1>((a, stride), keys, counts, head_dim, s),
            };
        }
    }
}

#[inline(always)]
unsafe fn score_rows<L: Lanes, const ROWS: usize>(
    a: (*const f32, usize),
    keys: *const f32,
    counts: &[usize],
    head_dim: usize,
    s: *mut f32,
) -> usize {
    let most = counts[..ROWS].iter().copied().max().unwrap_or(0);
    let vectors = most.div_ceil(LANES);
    // SAFETY: the pointers cover ROWS rows and a tile of keys, the caller's contract.
    unsafe {
        // Three vectors in one block are faster than three blocks.
        if L::BLOCK == KEY_VECTORS && vectors + 1 >= KEY_VECTORS {
            score_block::<L, ROWS, KEY_VECTORS>(a, keys, head_dim, s);
            return ROWS;
        }
        for vector in 0..vectors {
            let (keys, s) = (keys.add(vector * LANES), s.add(vector * LANES));
            score_block::<L, ROWS, 1>(a, keys, head_dim, s);
        }
    }
    ROWS
}

#[inline(always)]
unsafe fn score_block<L: Lanes, const ROWS: usize, const N: usize>(
    (a, stride): (*const f32, usize),
    keys: *const f32,
    head_dim: usize,
    s: *mut f32,
) {
    // SAFETY: the pointers cover ROWS rows and N vectors of keys, the caller's contract.
    unsafe {
        let mut sums = [[L::splat(0.0); N]; ROWS];
        for d in 0..head_dim {
            let mut column = [L::splat(0.0); N];
            for (n, column) in column.iter_mut().enumerate() {
                *column = L::load(keys.add(d * KEYS + n * LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(*a.add(row * stride + d));
                for n in 0..N {
                    sums[n] = x.mul_add(column[n], sums[n]);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                sum.store(s.add(row * KEYS + n * LANES));
            }
        }
    }
}

/// `to[row] = a[row] . b[row]`, with the chain of [`scores`]: for the same rows both give the same bits.
///
/// # Safety
/// The instruction set of the caller's features.
#[inline(always)]
pub(super) unsafe fn dots(a: Rows<'_>, b: Rows<'_>, head_dim: usize, to: &mut [f32]) {
    a.assert_holds(to.len(), head_dim);
    b.assert_holds(to.len(), head_dim);
    for (row, to) in to.iter_mut().enumerate() {
        let a = &a.data[row * a.stride..][..head_dim];
        let b = &b.data[row * b.stride..][..head_dim];
        *to = a.iter().zip(b).fold(0.0, |sum, (a, b)| a.mul_add(*b, sum));
    }
}

/// See [`Accumulate`].
///
/// # Safety
/// The instruction set of `L`; the rows of `c` are valid and no other thread uses them.
#[inline(always)]
pub(super) unsafe fn accumulate<L: Lanes>(args: Accumulate<'_>) {
    let rows = args.spans.len();
    let most = args.spans.iter().map(|span| span[1]).max().unwrap_or(0);
    args.b.assert_holds(most, args.head_dim);
    assert!(args.head_dim.is_multiple_of(8));
    assert!(args.alpha.is_none_or(|alpha| alpha.len() >= rows));
    let last = |n: usize| n.saturating_sub(1);
    assert!(
        rows == 0 || last(rows) * args.w_row + last(most) * args.w_step < args.w.len(),
        "weights of every row and key"
    );
    let chains = Chains {
        c: args.c,
        c_stride: args.c_stride,
        w: args.w.as_ptr(),
        w_row: args.w_row,
        w_step: args.w_step,
        b: args.b.data.as_ptr(),
        b_stride: args.b.stride,
        head_dim: args.head_dim,
    };
    // SAFETY: rows below `rows` and keys below the end of each row's span, which the assertions and
    // the caller cover.
    unsafe {
        let mut row = 0;
        while row < rows {
            let (spans, alpha) = (&args.spans[row..], args.alpha.map(|alpha| &alpha[row..]));
            row += match rows - row {
                6.. => accumulate_rows::<L, 6>(chains.at_row(row), spans, alpha),
                4.. => accumulate_rows::<L, 4>(chains.at_row(row), spans, alpha),
                2.. => accumulate_rows::<L, 2>(chains.at_row(row), spans, alpha),
                _ => accumulate_rows::<L, 1>(chains.at_row(row), spans, alpha),
            };
        }
    }
}

/// [`Accumulate`] without its bounds.
#[derive(Clone, Copy)]
struct Chains {
    c: *mut f32,
    c_stride: usize,
    w: *const f32,
    w_row: usize,
    w_step: usize,
    b: *const f32,
    b_stride: usize,
    head_dim: usize,
}

impl Chains {
    #[inline(always)]
    unsafe fn at_row(self, row: usize) -> Self {
        // SAFETY: the caller's rows exist.
        unsafe {
            Chains {
                c: self.c.add(row * self.c_stride),
                w: self.w.add(row * self.w_row),
                ..self
            }
        }
    }
}

/// The keys that all ROWS rows see; the remaining keys of each row come before and after them.
#[inline(always)]
unsafe fn accumulate_rows<L: Lanes, const ROWS: usize>(
    chains: Chains,
    spans: &[[usize; 2]],
    alpha: Option<&[f32]>,
) -> usize {
    let mut factors = [1.0; ROWS];
    if let Some(alpha) = alpha {
        factors.copy_from_slice(&alpha[..ROWS]);
    }
    let spans = &spans[..ROWS];
    let first = spans.iter().map(|span| span[0]).max().unwrap_or(0);
    let end = spans.iter().map(|span| span[1]).min().unwrap_or(0);
    // SAFETY: within the rows and spans asserted by `accumulate`.
    unsafe {
        if first >= end {
            for (row, &[first, end]) in spans.iter().enumerate() {
                if first < end || factors[row] != 1.0 {
                    let chains = chains.at_row(row);
                    accumulate_keys::<L, 1>(chains, [first, end], [factors[row]]);
                }
            }
            return ROWS;
        }
        for (row, span) in spans.iter().enumerate().filter(|(_, span)| span[0] < first) {
            let chains = chains.at_row(row);
            accumulate_keys::<L, 1>(chains, [span[0], first], [factors[row]]);
            factors[row] = 1.0;
        }
        accumulate_keys::<L, ROWS>(chains, [first, end], factors);
        for (row, span) in spans.iter().enumerate().filter(|(_, span)| span[1] > end) {
            accumulate_keys::<L, 1>(chains.at_row(row), [end, span[1]], [1.0]);
        }
    }
    ROWS
}

#[inline(always)]
unsafe fn accumulate_keys<L: Lanes, const ROWS: usize>(
    chains: Chains,
    keys: [usize; 2],
    factors: [f32; ROWS],
) {
    let head_dim = chains.head_dim;
    let mut d = 0;
    // SAFETY: columns below `head_dim`; rows and keys are the caller's.
    unsafe {
        while d + L::BLOCK * LANES <= head_dim {
            // A constant for the compiler: BLOCK is 1 or 4.
            if L::BLOCK == KEY_VECTORS {
                accumulate_block::<L, ROWS, KEY_VECTORS>(chains, d, keys, factors);
            } else {
                accumulate_block::<L, ROWS, 1>(chains, d, keys, factors);
            }
            d += L::BLOCK * LANES;
        }
        if L::BLOCK == KEY_VECTORS && d + 2 * LANES <= head_dim {
            accumulate_block::<L, ROWS, 2>(chains, d, keys, factors);
            d += 2 * LANES;
        }
        while d + LANES <= head_dim {
            accumulate_block::<L, ROWS, 1>(chains, d, keys, factors);
            d += LANES;
        }
        if d < head_dim {
            accumulate_half::<L, ROWS>(chains, d, keys, factors);
        }
    }
}

#[inline(always)]
unsafe fn accumulate_block<L: Lanes, const ROWS: usize, const N: usize>(
    chains: Chains,
    d: usize,
    [first, end]: [usize; 2],
    factors: [f32; ROWS],
) {
    // SAFETY: the caller's rows, keys and N vectors from column `d` exist.
    unsafe {
        let c = chains.c.add(d);
        let mut sums = [[L::splat(0.0); N]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            for (n, sum) in sums.iter_mut().enumerate() {
                let before = L::load(c.add(row * chains.c_stride + n * LANES));
                *sum = before.mul(L::splat(factors[row]));
            }
        }
        for key in first..end {
            let b = chains.b.add(key * chains.b_stride + d);
            let mut column = [L::splat(0.0); N];
            for (n, column) in column.iter_mut().enumerate() {
                if ROWS <= 2 {
                    // Decoding reads each row once, from memory.
                    L::prefetch(b.wrapping_add(KEYS_AHEAD * chains.b_stride + n * LANES));
                }
                *column = L::load(b.add(n * LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let w = L::splat(*chains.w.add(row * chains.w_row + key * chains.w_step));
                for n in 0..N {
                    sums[n] = w.mul_add(column[n], sums[n]);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                sum.store(c.add(row * chains.c_stride + n * LANES));
            }
        }
    }
}

/// The last eight columns where `head_dim` is not a multiple of 16.
#[inline(always)]
unsafe fn accumulate_half<L: Lanes, const ROWS: usize>(
    chains: Chains,
    d: usize,
    [first, end]: [usize; 2],
    factors: [f32; ROWS],
) {
    // SAFETY: the caller's rows, keys and eight columns from `d` exist.
    unsafe {
        let c = chains.c.add(d);
        let mut sums = [L::splat(0.0); ROWS];
        for (row, sum) in sums.iter_mut().enumerate() {
            *sum = L::load_half(c.add(row * chains.c_stride)).mul(L::splat(factors[row]));
        }
        for key in first..end {
            let column = L::load_half(chains.b.add(key * chains.b_stride + d));
            for (row, sum) in sums.iter_mut().enumerate() {
                let w = L::splat(*chains.w.add(row * chains.w_row + key * chains.w_step));
                *sum = w.mul_add(column, *sum);
            }
        }
        for (row, sum) in sums.iter().enumerate() {
            sum.store_half(c.add(row * chains.c_stride));
        }
    }
}
