//! [`Device`] for the GPU: memory and copies. Other calls go to the modules beside this one.

use std::ops::Range;

use half::bf16;

use super::gemm::epilogue;
use super::{
    Blocks, Buffer, Driver, Epilogue, Gemm, Gpu, Matrix, Operand, Pool, Recording, Samplers, Step,
    attend, bounds, bytes_of, head_norms, loss, norms, optimizer, record, rotation, rows, sinks,
};
use crate::device::{
    Accumulate, AdamW, Attention, AttentionGrad, Device, GradTensor, Heads, KeyStore, Kind, Lesson,
    Move, OutOfMemory, QkNormGrad, QkNorms, Result, Rows, RowsMut, SinkLogits, SinkLogitsGrad,
    StepRows, Update,
};

/// The bytes of numbers in a buffer of this kind.
fn encode(kind: Kind, values: &[f32]) -> std::borrow::Cow<'_, [u8]> {
    match kind {
        Kind::Exact => bytemuck::cast_slice(values).into(),
        Kind::Activation => {
            let narrow: Vec<bf16> = values.iter().copied().map(bf16::from_f32).collect();
            bytemuck::cast_slice(&narrow).to_vec().into()
        }
    }
}

impl<D: Driver> Device for Gpu<D> {
    type Buffer = Buffer<D>;
    type Matrix = Matrix<D>;
    type Pool = Pool<D>;
    type Blocks = Blocks<D>;
    type Step = Step<D>;
    type Samplers = Samplers<D>;
    type Recording = Recording<D>;

    /// The gradient of the LM head is read and written once for this many rows. At 128 rows that would take as long as
    /// the GEMMs.
    const LOGIT_ROWS: usize = 1024;

    fn description(&self) -> String {
        self.driver().description()
    }

    fn record<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<Option<(T, Recording<D>)>> {
        record::record(self, work).map(Some)
    }

    fn zeros(&self, kind: Kind, len: usize) -> Result<Buffer<D>> {
        let mut buffer = self.empty(kind, len)?;
        self.clear(&mut buffer)?;
        Ok(buffer)
    }

    fn empty(&self, kind: Kind, len: usize) -> Result<Buffer<D>> {
        let block = match len {
            0 => None,
            len => {
                let bytes = len.checked_mul(bytes_of(kind));
                let bytes = bytes.ok_or_else(|| OutOfMemory::device(usize::MAX))?;
                Some(self.block(bytes)?)
            }
        };
        Ok(Buffer {
            block,
            kind,
            len,
            half_rows: false,
        })
    }

    fn write(&self, buffer: &mut Buffer<D>, start: usize, values: &[f32]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let at = self.range(buffer, start, values.len())?;
        let bytes = encode(buffer.kind, values);
        // SAFETY: the range is the buffer's.
        unsafe { self.driver().upload(at, &bytes) }.map_err(Into::into)
    }

