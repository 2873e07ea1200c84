//! The report of a launch in which nothing goes on: which threads wait for what, and where.

use std::collections::BTreeMap;

use super::block::Block;
use super::thread::Wait;
use crate::checks::actors::Who;
use crate::checks::checker::Checker;
use crate::checks::report::Kind;
use crate::checks::symbols::Site;
use crate::instructions::units::Stuck;

/// Why a launch is ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// No thread can go on.
    Stuck,
    /// Some could, but the launch has reached a limit.
    Limit,
}

/// Reports what the threads of every resident block are doing.
pub(crate) fn report(blocks: &[Option<Block>], checker: &mut Checker, end: End) {
    let kind = |of_stuck| match end {
        End::Stuck => of_stuck,
        End::Limit => Kind::Endless,
    };
    for block in blocks.iter().flatten() {
        let mut groups = groups(block);
        let who = |id| Who {
            serial: block.serial,
            id,
        };
        for Stuck {
            waiting,
            missing,
            what,
        } in block.units.stuck()
        {
            let together = groups.remove(&block.threads[waiting as usize].wait);
            let (action, site) = state(block, waiting, end);
            let side = (who(waiting), &*action, site);
            match missing {
                Some(missing) => {
                    let (other_action, other_site) = state(block, missing, end);
                    let other = (who(missing), &*other_action, other_site);
                    let place = together.map_or(String::new(), |threads| ranges(&threads));
                    checker.report_pair(kind(Kind::Divergence), side, place, other);
                }
                None => checker.report(kind(Kind::Deadlock), side, what),
            }
        }
        for threads in groups.values() {
            let (action, site) = state(block, threads[0], end);
            let side = (who(threads[0]), &*action, site);
            checker.report(kind(Kind::Deadlock), side, ranges(threads));
        }
    }
}

/// The threads of a block that have not ended, by what they wait for.
fn groups(block: &Block) -> BTreeMap<Option<Wait>, Vec<u16>> {
    let mut groups: BTreeMap<Option<Wait>, Vec<u16>> = BTreeMap::new();
    for (id, thread) in block.threads.iter().enumerate() {
        if !thread.finished {
            groups.entry(thread.wait).or_default().push(id as u16);
        }
    }
    groups
}

/// "threads 0-31, 64 of its block": which ones do the same.
fn ranges(threads: &[u16]) -> String {
    let mut words: Vec<String> = Vec::new();
    for run in threads.chunk_by(|a, b| a + 1 == *b) {
        words.push(match run {
            [only] => only.to_string(),
            _ => format!("{}-{}", run[0], run[run.len() - 1]),
        });
    }
    format!("threads {} of its block", words.join(", "))
}

/// What a thread is doing, and where.
fn state(block: &Block, thread: u16, end: End) -> (String, Site) {
    let thread = &block.threads[thread as usize];
    match thread.wait {
        _ if thread.finished => ("has ended".to_string(), Site::default()),
        Some(wait) if wait.spins => (format!("spins at {}", wait.what), wait.site),
        Some(wait) => {
            let verb = match end {
                End::Stuck => "waits for ever",
                End::Limit => "waits",
            };
            (format!("{verb} in {}", wait.what), wait.site)
        }
        None => ("can go on".to_string(), Site::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn threads_are_named_by_ranges() {
        let named = ranges(&[0, 1, 2, 7, 9, 10]);
        assert_eq!(named, "threads 0-2, 7, 9-10 of its block");
    }
}
