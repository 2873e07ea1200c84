//! Atomic operations and fences, by the rules of the C++ memory model: what a thread publishes by a release
//! (or by a relaxed store after a fence) is known to whom reads it by an acquire (or before a fence).

use crate::checks::clock::Clock;
use crate::checks::report::Site;
use crate::checks::shadow::{ATOMIC, INITIALIZED};
use crate::instructions::access::{Access, Mode};
use crate::machine::launch::Launch;

/// An atomic operation; the numbers are those of `SimAtomic` in simulator.h.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Load,
    Store,
    Add,
    Min,
    Max,
    And,
    Or,
    Exchange,
    CompareAndSwap,
}

impl Operation {
    /// The operation of a number in simulator.h.
    pub fn from_number(number: i32) -> Option<Operation> {
        use Operation::*;
        let all = [
            Load,
            Store,
            Add,
            Min,
            Max,
            And,
            Or,
            Exchange,
            CompareAndSwap,
        ];
        all.get(usize::try_from(number).ok()?).copied()
    }

    fn apply(self, old: u32, operand: u32, compare: u32) -> u32 {
        match self {
            Operation::Load => old,
            Operation::Store | Operation::Exchange => operand,
            Operation::Add => old.wrapping_add(operand),
            Operation::Min => (old as i32).min(operand as i32) as u32,
            Operation::Max => (old as i32).max(operand as i32) as u32,
            Operation::And => old & operand,
            Operation::Or => old | operand,
            Operation::CompareAndSwap if old == compare => operand,
            Operation::CompareAndSwap => old,
        }
    }

    fn action(self) -> &'static str {
        match self {
            Operation::Load => "read atomically",
            Operation::Store => "stored atomically",
            _ => "updated atomically",
        }
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

impl Launch {
    /// One 32-bit atomic operation by the running thread; the value before.
    pub fn atomic(
        &mut self,
        operation: Operation,
        address: usize,
        operand: u32,
        compare: u32,
        order: Order,
        site: Site,
    ) -> u32 {
        let action = operation.action();
        let mut access = Access {
            flags: ATOMIC,
            ..Access::new(address, 4, Mode::Read, action)
        };
        if operation != Operation::Store && !self.access(access, site) {
            return 0;
        }
        if operation != Operation::Load {
            access = Access {
                flags: ATOMIC | INITIALIZED,
                mode: Mode::Write,
                ..access
            };
            if !self.access(access, site) {
                return 0;
            }
        }
        let pointer = address as *mut u32;
        // SAFETY: inside a buffer or shared memory (checked above, or unchecked as on hardware); one OS thread.
        let old = unsafe { pointer.read_unaligned() };
        // SAFETY: as above.
        unsafe { pointer.write_unaligned(operation.apply(old, operand, compare)) };
        if self.checks {
            self.synchronize(operation, address, order);
        }
        if operation == Operation::Store {
            0
        } else {
            old
        }
    }

    /// Passes knowledge between the running thread and the location.
    fn synchronize(&mut self, operation: Operation, address: usize, order: Order) {
        let serial = self.block().serial;
        let id = self.current.thread as usize;
        let key = (address, if order.device { 0 } else { serial });
        if operation != Operation::Store
            && let Some(published) = self.published.get(&key).cloned()
        {
            let thread = self.thread_mut();
            let into = if order.acquire {
                &mut thread.clock
            } else {
                &mut thread.loaded
            };
            into.foreign.join(&published);
            if let Some(own) = published.block(serial) {
                into.join(&Clock {
                    local: own.to_vec(),
                    ..Clock::default()
                });
            }
        }
        if operation == Operation::Load {
            return;
        }
        if operation == Operation::Store {
            self.published.remove(&key);
        }
        let thread = self.thread_mut();
        let source = if order.release {
            Some(thread.clock.clone())
        } else {
            thread.fenced.clone()
        };
        if let Some(clock) = source {
            thread.clock.local[id] += 1;
            let published = self.published.entry(key).or_default();
            published.join_block(serial, &clock.local);
            published.join(&clock.foreign);
        }
    }

    /// A fence of the running thread; one of block scope orders nothing between blocks.
    pub fn fence(&mut self, device: bool) {
        if !device || !self.checks {
            return;
        }
        let id = self.current.thread as usize;
        let thread = self.thread_mut();
        thread.clock.join(&thread.loaded);
        thread.fenced = Some(thread.clock.clone());
        thread.clock.local[id] += 1;
    }
}
