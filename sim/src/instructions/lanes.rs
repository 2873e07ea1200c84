//! What the lanes of a warp do among themselves: __syncwarp, shuffles, votes, ldmatrix and stmatrix.

use super::collective::{ALL, Meeting, Operands, lanes};
use super::context::Context;
use super::mma;
use crate::checks::access::Access;
use crate::checks::report::Kind;
use crate::checks::shadow::Mode;

/// __syncwarp orders memory among the lanes.
pub(crate) fn sync(cx: &mut Context, warp: usize, mask: u32) {
    if !cx.checker.enabled() {
        return;
    }
    let threads = &mut cx.clocks[warp * 32..];
    let mut joined = threads[mask.trailing_zeros() as usize].now.clone();
    lanes(mask).for_each(|lane| joined.join(&threads[lane].now));
    for lane in lanes(mask) {
        threads[lane].now.clone_from(&joined);
        threads[lane].now.local[warp * 32 + lane] += 1;
    }
}

/// __shfl_sync: each lane gets another's value.
pub(crate) fn shuffle(cx: &mut Context, warp: usize, meeting: &Meeting) {
    for lane in lanes(meeting.arrived) {
        let mine = meeting.operands[lane];
        // SAFETY: the lane waits in its call to sim_shuffle, where its operands live.
        let from = match unsafe { &*mine } {
            Operands::Shuffle { source, .. } => (*source & 31) as usize,
            _ => continue,
        };
        let mut value = ALL;
        if meeting.arrived & (1 << from) == 0 {
            let who = (warp * 32 + lane) as u16;
            let among = meeting.arrived;
            let place = format!("from lane {from}, which is not among the lanes {among:#010x}");
            cx.report_by(Kind::Divergence, who, "shuffle", meeting.sites[lane], place);
        // SAFETY: the source lane has arrived, so it waits in its own call to sim_shuffle.
        } else if let Operands::Shuffle { value: theirs, .. } = unsafe { &*meeting.operands[from] }
        {
            value = *theirs;
        }
        // SAFETY: as above; no other reference is held.
        if let Operands::Shuffle { result, .. } = unsafe { &mut *mine } {
            *result = value;
        }
    }
}

/// __ballot_sync: each lane gets the votes of all.
pub(crate) fn ballot(meeting: &Meeting) {
    let mut votes = 0u32;
    for round in 0..2 {
        for lane in lanes(meeting.arrived) {
            // SAFETY: the lane waits in its call to sim_ballot, where its operands live; one reference at a time.
            if let Operands::Ballot { predicate, result } = unsafe { &mut *meeting.operands[lane] }
            {
                match round {
                    0 => votes |= u32::from(*predicate) << lane,
                    _ => *result = votes,
                }
            }
        }
    }
}

/// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements, matrix i's rows at the addresses of lanes 8i..8i+8.
pub(crate) fn matrix(
    cx: &mut Context,
    warp: usize,
    meeting: &Meeting,
    count: u8,
    transpose: bool,
    mode: Mode,
) {
    let mut rows = [0usize; 32];
    let mut registers = [std::ptr::null_mut::<u32>(); 32];
    for lane in 0..32 {
        // SAFETY: aligned, so all 32 lanes wait in calls whose operands live.
        if let Operands::Matrix { registers: r, row } = unsafe { &*meeting.operands[lane] } {
            (rows[lane], registers[lane]) = (*row, *r);
        }
    }
    let name = meeting.op.name();
    for (lane, &row) in rows.iter().enumerate().take(count as usize * 8) {
        let (thread, site) = ((warp * 32 + lane) as u16, meeting.sites[lane]);
        let access = Access {
            alignment: 16,
            ..Access::new(row, 16, mode, name)
        };
        if cx.is_shared(row) {
            cx.access_as(thread, access, site);
        } else {
            cx.report_by(Kind::OutOfBounds, thread, name, site, cx.describe(row));
            cx.checker.stop();
        }
    }
    if !cx.checker.stopped() {
        let load = mode == Mode::Read;
        // SAFETY: every row lies in shared memory (or checks are off, as on hardware); registers live.
        unsafe { mma::move_matrices(&rows, &registers, count as usize, transpose, load) };
    }
}
