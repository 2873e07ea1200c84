//! setmaxnreg: a block's registers, which its warpgroups hand to each other.
//!
//! A block is launched with the registers that its number of threads allows when it has the multiprocessor to itself
//! (`__launch_bounds__(threads, 1)`); what one warpgroup gives back another may take, and a warp that takes more than
//! the block has free waits until there is enough: for ever, unless another gives it back. Warps that end keep theirs.

use super::collective::Meeting;
use super::context::Context;
use crate::checks::report::Kind;

/// Registers of a multiprocessor, and the most a thread begins with.
const ALL: u32 = 65536;
const MOST: u32 = 248;

/// Who has how many of a block's registers.
pub(crate) struct Registers {
    free: u32,
    warps: Vec<Warp>,
    /// Warps that wait, and the registers of a thread they want.
    waiting: Vec<(usize, u32)>,
}

/// Registers of a warp's threads: now, and after each change so far.
struct Warp {
    each: u32,
    changes: Vec<u32>,
}

impl Registers {
    pub fn new(threads: usize) -> Registers {
        let each = (ALL / threads as u32 / 8 * 8).min(MOST);
        let warp = |_| Warp {
            each,
            changes: Vec::new(),
        };
        Registers {
            free: 0,
            warps: (0..threads.div_ceil(32)).map(warp).collect(),
            waiting: Vec::new(),
        }
    }

    /// The warp's threads have `each` registers from here on, if the block has so many.
    fn try_change(&mut self, warp: usize, each: u32) -> bool {
        let (now, wanted) = (self.warps[warp].each * 32, each * 32);
        if wanted > now + self.free {
            return false;
        }
        self.free = self.free + now - wanted;
        self.warps[warp].each = each;
        true
    }

    /// Serves those that wait as far as it goes, in the order they came; returns the warps that may go on.
    fn serve(&mut self) -> Vec<usize> {
        let mut waiting = std::mem::take(&mut self.waiting);
        let served = waiting.extract_if(.., |&mut (warp, each)| self.try_change(warp, each));
        let served = served.map(|(warp, _)| warp).collect();
        self.waiting = waiting;
        served
    }

    /// Whether the warps of one warpgroup have made different changes, one of them perhaps none yet.
    fn differ(&self, warpgroup: usize) -> bool {
        let warps = &self.warps[warpgroup * 4..][..4];
        let longest = warps.iter().max_by_key(|warp| warp.changes.len());
        longest.is_some_and(|longest| {
            let begins = |warp: &Warp| longest.changes.starts_with(&warp.changes);
            !warps.iter().all(begins)
        })
    }

    /// setmaxnreg.inc (`take`) or .dec by a warp, to `each` registers a thread. False if its lanes must wait.
    pub fn set(
        &mut self,
        cx: &mut Context,
        warp: usize,
        each: u32,
        take: bool,
        meeting: &Meeting,
    ) -> bool {
        let (thread, site) = meeting.first(warp);
        let name = meeting.op.name();
        if let Some(place) = self.wrong(cx.actors.threads(), warp, each, take) {
            cx.report_by(Kind::Operand, thread, name, site, place);
            cx.checker.stop();
            return true;
        }
        self.warps[warp].changes.push(each);
        if self.differ(warp / 4) {
            let place = format!("to {each} registers, where another warp of its warpgroup did not");
            cx.report_by(Kind::Divergence, thread, name, site, place);
        }
        if !self.try_change(warp, each) {
            self.waiting.push((warp, each));
            return false;
        }
        for warp in self.serve() {
            (warp * 32..warp * 32 + 32).for_each(|thread| cx.wake(thread as u16));
        }
        true
    }

    /// What the hardware or the assembler would refuse, or do nobody knows what with.
    fn wrong(&self, threads: usize, warp: usize, each: u32, take: bool) -> Option<String> {
        let now = self.warps[warp].each;
        if (warp / 4 * 4 + 4) * 32 > threads {
            Some("needs a whole warpgroup".to_string())
        } else if !each.is_multiple_of(8) || !(24..=256).contains(&each) {
            Some(format!(
                "to {each} registers: multiples of 8 from 24 to 256"
            ))
        } else if if take { each < now } else { each > now } {
            let than = if take { "fewer" } else { "more" };
            Some(format!("to {each} registers, {than} than the {now} it has"))
        } else {
            None
        }
    }

    /// The first threads of the warps that wait for registers, and for how many.
    pub fn stuck(&self) -> Vec<(u16, String)> {
        let free = self.free;
        let waits = |&(warp, each): &(usize, u32)| {
            let more = (each - self.warps[warp].each) * 32;
            let place = format!("for {more} more registers, of which the block has {free} free");
            ((warp * 32) as u16, place)
        };
        self.waiting.iter().map(waits).collect()
    }

    /// Reports warpgroups of a block at its end of which not every warp made every change.
    pub fn check_at_end(&self, cx: &mut Context) {
        let changes = |warp: usize| self.warps[warp].changes.len();
        let whole = self.warps.len() / 4 * 4;
        let fewer = (0..whole).find(|&warp| {
            let first = warp / 4 * 4;
            (first..first + 4).any(|other| changes(other) > changes(warp))
        });
        if let Some(warp) = fewer {
            let place = "that another warp of its warpgroup executed".to_string();
            let action = "ended without a setmaxnreg";
            let (thread, site) = ((warp * 32) as u16, Default::default());
            cx.report_by(Kind::Divergence, thread, action, site, place);
        }
    }
}
