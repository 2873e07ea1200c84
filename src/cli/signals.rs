//! Signals that end a run: the first is noted and the run stops at a place from which it can go on, a second ends the
//! process at once.

use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Whether there is nothing to stop: the first signal ends the process then.
static IDLE: AtomicBool = AtomicBool::new(false);

/// Notes Ctrl-C, and on Unix SIGTERM and SIGHUP, from now on. A signal that the process was started to ignore
/// (`nohup` ignores SIGHUP, a shell's background job SIGINT) stays ignored. `said` is printed at the first one.
pub fn note_interrupts(said: Option<&'static str>) {
    let ignored = ignored();
    let noted = ctrlc::set_handler(move || {
        if INTERRUPTED.swap(true, Ordering::SeqCst) || IDLE.load(Ordering::SeqCst) {
            std::process::exit(130);
        }
        if let Some(said) = said {
            use std::io::Write;
            // Nobody may be there to read it.
            let _ = writeln!(std::io::stderr(), "\n{said}");
        }
    });
    if noted.is_ok() {
        ignore(&ignored);
    }
}

/// Lets a write beyond the limit of files' sizes (`ulimit -f`) fail, as on a full disk, where the signal for it would
/// end the process.
pub fn let_large_writes_fail() {
    #[cfg(unix)]
    ignore(&[libc::SIGXFSZ]);
}

/// Whether such a signal has come.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Says that there is nothing to stop, or that there is again; a signal of before is forgotten.
pub fn idle(idle: bool) {
    INTERRUPTED.store(false, Ordering::SeqCst);
    IDLE.store(idle, Ordering::SeqCst);
}

/// The flag that is set then.
pub fn flag() -> &'static AtomicBool {
    &INTERRUPTED
}

/// Those of the signals that are ignored now.
#[cfg(unix)]
fn ignored() -> Vec<libc::c_int> {
    let is_ignored = |signal: &libc::c_int| {
        // SAFETY: all zeros is a valid value of this plain C struct.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: without a new action the call only writes the present one to `action`.
        let asked = unsafe { libc::sigaction(*signal, std::ptr::null(), &mut action) };
        asked == 0 && action.sa_sigaction == libc::SIG_IGN
    };
    let all = [libc::SIGHUP, libc::SIGINT, libc::SIGTERM];
    all.into_iter().filter(is_ignored).collect()
}

#[cfg(unix)]
fn ignore(signals: &[libc::c_int]) {
    for signal in signals {
        // SAFETY: the signals are valid ones, and ignoring them runs no code.
        unsafe { libc::signal(*signal, libc::SIG_IGN) };
    }
}

#[cfg(not(unix))]
fn ignored() {}

#[cfg(not(unix))]
fn ignore(_: &()) {}
