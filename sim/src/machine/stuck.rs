//! The report of a launch in which nothing can go on: who waits for whom, and where.

use super::block::Block;
use crate::checks::actors::Who;
use crate::checks::checker::Checker;
use crate::checks::report::Kind;
use crate::checks::symbols::Site;
use crate::instructions::units::Stuck;

/// Reports who waits for whom in every resident block.
pub(crate) fn report(blocks: &[Option<Block>], checker: &mut Checker) {
    for block in blocks.iter().flatten() {
        let mut stuck = block.units.stuck();
        if stuck.is_empty() {
            let waiting = block.threads.iter().position(|thread| !thread.finished);
            stuck.extend(waiting.map(|thread| Stuck::Thread(thread as u16, None)));
        }
        for stuck in stuck {
            report_one(block, checker, stuck);
        }
    }
}

fn report_one(block: &Block, checker: &mut Checker, stuck: Stuck) {
    let who = |id| Who {
        serial: block.serial,
        id,
    };
    match stuck {
        Stuck::Registers(thread, place) => {
            let (action, site) = state(block, thread);
            checker.report(Kind::Deadlock, (who(thread), &action, site), place);
        }
        Stuck::Thread(waiting, None) => {
            let (action, site) = state(block, waiting);
            let side = (who(waiting), &*action, site);
            checker.report(Kind::Deadlock, side, String::new());
        }
        Stuck::Thread(waiting, Some(missing)) => {
            let (action, site) = state(block, waiting);
            let (other_action, other_site) = state(block, missing);
            let side = (who(waiting), &*action, site);
            let other = (who(missing), &*other_action, other_site);
            checker.report_pair(Kind::Divergence, side, other);
        }
    }
}

/// What a thread is doing that cannot go on.
fn state(block: &Block, thread: u16) -> (String, Site) {
    let thread = &block.threads[thread as usize];
    match (&thread.wait, thread.finished) {
        (_, true) => ("has ended".to_string(), Site::default()),
        (Some(wait), false) => (format!("waits for ever in {}", wait.what), wait.site),
        (None, false) => ("spins for ever".to_string(), Site::default()),
    }
}
