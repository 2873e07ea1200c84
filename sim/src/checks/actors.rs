//! Who acts in a launch: the threads of a block and its asynchronous agents. Each is one entry of a vector clock.

/// Bulk copies of a block that have clock entries of their own; more copies than that share them in turn.
const COPY_SLOTS: usize = 16;

/// The actors of a block by index: its threads, its bulk copies, the tensor core of each warp.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Actors {
    threads: usize,
}

impl Actors {
    /// The actors of a block of so many threads.
    pub fn new(threads: usize) -> Actors {
        Actors { threads }
    }

    /// Threads of the block.
    pub fn threads(self) -> usize {
        self.threads
    }

    /// Entries of a clock.
    pub fn count(self) -> usize {
        self.threads + COPY_SLOTS + self.threads.div_ceil(32)
    }

    /// The agent that carries out the block's bulk copy number `serial`.
    pub fn bulk_copy(self, serial: u64) -> u16 {
        (self.threads + serial as usize % COPY_SLOTS) as u16
    }

    /// The agent that is the warp's tensor core.
    pub fn tensor_core(self, warp: usize) -> u16 {
        (self.threads + COPY_SLOTS + warp) as u16
    }

    /// Whether an actor is an asynchronous agent, which goes through the async proxy.
    #[inline]
    pub fn is_agent(self, id: u16) -> bool {
        id as usize >= self.threads
    }
}

/// An actor of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Who {
    /// The block, counted over all launches.
    pub serial: u32,
    /// Its index among the block's actors.
    pub id: u16,
}

/// The actors of a launch in words.
pub(crate) struct Names {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Serial number of the launch's first block.
    pub first_block: u32,
}

impl Names {
    /// "thread (3,0,0) of block (1,0,0)" and the like.
    pub fn of(&self, who: Who) -> String {
        let threads = self.block.iter().product::<u32>() as usize;
        let agent = (who.id as usize).checked_sub(threads);
        let [x, y, z] = unravel(u32::from(who.id), self.block);
        let [i, j, k] = unravel(who.serial.wrapping_sub(self.first_block), self.grid);
        match agent {
            None => format!("thread ({x},{y},{z}) of block ({i},{j},{k})"),
            Some(slot) if slot < COPY_SLOTS => format!("a bulk copy of block ({i},{j},{k})"),
            Some(agent) => format!(
                "wgmma of warp {} of block ({i},{j},{k})",
                agent - COPY_SLOTS
            ),
        }
    }
}

/// Index in three dimensions of the `linear`-th element, the first dimension fastest.
pub(crate) fn unravel(linear: u32, dims: [u32; 3]) -> [u32; 3] {
    let [x, y, _] = dims.map(|dim| dim.max(1));
    [linear % x, linear / x % y, linear / x / y]
}
