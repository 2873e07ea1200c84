//! When a launch counts as one that never ends.

/// After how much a launch is ended, with a report of who waits for what and where.
///
/// A step is a basic block of a kernel's code; giving control to a thread counts as [`Limits::STEPS_OF_A_TURN`] of
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Turns of threads that poll memory or a barrier while no other thread is woken or ends.
    pub idle_turns: u64,
    /// Steps of one thread that neither waits nor ends.
    pub turn_steps: u64,
    /// Steps of all threads of a launch.
    pub total_steps: u64,
}

impl Limits {
    /// What giving control to a thread costs, roughly, in steps.
    pub const STEPS_OF_A_TURN: u64 = 64;
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            idle_turns: 1 << 20,
            turn_steps: 1 << 30,
            total_steps: 1 << 34,
        }
    }
}
