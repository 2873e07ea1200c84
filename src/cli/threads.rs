//! How many threads compute: as many as asked for, or as many as can be had.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, mpsc};

use anyhow::Result;

/// Threads for each core, at most; more only cost memory.
const PER_CORE: usize = 4;
/// Left for what is no computing: signals, progress bars.
const OTHERS: usize = 1;

/// Starts the threads that compute. Where not all can be had, fewer do; without any, the calling one computes.
pub fn start(wanted: Option<NonZeroUsize>) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let named = std::env::var("RAYON_NUM_THREADS").ok();
    let named = named
        .and_then(|count| count.parse::<usize>().ok())
        .filter(|n| *n > 0);
    let count = match (wanted, named) {
        (Some(wanted), _) => wanted.get().min(PER_CORE.saturating_mul(cores)),
        (None, Some(named)) => named.min(PER_CORE.saturating_mul(cores)),
        (None, None) => cores,
    };
    let free = probe(count + OTHERS).saturating_sub(OTHERS);
    let builder = rayon::ThreadPoolBuilder::new();
    if free == 0 {
        tracing::warn!("no thread can be started; the program computes on one");
        builder.num_threads(1).use_current_thread().build_global()?;
        return Ok(());
    }
    if free < wanted.map_or(count, usize::from) {
        tracing::warn!("computing with {free} threads");
    }
    builder.num_threads(free).build_global()?;
    Ok(())
}

/// How many of `count` threads can be there at once. The pool of all the program's computing can be started only once,
/// so this is found out before.
fn probe(count: usize) -> usize {
    let mut started = Vec::new();
    let (hold, held) = mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    for _ in 0..count {
        let held = held.clone();
        // Each waits until the sender is gone.
        let wait = move || drop(held.lock().map(|held| held.recv()));
        match std::thread::Builder::new().spawn(wait) {
            Ok(thread) => started.push(thread),
            Err(_) => break,
        }
    }
    drop(hold);
    let count = started.len();
    for thread in started {
        // A thread that only waits does not panic.
        let _ = thread.join();
    }
    count
}
