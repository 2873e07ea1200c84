//! The pool as the model uses it: appended to, read back, selected from.

use std::ops::Range;

use super::bounds::{VECTOR, equal};
use super::pool::Pool;
use super::pool_tables::{Tables, kv_width};
use super::rows::{Grid, entry, launch};
use super::{Blocks, Buffer, Driver, Gpu};
use crate::cuda::kernels::File;
use crate::cuda::kernels::layer_params::SegattnRetrievalParams;
use crate::device::{
    Device, DeviceError, PastHeads, PastPool, Probes, Result, Rows, RowsMut, Selection,
};

impl<D: Driver> PastPool<Gpu<D>> for Pool<D> {
    fn new(_: &Gpu<D>, heads: usize, head_dim: usize, run: usize) -> Self {
        Self {
            heads,
            head_dim,
            run,
            chunks: Vec::new(),
        }
    }

    fn tokens(&self) -> usize {
        self.chunks.len() * self.run
    }

    fn append(
        &mut self,
        gpu: &Gpu<D>,
        heads: &[usize],
        [k, v]: [Rows<'_, Buffer<D>>; 2],
        rows: usize,
    ) -> Result<()> {
        equal("tokens of a run", self.run, rows)?;
        let width = kv_width(self, heads)?;
        let (k, v) = (gpu.input(&k, rows, width)?, gpu.input(&v, rows, width)?);
        let token = self.tokens() as i64;
        self.push(gpu, |pool| {
            let none = vec![0; heads.len()];
            let tables = Tables::new(gpu, pool, heads, &none, &none)?;
            let params = SegattnRetrievalParams {
                k,
                v,
                token,
                rows: rows as i64,
                ..tables.params(pool)?
            };
            let threads = Grid::Threads(pool.chunk_len()? / VECTOR);
            launch(
                gpu,
                entry(File::Retrieval, "pool_append_bf16"),
                threads,
                &params,
            )
        })
    }

    fn truncate(&mut self, tokens: usize) {
        self.chunks
            .truncate(tokens.checked_div(self.run).unwrap_or(0));
    }

    fn read(&self, gpu: &Gpu<D>, tokens: Range<usize>) -> Result<(Vec<f32>, Vec<f32>)> {
        let run = self.run.max(1);
        let chunks = self.chunks.get(tokens.start / run..tokens.end / run);
        let whole = tokens.start.is_multiple_of(run) && tokens.end.is_multiple_of(run);
        let Some(chunks) = chunks.filter(|_| whole) else {
            let expected = format!("whole runs of {run} tokens below {}", self.tokens());
            return Err(DeviceError::argument(
                "tokens of a pool",
                expected,
                format!("{tokens:?}"),
            ));
        };
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for chunk in chunks {
            k.extend(gpu.read(&chunk.k, 0..chunk.k.len)?);
            v.extend(gpu.read(&chunk.v, 0..chunk.v.len)?);
        }
        Ok((k, v))
    }

    fn write(&mut self, gpu: &Gpu<D>, k: &[f32], v: &[f32]) -> Result<()> {
        let len = self.chunk_len()?;
        equal("keys of a run", len, k.len())?;
        equal("values of a run", len, v.len())?;
        self.push(gpu, |pool| match pool.chunks.last_mut() {
            Some(chunk) => {
                gpu.write(&mut chunk.k, 0, k)?;
                gpu.write(&mut chunk.v, 0, v)
            }
            None => Ok(()),
        })
    }

    fn select(
        &self,
        gpu: &Gpu<D>,
        probes: &Probes<'_, Buffer<D>>,
        selection: &Selection<'_>,
    ) -> Result<Blocks<D>> {
        super::retrieval::select(gpu, self, probes, selection)
    }

    fn gather(
        &self,
        gpu: &Gpu<D>,
        blocks: &Blocks<D>,
        past: &PastHeads<'_>,
        tables: (&Buffer<D>, &Buffer<D>),
        kv: [RowsMut<'_, Buffer<D>>; 2],
    ) -> Result<()> {
        super::retrieval::gather(gpu, self, blocks, past, tables, kv)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::memory::Place;
    use super::super::pool::Chunk;
    use super::super::{DryRun, bytes_of};
    use super::*;
    use crate::cuda::kernels::KernelMetadata;
    use crate::device::Kind;

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
        let mut pool = Pool::new(&gpu, heads, dim, run);
        for on_device in [[1, 1], [2, 2], [3, 2], [4, 1], [5, 0], [5, 0], [5, 0]] {
            pool.append(&gpu, &[0, 1], [rows; 2], run).expect("a run");
            let here = |buffer: &Buffer<_>| usize::from(buffer.place() == Some(Place::Pool));
            let count = |f: fn(&Chunk<_>) -> &Buffer<_>| pool.chunks.iter().map(f).map(here).sum();
            let (keys, values): (usize, usize) = (count(|c| &c.k), count(|c| &c.v));
            assert_eq!([keys, values], on_device);
            // The oldest keys are those that stay.
            let keys = pool.chunks.iter().map(|c| here(&c.k));
            assert!(keys.is_sorted_by(|a, b| a >= b));
        }
    }
}
