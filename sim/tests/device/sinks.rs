//! Sink logits on the GPU device: calls that do not fit are typed errors before any kernel runs.

use crate::common::{gpu, upload};
use segattn::device::gpu::Gpu;
use segattn::device::{
    Device, DeviceError, Heads, Kind, Result, Rows, RowsMut, SinkLogits, SinkLogitsGrad, SlotSpan,
    StepRows,
};
use segattn_sim::{Checks, Driver};

/// Numbers of rows and of elements that the buffers of a call have.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    /// Of the spans' rows.
    spans: [usize; 2],
    first: usize,
    heads: Heads,
    logits: usize,
    lse: usize,
}

const FITS: Sizes = Sizes {
    rows: 5,
    spans: [3, 2],
    first: 0,
    heads: Heads {
        q: 2,
        kv: 1,
        dim: 32,
    },
    logits: 2,
    lse: 10,
};

fn spans(sizes: &Sizes) -> Vec<SlotSpan> {
    let [a, b] = sizes.spans;
    let span = |row, rows, slot| SlotSpan {
        row: sizes.first + row,
        rows,
        start: 0,
        slot,
    };
    vec![span(0, a, 0), span(a, b, 1)]
}

/// The results of both passes.
fn calls(gpu: &Gpu<Driver>, sizes: &Sizes) -> [Result<()>; 2] {
    let (width, spans) = (sizes.heads.q * sizes.heads.dim, spans(sizes));
    let exact = |len: usize| upload(gpu, Kind::Exact, &vec![1.0; len]);
    let activations = || upload(gpu, Kind::Activation, &vec![1.0; sizes.rows * width]);
    let (logits, lse, out, d_y) = (
        exact(sizes.logits),
        exact(sizes.lse),
        activations(),
        activations(),
    );
    let [mut y, mut d_out] = [(); 2].map(|()| activations());
    let (mut d_lse, mut d_logits) = (exact(sizes.lse), exact(4));
    let count = sizes.first + sizes.spans.iter().sum::<usize>();
    let rows = StepRows {
        tokens: vec![1; count],
        angles: vec![0; count],
        cache_rows: vec![0; count],
        probe_rows: vec![None; count],
        spans: spans.clone(),
        reach: 16,
    };
    let step = gpu.step(rows).expect("a step");
    let sinks = SinkLogits {
        logits: &logits,
        heads: sizes.heads,
        out: Rows::packed(&out, 0, width),
        lse: Rows::packed(&lse, 0, sizes.heads.q),
    };
    let grad = SinkLogitsGrad {
        spans: &spans,
        d_y: Rows::packed(&d_y, 0, width),
        d_out: RowsMut::packed(&mut d_out, 0, width),
        d_lse: RowsMut::packed(&mut d_lse, 0, sizes.heads.q),
        d_logits: &mut d_logits,
    };
    [
        gpu.sink_logits(&sinks, &step, RowsMut::packed(&mut y, 0, width)),
        gpu.sink_logits_grad(&sinks, grad),
    ]
}

#[test]
fn calls_that_do_not_fit_are_errors() {
    let gpu = gpu(7, Checks::All);
    assert!(calls(&gpu, &FITS).iter().all(Result::is_ok));
    let refused = |sizes: Sizes| {
        calls(&gpu, &sizes).map(
            |result| match result.expect_err("a call that does not fit") {
                DeviceError::Argument { argument, .. } => argument,
                error => panic!("{error}"),
            },
        )
    };
    let of_heads = |dim| Sizes {
        heads: Heads { dim, ..FITS.heads },
        ..FITS
    };
    // A row more than there are, logits and log-sum-exps that are missing, heads that vectors and lanes do not fit.
    let rows = Sizes { rows: 4, ..FITS };
    assert_eq!(refused(rows), ["rows", "rows"]);
    assert_eq!(refused(Sizes { logits: 1, ..FITS }), ["range", "range"]);
    assert_eq!(refused(Sizes { lse: 9, ..FITS }), ["range", "range"]);
    assert_eq!(refused(of_heads(36)), ["head_dim", "head_dim"]);
    assert_eq!(refused(of_heads(264)), ["head_dim", "head_dim"]);
    let later = Sizes {
        first: 1,
        rows: 6,
        lse: 12,
        ..FITS
    };
    assert_eq!(refused(later), ["rows of spans", "first row of spans"]);
}
