//! The host's description of a step's rows in device memory. Tables are uploaded once per step. The values of attention
//! calls are uploaded only when they change. Addresses stay the same, so that a recorded step can be replayed.
//!
//! Kernels use these indices without checks, and so does a replay. So each call notes the bound of its indices
//! ([`Step::relies_on`]), and later rows of the step must stay below it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::bounds::{below, equal, int};
use super::memory::Block;
use super::{Driver, Gpu};
use crate::device::shared::spans::SpanBatch;
use crate::device::{DeviceError, Result, SlotSpan, StepRows};

/// Columns of indices of a step, by the table that they index.
#[derive(Debug, Clone, Copy)]
pub(super) enum Column {
    /// Rows of the embedding table.
    Tokens,
    /// Rows of the angle tables.
    Angles,
    /// Rows of the slots.
    CacheRows,
    /// Rows of the probes.
    ProbeRows,
}

const COLUMNS: [Column; 4] = [
    Column::Tokens,
    Column::Angles,
    Column::CacheRows,
    Column::ProbeRows,
];

impl Column {
    fn name(self) -> &'static str {
        match self {
            Column::Tokens => "token",
            Column::Angles => "angle",
            Column::CacheRows => "cache row",
            Column::ProbeRows => "probe row",
        }
    }

    /// The largest number.
    fn largest(self, rows: &StepRows) -> Option<usize> {
        match self {
            Column::Tokens => rows.tokens.iter().map(|t| *t as usize).max(),
            Column::Angles => rows.angles.iter().copied().max(),
            Column::CacheRows => rows.cache_rows.iter().copied().max(),
            Column::ProbeRows => rows.probe_rows.iter().copied().flatten().max(),
        }
    }
}

/// A step's rows on the device.
#[derive(Debug)]
pub struct Step<D: Driver> {
    pub(super) rows: StepRows,
    /// i32: `[rows]` tokens, angles, cache rows and probe rows (-1: none); `[spans]` lengths and starts of segments;
    /// `[spans + 1]` rows before each span, and at last of all.
    tables: Block<D>,
    /// For each column, the bound that earlier calls rely on.
    limits: [AtomicUsize; COLUMNS.len()],
    /// Values of each attention call, by its number.
    values: BTreeMap<usize, Values<D>>,
}

/// The values of an attention call, and their device memory.
#[derive(Debug)]
struct Values<D: Driver> {
    block: Block<D>,
    /// The geometry they were checked against.
    geometry: Vec<u64>,
    bytes: Vec<u8>,
}

impl<D: Driver> Step<D> {
    pub(super) fn new(gpu: &Gpu<D>, rows: StepRows) -> Result<Self> {
        check(&rows)?;
        Ok(Self {
            tables: gpu.upload(&tables(&rows))?,
            rows,
            limits: COLUMNS.map(|_| AtomicUsize::new(usize::MAX)),
            values: BTreeMap::new(),
        })
    }

    pub(super) fn renew(&mut self, gpu: &Gpu<D>, rows: StepRows) -> Result<()> {
        check(&rows)?;
        equal("rows of a step", self.rows.tokens.len(), rows.tokens.len())?;
        equal("reach of a step", self.rows.reach, rows.reach)?;
        let shape = |rows: &StepRows| -> Vec<_> {
            let shape = |span: &SlotSpan| (span.row, span.rows);
            rows.spans.iter().map(shape).collect()
        };
        let (expected, got) = (shape(&self.rows), shape(&rows));
        if expected != got {
            let [expected, got] = [expected, got].map(|spans| format!("{spans:?}"));
            return Err(DeviceError::argument("rows of spans", expected, got));
        }
        for column in COLUMNS {
            let limit = self.limits[column as usize].load(Ordering::Relaxed);
            below(column.name(), column.largest(&rows), limit)?;
        }
        let at = gpu.at(&self.tables)?;
        // SAFETY: the block holds as many numbers, and is the step's.
        unsafe {
            gpu.driver()
                .upload(at, bytemuck::cast_slice(&tables(&rows)))?
        };
        self.rows = rows;
        Ok(())
    }

