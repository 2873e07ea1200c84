//! Happens-before between threads by atomics and fences, by the rules of the C++ memory model.
//!
//! What a thread publishes by a release (or by a relaxed store after a fence) is known to whom reads it by an acquire
//! (or before a fence). The address of an atomic is a synchronisation variable with a vector clock of its own.

use std::collections::HashMap;

use super::actors::Who;
use super::clock::{Clock, Foreign};

/// What one thread knows to have happened.
pub(crate) struct ThreadClocks {
    /// What is ordered before the thread's next instruction.
    pub now: Clock,
    /// What the thread's relaxed loads saw; a fence makes it known.
    loaded: Clock,
    /// What the thread knew at its last fence; its relaxed stores publish it.
    fenced: Option<Clock>,
}

impl ThreadClocks {
    /// The clocks of a thread that begins as actor `id` of `actors`.
    pub fn new(actors: usize, id: usize) -> ThreadClocks {
        let mut now = Clock::new(actors);
        now.local[id] = 1;
        ThreadClocks {
            now,
            loaded: Clock::new(actors),
            fenced: None,
        }
    }

    /// A fence of device scope by the thread, actor `id` of its block.
    pub fn fence(&mut self, id: u16) {
        self.now.join(&self.loaded);
        self.fenced = Some(self.now.clone());
        self.now.local[id as usize] += 1;
    }
}

/// How an atomic operation orders memory.
#[derive(Clone, Copy)]
pub(crate) struct Order {
    pub acquire: bool,
    pub release: bool,
    /// Synchronises with other blocks, not only its own.
    pub device: bool,
}

/// What an atomic operation does to its location.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Load,
    Store,
    /// Reads and writes in one step, and so continues the release sequence of what it read.
    Update,
}

/// What was published at the addresses of atomics, by address and block (0: to all).
#[derive(Default)]
pub(crate) struct SyncVariables(HashMap<(usize, u32), Foreign>);

impl SyncVariables {
    /// Passes knowledge between a thread and the location.
    pub fn synchronize(
        &mut self,
        who: Who,
        thread: &mut ThreadClocks,
        address: usize,
        effect: Effect,
        order: Order,
    ) {
        let key = (address, if order.device { 0 } else { who.serial });
        if effect != Effect::Store
            && let Some(published) = self.0.get(&key)
        {
            let into = if order.acquire {
                &mut thread.now
            } else {
                &mut thread.loaded
            };
            into.foreign.join(published);
            if let Some(own) = published.block(who.serial) {
                into.join_local(own);
            }
        }
        if effect == Effect::Load {
            return;
        }
        if effect == Effect::Store {
            self.0.remove(&key);
        }
        let source = if order.release {
            Some(thread.now.clone())
        } else {
            thread.fenced.clone()
        };
        if let Some(clock) = source {
            thread.now.local[who.id as usize] += 1;
            let published = self.0.entry(key).or_default();
            published.join_block(who.serial, &clock.local);
            published.join(&clock.foreign);
        }
    }
}
