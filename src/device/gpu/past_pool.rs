//! The pool as the model uses it: appended to, read back, selected from.

use std::ops::Range;

use super::bounds::{VECTOR, equal, product};
use super::pool::Pool;
use super::pool_tables::{Calls, PoolCall, Tables, kv_width};
use super::rows::Grid;
use super::{Blocks, Buffer, Driver, Gpu};
use crate::cuda::kernels::layer_params::SegattnRetrievalParams;
use crate::device::{
    Asking, Device, DeviceError, Gathering, Joining, Kind, PastHeads, PastPool, PoolBits,
    PoolShape, Probes, Result, Rows, RowsMut, Selection,
};

impl<D: Driver> PastPool<Gpu<D>> for Pool<D> {
    fn new(_: &Gpu<D>, shape: PoolShape) -> Self {
        Self {
            heads: shape.heads,
            head_dim: shape.head_dim,
            run: shape.run.max(1),
            bits: shape.bits,
            tokens: 0,
            chunks: Vec::new(),
        }
    }

    fn tokens(&self) -> usize {
        self.tokens
    }

    fn append(
        &mut self,
        gpu: &Gpu<D>,
        heads: &[usize],
        [k, v]: [Rows<'_, Buffer<D>>; 2],
        rows: usize,
    ) -> Result<()> {
        let runs = vec![([k, v], rows)];
        append(gpu, heads, &mut [Joining { pool: self, runs }])
    }

    fn truncate(&mut self, tokens: usize) {
        self.keep(tokens);
    }

    fn read(&self, gpu: &Gpu<D>, tokens: Range<usize>) -> Result<(Vec<f32>, Vec<f32>)> {
        if tokens.start > tokens.end || tokens.end > self.tokens {
            let expected = format!("a range within {} tokens", self.tokens);
            let got = format!("{tokens:?}");
            return Err(DeviceError::argument("tokens of a pool", expected, got));
        }
        if self.bits != PoolBits::Sixteen {
            return self.widened(gpu, tokens);
        }
        let width = self.heads * self.head_dim;
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for (chunk, rows) in self.pieces(tokens) {
            let (chunk, range) = (&self.chunks[chunk], rows.start * width..rows.end * width);
            k.extend(gpu.read(&chunk.k, range.clone())?);
            v.extend(gpu.read(&chunk.v, range)?);
        }
        Ok((k, v))
    }

    fn write(&mut self, gpu: &Gpu<D>, k: &[f32], v: &[f32]) -> Result<()> {
        let width = product("heads and head_dim of a pool", &[self.heads, self.head_dim])?.max(1);
        equal("values of tokens", k.len(), v.len())?;
        if !k.len().is_multiple_of(width) {
            let expected = format!("whole tokens of {width} elements");
            return Err(DeviceError::argument("keys of tokens", expected, k.len()));
        }
        let (first, rows) = (self.tokens, k.len() / width);
        if self.bits != PoolBits::Sixteen {
            // Rounding what a pool has given gives it again.
            let heads: Vec<usize> = (0..self.heads).collect();
            let [k, v] = [uploaded(gpu, k)?, uploaded(gpu, v)?];
            let kv = [&k, &v].map(|x| Rows::packed(x, 0, width));
            return self.append(gpu, &heads, kv, rows);
        }
        self.extend(gpu, rows, |pool| {
            let (mut k, mut v) = (k, v);
            for (chunk, rows) in pool.pieces(first..first + rows) {
                let (own_k, later_k) = k.split_at(rows.len() * width);
                let (own_v, later_v) = v.split_at(rows.len() * width);
                let chunk = &mut pool.chunks[chunk];
                gpu.write(&mut chunk.k, rows.start * width, own_k)?;
                gpu.write(&mut chunk.v, rows.start * width, own_v)?;
                (k, v) = (later_k, later_v);
            }
            Ok(())
        })
    }

    fn select(
        &self,
        gpu: &Gpu<D>,
        probes: &Probes<'_, Buffer<D>>,
        selection: &Selection<'_>,
    ) -> Result<Blocks<D>> {
        let ask = Asking {
            pool: self,
            probes: *probes,
            selection: *selection,
        };
        let mut selected = super::selection::select(gpu, &[ask])?;
        Ok(selected.remove(0))
    }

    fn lowest(
        &self,
        gpu: &Gpu<D>,
        probes: &Probes<'_, Buffer<D>>,
        selection: &Selection<'_>,
    ) -> Result<Blocks<D>> {
        super::selection::lowest(gpu, self, probes, selection)
    }

    fn without(&self, gpu: &Gpu<D>, dropped: &Blocks<D>) -> Result<Self> {
        super::retrieval::without(gpu, self, dropped)
    }

    fn gather(
        &self,
        gpu: &Gpu<D>,
        blocks: &Blocks<D>,
        past: &PastHeads<'_>,
        tables: (&Buffer<D>, &Buffer<D>),
        kv: [RowsMut<'_, Buffer<D>>; 2],
    ) -> Result<()> {
        let [k, v] = kv;
        equal("strides of keys and values", k.stride, v.stride)?;
        let at = [k.start, v.start];
        let one = Gathering {
            pool: self,
            blocks,
            past: *past,
            row: 0,
        };
        super::retrieval::gather(gpu, &[one], tables, [k.buffer, v.buffer], (at, k.stride))
    }

    fn append_each(
        gpu: &Gpu<D>,
        heads: &[usize],
        joining: &mut [Joining<'_, Pool<D>, Buffer<D>>],
    ) -> Result<()> {
        append(gpu, heads, joining)
    }

    fn select_each(
        gpu: &Gpu<D>,
        asking: &[Asking<'_, Pool<D>, Buffer<D>>],
    ) -> Result<Vec<Blocks<D>>> {
        super::selection::select(gpu, asking)
    }

    fn gather_each(
        gpu: &Gpu<D>,
        gathering: &[Gathering<'_, Pool<D>, Blocks<D>>],
        tables: (&Buffer<D>, &Buffer<D>),
        kv: [&mut Buffer<D>; 2],
        width: usize,
    ) -> Result<()> {
        super::retrieval::gather(gpu, gathering, tables, kv, ([0; 2], width))
    }
}

/// Appends tokens to pools, all in one launch. If it fails, none has any of them.
fn append<D: Driver>(
    gpu: &Gpu<D>,
    heads: &[usize],
    joining: &mut [Joining<'_, Pool<D>, Buffer<D>>],
) -> Result<()> {
    let before: Vec<usize> = joining.iter().map(|joining| joining.pool.tokens).collect();
    let appended = append_runs(gpu, heads, joining);
    if appended.is_err() {
        for (joining, tokens) in joining.iter_mut().zip(before) {
            joining.pool.keep(tokens);
        }
    }
    appended
}

/// [`append`] that leaves what it has done after an error.
fn append_runs<D: Driver>(
    gpu: &Gpu<D>,
    heads: &[usize],
    joining: &mut [Joining<'_, Pool<D>, Buffer<D>>],
) -> Result<()> {
    // Of each run the pool, and rows of keys and of values from a token on.
    let (mut runs, mut most) = (Vec::new(), 0);
    for (
        i,
        Joining {
            pool,
            runs: of_pool,
        },
    ) in joining.iter_mut().enumerate()
    {
        let width = kv_width(pool, heads)?;
        for ([k, v], rows) in of_pool {
            let kv = [gpu.input(k, *rows, width)?, gpu.input(v, *rows, width)?];
            let units = product("elements of rows", &[*rows, heads.len(), pool.head_dim])?;
            if *rows > 0 {
                runs.push((i, kv, [pool.tokens, *rows]));
            }
            most = most.max(units / VECTOR);
            pool.extend(gpu, *rows, |_| Ok(()))?;
        }
    }
    if runs.is_empty() {
        return Ok(());
    }
    // A pool that grows may move chunks of another one's, so addresses are taken now.
    let pool = |i: usize| &*joining[i].pool;
    let of_runs = runs.iter().map(|(i, ..)| pool(*i).call(heads));
    let tables = Tables::new(gpu, &of_runs.collect::<Vec<_>>())?;
    let call = |(call, (i, [k, v], [token, rows])): (usize, &(usize, [_; 2], [usize; 2]))| {
        Ok(SegattnRetrievalParams {
            k: *k,
            v: *v,
            token: *token as i64,
            rows: *rows as i64,
            ..tables.params(call, pool(*i))?
        })
    };
    let calls = runs
        .iter()
        .enumerate()
        .map(call)
        .collect::<Result<Vec<_>>>()?;
    Calls::new(gpu, &calls)?.launch("pool_append_bf16", Grid::Threads(most))
}

impl<D: Driver> Pool<D> {
    /// A call that neither selects nor gathers.
    pub(super) fn call<'a>(&'a self, kv_heads: &'a [usize]) -> PoolCall<'a, D> {
        PoolCall {
            pool: self,
            kv_heads,
            eligible: &[],
            ends: &[],
        }
    }

    /// What a pool of fewer than 16 bits holds of some of its tokens.
    fn widened(&self, gpu: &Gpu<D>, tokens: Range<usize>) -> Result<(Vec<f32>, Vec<f32>)> {
        let (rows, width) = (tokens.len(), self.heads * self.head_dim);
        let len = product("elements of tokens", &[rows, width])?;
        let heads: Vec<usize> = (0..self.heads).collect();
        let mut k = gpu.empty(Kind::Activation, len)?;
        let mut v = gpu.empty(Kind::Activation, len)?;
        if rows > 0 {
            let tables = Tables::new(gpu, &[self.call(&heads)])?;
            let params = SegattnRetrievalParams {
                k: gpu.output(&RowsMut::packed(&mut k, 0, width), rows, width)?,
                v: gpu.output(&RowsMut::packed(&mut v, 0, width), rows, width)?,
                token: tokens.start as i64,
                rows: rows as i64,
                ..tables.params(0, self)?
            };
            Calls::new(gpu, &[params])?.launch("pool_read_bf16", Grid::Threads(len / VECTOR))?;
        }
        Ok((gpu.read(&k, 0..len)?, gpu.read(&v, 0..len)?))
    }
}

fn uploaded<D: Driver>(gpu: &Gpu<D>, values: &[f32]) -> Result<Buffer<D>> {
    let mut buffer = gpu.empty(Kind::Activation, values.len())?;
    gpu.write(&mut buffer, 0, values)?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::memory::Arena;
    use super::super::pool::Chunk;
    use super::super::{DryRun, bytes_of};
    use super::*;
    use crate::cuda::kernels::KernelMetadata;

    #[test]
    fn keys_stay_on_the_device_longest() {
        let kernels = KernelMetadata {
            multiprocessors: 1,
            hopper: false,
        };
        let gpu = Gpu::new(DryRun::new(Arc::new(kernels), None));
        let (heads, dim, run) = (2, 32, 8);
        let width = heads * dim;
        gpu.limit_pool(5 * run * width * bytes_of(Kind::Activation));
        let rows = gpu.empty(Kind::Activation, run * width).expect("rows");
        let rows = Rows::packed(&rows, 0, width);
        let shape = PoolShape {
            heads,
            head_dim: dim,
            run,
            bits: PoolBits::Sixteen,
        };
        let mut pool = Pool::new(&gpu, shape);
        for on_device in [[1, 1], [2, 2], [3, 2], [4, 1], [5, 0], [5, 0], [5, 0]] {
            pool.append(&gpu, &[0, 1], [rows; 2], run).expect("a run");
            let here = |buffer: &Buffer<_>| usize::from(buffer.arena() == Some(Arena::Pool));
            let count = |f: fn(&Chunk<_>) -> &Buffer<_>| pool.chunks.iter().map(f).map(here).sum();
            let (keys, values): (usize, usize) = (count(|c| &c.k), count(|c| &c.v));
            assert_eq!([keys, values], on_device);
            // The oldest keys are those that stay.
            let keys = pool.chunks.iter().map(|c| here(&c.k));
            assert!(keys.is_sorted_by(|a, b| a >= b));
        }
    }
}
