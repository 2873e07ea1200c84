//! What a step's rows need of the host, in device memory: tables that are written once a step, and the values that
//! attention calls have been told, which are written again only when they change. So a step that is recorded finds all
//! of it at the same addresses when it is replayed.

use super::memory::Block;
use super::rows::pointer;
use super::{Driver, Gpu};
use crate::device::{Result, StepRows};

/// A step's rows on the device.
#[derive(Debug)]
pub struct Step<D: Driver> {
    pub(super) rows: StepRows,
    /// i32: `[rows]` tokens, angles, cache rows and probe rows (-1: none); `[spans]` lengths and starts of segments.
    tables: Block<D>,
    /// Of each attention call, by number, and of each of its launches.
    told: Vec<Vec<Told<D>>>,
}

/// The host's values of an attention launch, and where they lie.
#[derive(Debug)]
struct Told<D: Driver> {
    block: Block<D>,
    values: Vec<u8>,
}

impl<D: Driver> Step<D> {
    pub(super) fn new(gpu: &Gpu<D>, rows: StepRows) -> Result<Self> {
        Ok(Self {
            tables: gpu.upload(&tables(&rows))?,
            rows,
            told: Vec::new(),
        })
    }

    pub(super) fn renew(&mut self, gpu: &Gpu<D>, rows: StepRows) -> Result<()> {
        let counts = |rows: &StepRows| (rows.tokens.len(), rows.spans.len());
        assert_eq!(
            counts(&self.rows),
            counts(&rows),
            "as many rows and spans as before"
        );
        let tables = tables(&rows);
        // SAFETY: the block holds as many numbers, and is the step's.
        unsafe {
            gpu.driver()
                .upload(self.tables.address, bytemuck::cast_slice(&tables))?
        };
        self.rows = rows;
        Ok(())
    }

    pub(super) fn tokens(&self) -> *const u32 {
        pointer(&self.tables)
    }

    pub(super) fn angles(&self) -> *const i32 {
        self.table(1)
    }

    pub(super) fn cache_rows(&self) -> *const i32 {
        self.table(2)
    }

    pub(super) fn probe_rows(&self) -> *const i32 {
        self.table(3)
    }

    /// Addresses of the lengths of segments and of the spans' starts, from a span on.
    pub(super) fn lengths(&self, span: usize) -> [u64; 2] {
        let first = self.table(4).wrapping_add(span);
        [first, first.wrapping_add(self.rows.spans.len())].map(|at| at as u64)
    }

    fn table(&self, number: usize) -> *const i32 {
        pointer::<i32>(&self.tables).wrapping_add(number * self.rows.tokens.len())
    }

    /// Where these values of an attention call's launch lie on the device. They go there only if others do.
    pub(super) fn tell(
        &mut self,
        gpu: &Gpu<D>,
        [number, launch]: [usize; 2],
        values: &[u8],
    ) -> Result<u64> {
        if self.told.len() <= number {
            self.told.resize_with(number + 1, Vec::new);
        }
        let told = &mut self.told[number];
        match told.get_mut(launch) {
            Some(told) if told.values == values => {}
            Some(told) if told.values.len() == values.len() => {
                // SAFETY: the block holds as many bytes, and is the step's.
                unsafe { gpu.driver().upload(told.block.address, values)? };
                told.values.copy_from_slice(values);
            }
            _ => {
                told.truncate(launch);
                told.push(Told {
                    block: gpu.upload(values)?,
                    values: values.to_vec(),
                });
            }
        }
        Ok(told[launch].block.address)
    }
}

impl<D: Driver> AsRef<StepRows> for Step<D> {
    fn as_ref(&self) -> &StepRows {
        &self.rows
    }
}

fn tables(rows: &StepRows) -> Vec<i32> {
    let numbers = |of: &[usize]| of.iter().map(|n| *n as i32).collect::<Vec<_>>();
    let probes = rows.probe_rows.iter().map(|n| n.map_or(-1, |n| n as i32));
    let spans = &rows.spans;
    [
        rows.tokens.iter().map(|t| *t as i32).collect(),
        numbers(&rows.angles),
        numbers(&rows.cache_rows),
        probes.collect(),
        spans.iter().map(|s| (s.start + s.rows) as i32).collect(),
        spans.iter().map(|s| s.start as i32).collect(),
    ]
    .concat()
}
