//! Plan of a run's memory, made by a dry run of the same code.

use std::sync::Arc;

use super::{Driver, DryRun, Gpu, MemoryUse};
use crate::cuda::kernels::{self, Kernels};
use crate::device::{DeviceError, HostMemory, OutOfMemory, Purpose};

/// Device memory that a plan leaves free: for kernels that are loaded during the run, and for the comparison of GEMM
/// algorithms.
const SPARE_BYTES: usize = 96 << 20;

/// Part of the pools that is in device memory. The rest is in pinned host memory. Results do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PoolPlacement {
    /// As much as the rest of the run leaves free.
    #[default]
    Auto,
    /// At most this many bytes: 0 for none, `usize::MAX` for all.
    AtMost(usize),
}

/// Memory that a run needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Memory use of the dry run.
    pub planned: MemoryUse,
    /// Argument of [`Gpu::limit_pool`].
    pub pool_limit: usize,
}

impl MemoryPlan {
    /// Plans `run` on a GPU with these kernels and `free` bytes of device memory; `None`: unlimited memory.
    ///
    /// # Errors
    /// Those of the run.
    pub fn new<K: Kernels + Send + Sync, E>(
        kernels: &Arc<K>,
        pool: PoolPlacement,
        free: Option<usize>,
        run: impl Fn(Gpu<DryRun<K>>) -> Result<(), E>,
    ) -> Result<Self, E> {
        let with = |pool_limit| {
            let dry = Gpu::new(DryRun::new(kernels.clone(), None));
            dry.limit_pool(pool_limit);
            run(dry.clone())?;
            let planned = dry.memory_use();
            Ok(Self {
                planned,
                pool_limit,
            })
        };
        let plan = match pool {
            PoolPlacement::Auto => with(usize::MAX)?,
            PoolPlacement::AtMost(bytes) => with(bytes)?,
        };
        let room = free.map_or(usize::MAX, |free| free.saturating_sub(SPARE_BYTES));
        if pool == PoolPlacement::Auto && plan.device_bytes() > room {
            return with(room.saturating_sub(plan.planned.buffers.high_water));
        }
        Ok(plan)
    }

    /// Device memory of the run, in bytes.
    pub fn device_bytes(&self) -> usize {
        self.planned.buffers.high_water + self.planned.pool.high_water
    }

    /// Largest pinned host memory of the run, in bytes.
    pub fn host_bytes(&self) -> usize {
        self.planned.host.high_water
    }
}

impl<D: Driver> Gpu<D> {
    /// Makes a dry run of `run`, then allocates the device memory that it needs at once. `purpose` is the main purpose
    /// of that memory besides weights and pools. `kernels` are those of the driver.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if device or host have too little memory, and errors of the run or the driver.
    pub fn reserve_for<K: Kernels + Send + Sync, E: From<DeviceError>>(
        &self,
        kernels: &Arc<K>,
        pool: PoolPlacement,
        purpose: Purpose,
        run: impl Fn(Gpu<DryRun<K>>) -> Result<(), E>,
    ) -> Result<MemoryPlan, E> {
        let said = |error: kernels::Error| E::from(error.into());
        // A first dry run loads the kernels, which take memory too.
        let first = MemoryPlan::new(kernels, pool, None, &run)?;
        let free = self.driver().free_memory().map_err(said)?;
        let plan = match first.device_bytes().saturating_add(SPARE_BYTES) <= free {
            true => first,
            false => MemoryPlan::new(kernels, pool, Some(free), &run)?,
        };
        let out = if plan.device_bytes() > free {
            let pool_asks = plan.planned.buffers.high_water <= free;
            Some(OutOfMemory {
                free: Some(free),
                purpose: Some(if pool_asks { Purpose::Pool } else { purpose }),
                ..OutOfMemory::device(plan.device_bytes())
            })
        } else {
            let available = HostMemory::now().left();
            let short = available.filter(|bytes| plan.host_bytes() > *bytes);
            short.map(|free| OutOfMemory {
                free: Some(free),
                purpose: Some(Purpose::Pool),
                ..OutOfMemory::pinned(plan.host_bytes())
            })
        };
        if let Some(out) = out {
            return Err(DeviceError::from(out).into());
        }
        self.limit_pool(plan.pool_limit);
        self.reserve(&plan.planned)?;
        Ok(plan)
    }
}