    fn read(&self, buffer: &Buffer<D>, range: Range<usize>) -> Result<Vec<f32>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let from = self.range(buffer, range.start, range.len())?;
        match buffer.kind {
            Kind::Exact => {
                let mut values = vec![0f32; range.len()];
                let bytes = bytemuck::cast_slice_mut(&mut values);
                // SAFETY: the range is the buffer's, and whoever reads it has written it.
                unsafe { self.driver().download(from, bytes)? };
                Ok(values)
            }
            Kind::Activation => {
                let mut values = vec![bf16::ZERO; range.len()];
                let bytes = bytemuck::cast_slice_mut(&mut values);
                // SAFETY: as above.
                unsafe { self.driver().download(from, bytes)? };
                Ok(values.into_iter().map(bf16::to_f32).collect())
            }
        }
    }

    fn len(&self, buffer: &Buffer<D>) -> usize {
        buffer.len
    }

    fn element_bytes(&self, kind: Kind) -> usize {
        bytes_of(kind)
    }

    fn clear(&self, buffer: &mut Buffer<D>) -> Result<()> {
        let Some(block) = &buffer.block else {
            return Ok(());
        };
        let bytes = buffer.len * bytes_of(buffer.kind);
        // SAFETY: the block is the buffer's.
        unsafe { self.driver().zero(self.at(block)?, bytes)? };
        buffer.half_rows = false;
        Ok(())
    }

    fn copy(
        &self,
        src: Rows<'_, Buffer<D>>,
        dst: RowsMut<'_, Buffer<D>>,
        rows: usize,
        width: usize,
        accumulate: Accumulate,
    ) -> Result<()> {
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let packed = |stride| rows == 1 || stride == width;
        let same_kind = src.buffer.kind == dst.buffer.kind;
        if accumulate == Accumulate::No && same_kind && packed(src.stride) && packed(dst.stride) {
            let (from, to) = (
                self.rows(&src, rows, width)?,
                self.rows(&dst.shared(), rows, width)?,
            );
            let bytes = rows * width * bytes_of(src.buffer.kind);
            // SAFETY: both ranges are their buffers', and `dst` is borrowed mutably: they are two.
            return unsafe { self.driver().copy(from, to, bytes) }.map_err(Into::into);
        }
        rows::scale(self, 1.0, src, dst, [rows, width], accumulate)
    }

    fn scale(
        &self,
        factor: f64,
        src: Rows<'_, Buffer<D>>,
        dst: RowsMut<'_, Buffer<D>>,
        [rows, width]: [usize; 2],
        accumulate: Accumulate,
    ) -> Result<()> {
        if rows == 0 || width == 0 {
            return Ok(());
        }
        rows::scale(self, factor, src, dst, [rows, width], accumulate)
    }

    fn matrix(
        &self,
        values: &Buffer<D>,
        out: usize,
        inner: usize,
        _training: bool,
    ) -> Result<Matrix<D>> {
        let mut matrix = Matrix {
            block: self.block(bounds::product(
                "elements of a matrix",
                &[out, inner, bytes_of(Kind::Activation)],
            )?)?,
            out,
            inner,
        };
        self.refresh(&mut matrix, values)?;
        Ok(matrix)
    }

    fn refresh(&self, matrix: &mut Matrix<D>, values: &Buffer<D>) -> Result<()> {
        rows::narrow(self, values, matrix)
    }

    fn linear(
        &self,
        x: Rows<'_, Buffer<D>>,
        rows: usize,
        weight: &Matrix<D>,
        y: RowsMut<'_, Buffer<D>>,
        accumulate: Accumulate,
    ) -> Result<()> {
        let sizes = [rows, weight.out, weight.inner];
        self.gemm(
            x,
            weight.operand(self, true)?,
            sizes,
            y,
            epilogue(accumulate),
        )
    }

    fn linear_residual(
        &self,
        x: Rows<'_, Buffer<D>>,
        rows: usize,
        weight: &Matrix<D>,
        residual: Rows<'_, Buffer<D>>,
        y: RowsMut<'_, Buffer<D>>,
        width: usize,
    ) -> Result<()> {
        bounds::equal("width of the residual's rows", weight.out, width)?;
        bounds::of_kind(residual.buffer, y.buffer.kind)?;
        let epilogue = Epilogue::AddRows {
            address: self.rows(&residual, rows, weight.out)?,
            stride: residual.stride,
        };
        let sizes = [rows, weight.out, weight.inner];
        self.gemm(x, weight.operand(self, true)?, sizes, y, epilogue)
    }

    fn linear_input_grad(
        &self,
        d_y: Rows<'_, Buffer<D>>,
        rows: usize,
        weight: &Matrix<D>,
        d_x: RowsMut<'_, Buffer<D>>,
        accumulate: Accumulate,
    ) -> Result<()> {
        let sizes = [rows, weight.inner, weight.out];
        self.gemm(
            d_y,
            weight.operand(self, false)?,
            sizes,
            d_x,
            epilogue(accumulate),
        )
    }

    fn linear_weight_grad(
        &self,
        d_y: Rows<'_, Buffer<D>>,
        x: Rows<'_, Buffer<D>>,
        rows: usize,
        [out, inner]: [usize; 2],
        d_w: &mut Buffer<D>,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let (_held_d_y, a) = self.operand(d_y, rows, out)?;
        let (_held_x, b) = self.operand(x, rows, inner)?;
        let gemm = Gemm {
            m: out,
            n: inner,
            k: rows,
            a: Operand {
                transposed: true,
                ..a
            },
            b,
            c: self.rows(&Rows::packed(d_w, 0, inner), out, inner)?,
            c_stride: inner,
            c_kind: d_w.kind,
            epilogue: Epilogue::Accumulate,
        };
        self.multiply(&gemm)
    }

    fn step(&self, rows: StepRows) -> Result<Step<D>> {
        Step::new(self, rows)
    }

    fn renew(&self, step: &mut Step<D>, rows: StepRows) -> Result<()> {
        step.renew(self, rows)
    }

    fn embed(&self, table: &Matrix<D>, step: &Step<D>, y: RowsMut<'_, Buffer<D>>) -> Result<()> {
        rows::embed(self, table, step, y)
    }

    fn embed_grad(
        &self,
        d_y: Rows<'_, Buffer<D>>,
        width: usize,
        tokens: &[u32],
        d_table: &mut Buffer<D>,
    ) -> Result<()> {
        rows::embed_grad(self, d_y, width, tokens, d_table)
    }

    fn rms_norm(
        &self,
        x: Rows<'_, Buffer<D>>,
        shape: [usize; 2],
        weight: &Buffer<D>,
        eps: f64,
        y: RowsMut<'_, Buffer<D>>,
        rstd: RowsMut<'_, Buffer<D>>,
    ) -> Result<()> {
        norms::rms_norm(self, x, shape, weight, eps, y, rstd)
    }

    fn rms_norm_grad(
        &self,
        d_y: Rows<'_, Buffer<D>>,
        x: Rows<'_, Buffer<D>>,
        rstd: Rows<'_, Buffer<D>>,
        shape: [usize; 2],
        weight: &Buffer<D>,
        d_x: RowsMut<'_, Buffer<D>>,
    ) -> Result<()> {
        norms::rms_norm_grad(self, [d_y, x, rstd], shape, weight, d_x)
    }

    fn rms_norm_weight_grad(
        &self,
        d_y: Rows<'_, Buffer<D>>,
        x: Rows<'_, Buffer<D>>,
        rstd: Rows<'_, Buffer<D>>,
        shape: [usize; 2],
        d_weight: &mut Buffer<D>,
    ) -> Result<()> {
        norms::rms_norm_weight_grad(self, [d_y, x, rstd], shape, d_weight)
    }

    fn column_sums(&self, x: Rows<'_, Buffer<D>>, rows: usize, sums: &mut Buffer<D>) -> Result<()> {
        norms::column_sums(self, x, rows, sums)
    }

    fn rope(
        &self,
        src: Rows<'_, Buffer<D>>,
        dst: RowsMut<'_, Buffer<D>>,
        heads: usize,
        head_dim: usize,
        tables: (&Buffer<D>, &Buffer<D>),
        angles: &[usize],
        inverse: bool,
        accumulate: Accumulate,
    ) -> Result<()> {
        rotation::rope(
            self,
            src,
            dst,
            [heads, head_dim],
            tables,
            angles,
            inverse,
            accumulate,
        )
    }

    fn move_rows(
        &self,
        moves: &[Move<'_, Buffer<D>>],
        targets: &mut [&mut Buffer<D>],
        head_dim: usize,
        tables: (&Buffer<D>, &Buffer<D>),
        inverse: bool,
        accumulate: Accumulate,
    ) -> Result<()> {
        rotation::move_rows(self, moves, targets, head_dim, tables, inverse, accumulate)
    }

    fn split_qkv(
        &self,
        qkv: Rows<'_, Buffer<D>>,
        norms: Option<QkNorms<'_, Buffer<D>>>,
        heads: Heads,
        tables: (&Buffer<D>, &Buffer<D>),
        step: &Step<D>,
        q: RowsMut<'_, Buffer<D>>,
        store: Option<KeyStore<'_, Buffer<D>>>,
    ) -> Result<()> {
        rotation::split_qkv(self, qkv, norms, heads, tables, step, q, store)
    }

    fn join_qkv(
        &self,
        d: [Rows<'_, Buffer<D>>; 3],
        heads: Heads,
        tables: (&Buffer<D>, &Buffer<D>),
        angles: &[usize],
        d_qkv: RowsMut<'_, Buffer<D>>,
    ) -> Result<()> {
        rotation::join_qkv(self, d, heads, tables, angles, d_qkv)
    }

    fn qk_norm_grad(
        &self,
        grad: &QkNormGrad<'_, Buffer<D>>,
        weights: [&Buffer<D>; 2],
        d_x: RowsMut<'_, Buffer<D>>,
    ) -> Result<()> {
        head_norms::qk_norm_grad(self, grad, weights, d_x)
    }

    fn qk_norm_weight_grad(
        &self,
        grad: &QkNormGrad<'_, Buffer<D>>,
        d_weights: [Option<&mut Buffer<D>>; 2],
    ) -> Result<()> {
        head_norms::qk_norm_weight_grad(self, grad, d_weights)
    }

    fn swiglu(
        &self,
        gate_up: Rows<'_, Buffer<D>>,
        rows: usize,
        inner: usize,
        y: RowsMut<'_, Buffer<D>>,
    ) -> Result<()> {
        rows::swiglu(self, gate_up, rows, inner, y)
    }

    fn swiglu_grad(
        &self,
        d_y: Rows<'_, Buffer<D>>,
        gate_up: Rows<'_, Buffer<D>>,
        rows: usize,
        inner: usize,
        d_gate_up: RowsMut<'_, Buffer<D>>,
    ) -> Result<()> {
        rows::swiglu_grad(self, d_y, gate_up, rows, inner, d_gate_up)
    }

    fn log_probabilities(
        &self,
        logits: RowsMut<'_, Buffer<D>>,
        vocab: usize,
        targets: &[u32],
        scales: Option<&[f64]>,
        scores: RowsMut<'_, Buffer<D>>,
    ) -> Result<()> {
        loss::log_probabilities(self, logits, vocab, targets, scales, scores)
    }

    fn divergences(
        &self,
        logits: RowsMut<'_, Buffer<D>>,
        vocab: usize,
        targets: &[u32],
        lesson: &Lesson<'_, Buffer<D>>,
        scores: [RowsMut<'_, Buffer<D>>; 2],
    ) -> Result<()> {
        loss::divergences(self, logits, vocab, targets, lesson, scores)
    }

    fn attention(
        &self,
        call: &Attention<'_, Buffer<D>>,
        step: &mut Step<D>,
        number: usize,
        out: RowsMut<'_, Buffer<D>>,
        lse: RowsMut<'_, Buffer<D>>,
    ) -> Result<()> {
        attend::forward(self, call, (step, number), &out, &lse)
    }

    fn attention_grad(
        &self,
        call: &Attention<'_, Buffer<D>>,
        grad: AttentionGrad<'_, Buffer<D>>,
    ) -> Result<()> {
        attend::backward(self, call, &grad)
    }

    fn sink_logits(
        &self,
        call: &SinkLogits<'_, Buffer<D>>,
        step: &Step<D>,
        y: RowsMut<'_, Buffer<D>>,
    ) -> Result<()> {
        sinks::forward(self, call, step, &y)
    }

    fn sink_logits_grad(
        &self,
        call: &SinkLogits<'_, Buffer<D>>,
        grad: SinkLogitsGrad<'_, Buffer<D>>,
    ) -> Result<()> {
        sinks::backward(self, call, &grad)
    }

    fn norm_chunk(&self) -> Result<usize> {
        optimizer::norm_chunk(self)
    }

    fn grad_squares(&self, grads: &[(&Buffer<D>, Range<usize>)]) -> Result<Vec<f64>> {
        optimizer::squares(self, grads)
    }

    fn adamw(
        &self,
        tensors: &mut [GradTensor<'_, Buffer<D>>],
        squares: &[f64],
        update: &AdamW,
    ) -> Result<Update> {
        optimizer::adamw(self, tensors, squares, update)
    }
}
