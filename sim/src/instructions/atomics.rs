//! Atomic operations on 32-bit words. How they order memory: [`crate::checks::happens_before`].

use super::context::Context;
use crate::checks::access::Access;
use crate::checks::happens_before::{Effect, Order};
use crate::checks::shadow::{ATOMIC, INITIALIZED, Mode};
use crate::checks::symbols::Site;

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

    fn effect(self) -> Effect {
        match self {
            Operation::Load => Effect::Load,
            Operation::Store => Effect::Store,
            _ => Effect::Update,
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

/// An atomic instruction but for its address.
#[derive(Clone, Copy)]
pub(crate) struct Atomic {
    pub operation: Operation,
    pub operand: u32,
    /// For compare-and-swap.
    pub compare: u32,
    pub order: Order,
}

impl Atomic {
    /// Executes it for the running thread; the value before, 0 for a store.
    pub fn execute(self, cx: &mut Context, address: usize, site: Site) -> u32 {
        let (operation, effect) = (self.operation, self.operation.effect());
        let read = Access {
            flags: ATOMIC,
            ..Access::new(address, 4, Mode::Read, operation.action())
        };
        if effect != Effect::Store && !cx.access(read, site) {
            return 0;
        }
        let write = Access {
            flags: ATOMIC | INITIALIZED,
            mode: Mode::Write,
            ..read
        };
        if effect != Effect::Load && !cx.access(write, site) {
            return 0;
        }
        let pointer = address as *mut u32;
        // SAFETY: inside a buffer or shared memory (checked above, or unchecked as on hardware); one OS thread.
        let old = unsafe { pointer.read_unaligned() };
        // SAFETY: as above.
        unsafe { pointer.write_unaligned(operation.apply(old, self.operand, self.compare)) };
        let who = cx.who(cx.thread);
        let thread = &mut cx.clocks[who.id as usize];
        cx.checker
            .synchronize(who, thread, address, effect, self.order);
        match effect {
            Effect::Store => 0,
            _ => old,
        }
    }
}

/// A fence of the running thread; one of block scope orders nothing between blocks.
pub(crate) fn fence(cx: &mut Context, device: bool) {
    if device && cx.checker.enabled() {
        let id = cx.thread;
        cx.own_clocks().fence(id);
    }
}
