//! Checks of what retrieval is asked for, the same on every device.

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
    let inside = |range: &std::ops::Range<usize>| range.start <= range.end && range.end <= tokens;
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
