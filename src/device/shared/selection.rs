//! Checks of what retrieval is asked for, the same on every device.

use std::ops::Range;

use crate::device::{DeviceError, Probes, Result, Selection, SelectionRule};

/// Checks queries and selection against a pool of `heads` heads and `tokens` tokens.
pub(in crate::device) fn check<B>(
    probes: &Probes<'_, B>,
    selection: &Selection<'_>,
    [heads, tokens]: [usize; 2],
) -> Result<()> {
    for (what, got) in [
        ("KV heads of a pool", selection.kv_heads.len()),
        ("eligible tokens of heads", selection.eligible.len()),
    ] {
        if got != heads {
            return Err(DeviceError::argument(what, heads.to_string(), got));
        }
    }
    let inside = |range: &Range<usize>| range.start <= range.end && range.end <= tokens;
    if let Some(range) = selection.eligible.iter().find(|range| !inside(range)) {
        let expected = format!("a range within the {tokens} tokens of the pool");
        let got = format!("{range:?}");
        return Err(DeviceError::argument("eligible tokens", expected, got));
    }
    let Probes {
        rows,
        first,
        capacity,
        ..
    } = *probes;
    if rows == 0 || rows > capacity || first >= capacity {
        let expected = format!("1 to {capacity} queries, the earliest in a row below {capacity}");
        let got = format!("{rows} queries from row {first} on");
        return Err(DeviceError::argument("probes", expected, got));
    }
    let lengths: &[_] = match selection.rule {
        SelectionRule::Blocks {
            block_len,
            probe_window,
            probe_stride,
        } => &[
            ("block_len", block_len),
            ("probe_window", probe_window),
            ("probe_stride", probe_stride),
        ],
        SelectionRule::Windows {
            window_len,
            window_before,
        } => {
            if window_before >= window_len.max(1) {
                let expected = format!("less than window_len, which is {window_len}");
                return Err(DeviceError::argument(
                    "window_before",
                    expected,
                    window_before,
                ));
            }
            &[("window_len", window_len)]
        }
    };
    match lengths.iter().find(|(_, len)| *len == 0) {
        Some((what, len)) => Err(DeviceError::argument(what, "1 or more", len)),
        None => Ok(()),
    }
}

/// [`check`] for tokens that are dropped: so many of each head.
pub(in crate::device) fn check_dropped<B>(
    probes: &Probes<'_, B>,
    selection: &Selection<'_>,
    pool: [usize; 2],
) -> Result<()> {
    check(probes, selection, pool)?;
    let (rows, block_len) = (selection.rows, selection.rule.block_len());
    let blocks = (0..pool[0]).map(|head| selection.blocks(head, block_len).len());
    let most = blocks.min().unwrap_or(0) * block_len;
    if rows > most || !rows.is_multiple_of(block_len) {
        let expected = format!("whole blocks of {block_len}, at most {most}");
        return Err(DeviceError::argument("tokens to drop", expected, rows));
    }
    Ok(())
}

/// Checks that heads which drop so many tokens each drop the same number, and returns it.
pub(in crate::device) fn dropped(
    [heads, tokens]: [usize; 2],
    counts: impl ExactSizeIterator<Item = usize> + Clone,
) -> Result<usize> {
    let first = counts.clone().next().unwrap_or(0);
    let equal = counts.len() == heads && counts.clone().all(|count| count == first);
    if !equal || first > tokens {
        let expected = format!("one number up to {tokens} for each of {heads} heads");
        let got = format!("{:?}", counts.collect::<Vec<_>>());
        return Err(DeviceError::argument("dropped tokens", expected, got));
    }
    Ok(first)
}

/// The tokens whose whole windows have `token` in them, of `len` eligible ones.
pub(in crate::device) fn around(
    token: usize,
    len: usize,
    [window_len, window_before]: [usize; 2],
) -> Range<usize> {
    let behind = window_len - 1 - window_before;
    let end = token.saturating_add(window_before).saturating_add(1);
    token.saturating_sub(behind)..end.min(len)
}

/// The first token of a window of `width` of `len` eligible tokens around the token `best`, before it is cut.
pub(in crate::device) fn window_begin(
    best: usize,
    width: usize,
    len: usize,
    [window_len, window_before]: [usize; 2],
) -> usize {
    let before = width as u128 * window_before as u128 / window_len as u128;
    best.saturating_sub(before as usize).min(len - width)
}