    /// Checks that the indices of a column are below `end`, now and in later rows of this step.
    pub(super) fn relies_on(&self, column: Column, end: usize) -> Result<()> {
        below(column.name(), column.largest(&self.rows), end)?;
        self.limits[column as usize].fetch_min(end, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn tokens(&self, gpu: &Gpu<D>) -> Result<*const u32> {
        Ok(self.table(gpu, 0)?.cast())
    }

    pub(super) fn angles(&self, gpu: &Gpu<D>) -> Result<*const i32> {
        self.table(gpu, 1)
    }

    pub(super) fn cache_rows(&self, gpu: &Gpu<D>) -> Result<*const i32> {
        self.table(gpu, 2)
    }

    pub(super) fn probe_rows(&self, gpu: &Gpu<D>) -> Result<*const i32> {
        self.table(gpu, 3)
    }

    /// Addresses of the lengths of segments and of the spans' starts.
    pub(super) fn lengths(&self, gpu: &Gpu<D>) -> Result<[u64; 2]> {
        let first = self.table(gpu, 4)?;
        Ok([first, first.wrapping_add(self.rows.spans.len())].map(|at| at as u64))
    }

    /// Address of the first row of each span.
    pub(super) fn span_starts(&self, gpu: &Gpu<D>) -> Result<*const i32> {
        let first = self.table(gpu, 4)?;
        Ok(first.wrapping_add(2 * self.rows.spans.len()))
    }

    fn table(&self, gpu: &Gpu<D>, number: usize) -> Result<*const i32> {
        let tables = gpu.at(&self.tables)? as usize as *const i32;
        Ok(tables.wrapping_add(number * self.rows.tokens.len()))
    }

    /// Address of the values of an attention call. They are uploaded if they have changed.
    ///
    /// `geometry` is what they were checked against. Values with another geometry get memory of their own, so that a
    /// recorded call never reads values that were checked against other memory.
    pub(super) fn place_values(
        &mut self,
        gpu: &Gpu<D>,
        number: usize,
        geometry: Vec<u64>,
        bytes: &[u8],
    ) -> Result<u64> {
        let fits =
            |old: &&mut Values<D>| old.geometry == geometry && old.bytes.len() == bytes.len();
        if let Some(old) = self.values.get_mut(&number).filter(fits) {
            let at = gpu.at(&old.block)?;
            if old.bytes != bytes {
                // SAFETY: the block holds as many bytes, and is the step's.
                unsafe { gpu.driver().upload(at, bytes)? };
                old.bytes.copy_from_slice(bytes);
            }
            return Ok(at);
        }
        let new = Values {
            block: gpu.upload(bytes)?,
            geometry,
            bytes: bytes.to_vec(),
        };
        let at = gpu.at(&new.block)?;
        self.values.insert(number, new);
        Ok(at)
    }
}

impl<D: Driver> AsRef<StepRows> for Step<D> {
    fn as_ref(&self) -> &StepRows {
        &self.rows
    }
}

/// Checks that all columns have one length, that indices fit in i32, and that spans are in range.
fn check(rows: &StepRows) -> Result<()> {
    let count = rows.tokens.len();
    equal("angles of a step", count, rows.angles.len())?;
    equal("cache rows of a step", count, rows.cache_rows.len())?;
    equal("probe rows of a step", count, rows.probe_rows.len())?;
    for column in [Column::Angles, Column::CacheRows, Column::ProbeRows] {
        int(column.name(), column.largest(rows).unwrap_or(0))?;
    }
    int("reach of a step", rows.reach)?;
    int("rows of a step", count)?;
    for span in &rows.spans {
        let end = |start: usize| start.checked_add(span.rows);
        let inside = end(span.row).is_some_and(|end| end <= count)
            && end(span.start).is_some_and(|end| end <= rows.reach);
        if !inside {
            let expected = format!("rows below {count}, positions below {}", rows.reach);
            return Err(DeviceError::argument("span", expected, format!("{span:?}")));
        }
    }
    Ok(())
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
        numbers(SpanBatch::of(spans).offsets()),
    ]
    .concat()
}
