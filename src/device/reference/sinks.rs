//! Sink logits on the f64 device (docs/contract.md, section 2).

use super::{Buf, dot};
use crate::device::shared::spans::SpanBatch;
use crate::device::{RowsMut, SinkLogits, SinkLogitsGrad, SlotSpan};

/// What the sink of a head leaves of a row's output, and what it takes.
fn shares(logit: f64, lse: f64) -> [f64; 2] {
    let e = (-(logit - lse).abs()).exp();
    let parts = if lse >= logit { [1.0, e] } else { [e, 1.0] };
    parts.map(|part| part / (1.0 + e))
}

/// The scaled output.
pub(super) fn forward(sinks: &SinkLogits<'_, Buf>, spans: &[SlotSpan], mut y: RowsMut<'_, Buf>) {
    let (heads, dim) = (sinks.heads.q, sinks.heads.dim);
    let batch = SpanBatch::of(spans);
    for (r, [first, step]) in batch.lse_places(heads).enumerate() {
        let row = batch.first_row() + r;
        let (out, y) = (sinks.out.row(row, heads * dim), y.row(row, heads * dim));
        for head in 0..heads {
            let lse = sinks.lse.buffer[sinks.lse.start + first + head * step];
            let [share, _] = shares(sinks.logits[head], lse);
            let columns = head * dim..(head + 1) * dim;
            let pairs = y[columns.clone()].iter_mut().zip(&out[columns]);
            pairs.for_each(|(y, out)| *y = share * out);
        }
    }
}

/// Its gradients.
pub(super) fn backward(sinks: &SinkLogits<'_, Buf>, mut grad: SinkLogitsGrad<'_, Buf>) {
    let (heads, dim) = (sinks.heads.q, sinks.heads.dim);
    let batch = SpanBatch::of(grad.spans);
    let mut places = batch.lse_places(heads).enumerate();
    for (span, d_logits) in grad.spans.iter().zip(grad.d_logits.chunks_mut(heads)) {
        d_logits.fill(0.0);
        for (r, [first, step]) in places.by_ref().take(span.rows) {
            let row = batch.first_row() + r;
            let [out, d_y] = [sinks.out, grad.d_y].map(|rows| rows.row(row, heads * dim));
            let d_out = grad.d_out.row(row, heads * dim);
            for (head, d_logit) in d_logits.iter_mut().enumerate() {
                let at = first + head * step;
                let lse = sinks.lse.buffer[sinks.lse.start + at];
                let [share, rest] = shares(sinks.logits[head], lse);
                let columns = head * dim..(head + 1) * dim;
                let d_lse = share * rest * dot(&d_y[columns.clone()], &out[columns.clone()]);
                grad.d_lse.buffer[grad.d_lse.start + at] = d_lse;
                *d_logit -= d_lse;
                let pairs = d_out[columns.clone()].iter_mut().zip(&d_y[columns]);
                pairs.for_each(|(d_out, d_y)| *d_out = share * d_y);
            }
        }
    }
}
