//! wgmma: products of a warpgroup that read shared memory by descriptors and run on after they were issued.
//!
//! Each warp computes its own 16 of the 64 rows. Its tensor core is an actor with a clock of its own: it reads
//! through the async proxy, and what it read or holds is known to the warp only after the wait. Accumulators in
//! flight are poisoned in the kernel's own registers. Register operands of `a` are read when the product is issued,
//! so a change before the wait is not seen; a missing wgmma.fence before them is.

use crate::checks::clock::Clock;
use crate::checks::report::{Kind, Site};
use crate::instructions::access::{Access, Mode};
use crate::instructions::bulk::COPY_SLOTS;
use crate::instructions::warp::{Meeting, Operands, lanes};
use crate::machine::block::actors;
use crate::machine::launch::Launch;

/// Flags of sim_wgmma; see simulator.h.
const BF16: u32 = 1;
const ACCUMULATE: u32 = 2;
const A_MN_MAJOR: u32 = 4;
const B_MN_MAJOR: u32 = 8;
/// Depth of one product.
const K: usize = 16;
/// What registers hold while a product writes them: a NaN no arithmetic makes.
const IN_FLIGHT: u32 = 0x7fc5_e6a7;

/// The shape and operands of one product, the same in all lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Product {
    pub n: u32,
    pub flags: u32,
    pub a_in_registers: bool,
    pub a: u64,
    pub b: u64,
}

/// Accumulators of one lane that a product is writing.
struct Accumulator {
    lane: usize,
    registers: *mut f32,
    values: Vec<f32>,
    /// The group it is last written by.
    group: usize,
}

/// What a warp's tensor core is doing.
#[derive(Default)]
pub(crate) struct Wgmma {
    clock: Clock,
    ticks: u32,
    in_flight: Vec<Accumulator>,
    /// Clock at each commit.
    groups: Vec<u32>,
    /// A fence was executed, ever; and since the last wait.
    fenced: bool,
    fenced_since_wait: bool,
    /// Accumulators handed back and not fenced since.
    returned: Vec<usize>,
}

impl Launch {
    /// The actor that is the warp's tensor core.
    fn tensor_core(&self, warp: usize) -> usize {
        self.block().threads.len() + COPY_SLOTS + warp
    }

    fn wgmma_report(&mut self, kind: Kind, warp: usize, meeting: &Meeting, place: &str) {
        let lane = meeting.arrived.trailing_zeros() as usize;
        self.report_by(
            kind,
            (warp * 32 + lane) as u16,
            meeting.op.name(),
            meeting.sites[lane],
            place.to_string(),
        );
    }

    /// wgmma.fence by a warp.
    pub fn wgmma_fence(&mut self, warp: usize) {
        let state = &mut self.block_mut().warps[warp].wgmma;
        (state.fenced, state.fenced_since_wait) = (true, true);
        state.returned.clear();
    }

    /// wgmma.commit_group by a warp.
    pub fn wgmma_commit(&mut self, warp: usize) {
        let state = &mut self.block_mut().warps[warp].wgmma;
        state.groups.push(state.ticks);
    }

    /// wgmma.wait_group by a warp: the older groups' accumulators are the kernel's again.
    pub fn wgmma_wait(&mut self, warp: usize, newest_left: u32, meeting: &Meeting) {
        let agent = self.tensor_core(warp);
        let block = self.block_mut();
        let state = &mut block.warps[warp].wgmma;
        state.fenced_since_wait = false;
        let done = state.groups.len().saturating_sub(newest_left as usize);
        let Some(&tick) = done.checked_sub(1).and_then(|last| state.groups.get(last)) else {
            return;
        };
        for lane in lanes(meeting.arrived) {
            let known = &mut block.threads[warp * 32 + lane].clock.local[agent];
            *known = (*known).max(tick);
        }
        let (ended, going) = std::mem::take(&mut state.in_flight)
            .into_iter()
            .partition(|acc| acc.group < done);
        state.in_flight = going;
        let ended: Vec<Accumulator> = ended;
        let mut disturbed = false;
        for accumulator in &ended {
            state.returned.push(accumulator.registers as usize);
            // SAFETY: the registers are a local array of a lane that waits in this very call.
            unsafe {
                disturbed |= !intact(accumulator);
                let (from, count) = (accumulator.values.as_ptr(), accumulator.values.len());
                std::ptr::copy_nonoverlapping(from, accumulator.registers, count);
            }
        }
        if disturbed {
            self.wgmma_report(
                Kind::Wgmma,
                warp,
                meeting,
                "accumulators were written while in flight",
            );
        }
    }

    /// One product by a warp.
    pub fn wgmma(&mut self, warp: usize, product: Product, meeting: &Meeting) {
        let whole = (warp / 4 * 4 + 4) * 32 <= self.block().threads.len();
        let swizzled = |descriptor: u64| descriptor >> 62 == 1;
        let descriptors = (product.a_in_registers || swizzled(product.a)) && swizzled(product.b);
        if !whole || !product.n.is_multiple_of(8) || !(8..=256).contains(&product.n) || !descriptors
        {
            let place =
                "needs a whole warpgroup, n a multiple of 8 up to 256, swizzles of 128 bytes";
            self.wgmma_report(Kind::Operand, warp, meeting, place);
            self.fatal = true;
            return;
        }
        self.stats.products += 1;
        self.check_fence(warp, product, meeting);
        let clock = self.start_product(warp, meeting);
        let site = meeting.sites[meeting.arrived.trailing_zeros() as usize];
        let a = match product.a_in_registers {
            true => registers_of_a(meeting, product.flags & BF16 != 0),
            false => {
                let mn_major = product.flags & A_MN_MAJOR != 0;
                let rows = warp % 4 * 16..warp % 4 * 16 + 16;
                self.operand(warp, &clock, product, product.a, rows, mn_major, site)
            }
        };
        let columns = 0..product.n as usize;
        let b = self.operand(
            warp,
            &clock,
            product,
            product.b,
            columns,
            product.flags & B_MN_MAJOR != 0,
            site,
        );
        self.block_mut().warps[warp].wgmma.clock = clock;
        if !self.fatal {
            self.accumulate(warp, product, meeting, &a, &b);
        }
    }

    fn check_fence(&mut self, warp: usize, product: Product, meeting: &Meeting) {
        let state = &self.block().warps[warp].wgmma;
        let returned = lanes(meeting.arrived).any(|lane| {
            // SAFETY: the lane waits in its call to sim_wgmma, where its operands live.
            let operands = unsafe { &*meeting.operands[lane] };
            matches!(operands, Operands::Wgmma { d, .. } if state.returned.contains(&(*d as usize)))
        });
        if !state.fenced || returned || (product.a_in_registers && !state.fenced_since_wait) {
            self.wgmma_report(
                Kind::Wgmma,
                warp,
                meeting,
                "with no wgmma.fence since its registers were last free",
            );
        }
    }

    /// A new tick of the tensor core, which knows what the warp's lanes know.
    fn start_product(&mut self, warp: usize, meeting: &Meeting) -> Clock {
        let agent = self.tensor_core(warp);
        let block = self.block_mut();
        let state = &mut block.warps[warp].wgmma;
        let mut clock = std::mem::take(&mut state.clock);
        if clock.local.is_empty() {
            clock = Clock::new(actors(block.threads.len()));
        }
        state.ticks += 1;
        for lane in lanes(meeting.arrived) {
            let id = warp * 32 + lane;
            clock.join(&block.threads[id].clock);
            block.threads[id].clock.local[id] += 1;
        }
        clock.local[agent] = state.ticks;
        clock
    }

    /// Rows of a shared-memory operand, each with its K values.
    #[allow(clippy::too_many_arguments)]
    fn operand(
        &mut self,
        warp: usize,
        clock: &Clock,
        product: Product,
        descriptor: u64,
        rows: std::ops::Range<usize>,
        mn_major: bool,
        site: Site,
    ) -> Vec<[f32; K]> {
        let field = |shift: u64| ((descriptor >> shift & 0x3fff) << 4) as usize;
        let (start, leading, stride) = (field(0), field(16), field(32));
        let base = self.block().shared.base;
        let first = rows.start;
        let mut values = vec![[0f32; K]; rows.len()];
        // Chunks of eight elements: along k of one row, or along the rows of one k.
        let (outer, inner) = if mn_major {
            (0..K, rows.step_by(8))
        } else {
            (rows, (0..K).step_by(8))
        };
        for major in outer {
            for minor in inner.clone() {
                let linear = match mn_major {
                    true => {
                        minor / 64 * leading + major / 8 * stride + major % 8 * 128 + minor % 64 * 2
                    }
                    false => major / 8 * stride + major % 8 * 128 + minor * 2,
                };
                let offset = start + linear;
                let address = base + (offset ^ ((offset >> 7 & 7) << 4));
                if !self.read_chunk(warp, clock, address, site) {
                    return values;
                }
                for i in 0..8 {
                    // SAFETY: 16 bytes of the block's shared memory, checked above.
                    let bits = unsafe { (address as *const u16).add(i).read_unaligned() };
                    let (row, k) = if mn_major {
                        (minor + i, major)
                    } else {
                        (major, minor + i)
                    };
                    values[row - first][k] = decode(bits, product.flags & BF16 != 0);
                }
            }
        }
        values
    }

    fn read_chunk(&mut self, warp: usize, clock: &Clock, address: usize, site: Site) -> bool {
        let agent = self.tensor_core(warp) as u16;
        if !self.block().shared.contains(address, 16) {
            let place = format!("operand at {}", self.describe(address));
            self.report_by(Kind::OutOfBounds, agent, "read", site, place);
            self.fatal = true;
            return false;
        }
        !self.checks
            || self.access_by(
                agent,
                clock,
                Access::new(address, 16, Mode::Read, "read"),
                site,
            )
    }

    /// Adds the product to the lanes' accumulators, which stay in flight.
    fn accumulate(
        &mut self,
        warp: usize,
        product: Product,
        meeting: &Meeting,
        a: &[[f32; K]],
        b: &[[f32; K]],
    ) {
        let state = &mut self.block_mut().warps[warp].wgmma;
        let mut disturbed = false;
        for lane in lanes(meeting.arrived) {
            // SAFETY: the lane waits in its call to sim_wgmma, where its operands live.
            let Operands::Wgmma { d, .. } = (unsafe { &*meeting.operands[lane] }) else {
                continue;
            };
            let count = product.n as usize / 2;
            let known = state
                .in_flight
                .iter()
                .position(|acc| acc.lane == lane && acc.registers == *d);
            let index = known.unwrap_or_else(|| {
                // SAFETY: simulator.h asks for n / 2 accumulators.
                let values = unsafe { std::slice::from_raw_parts(*d, count) }.to_vec();
                state.in_flight.push(Accumulator {
                    lane,
                    registers: *d,
                    values,
                    group: 0,
                });
                state.in_flight.len() - 1
            });
            let accumulator = &mut state.in_flight[index];
            // SAFETY: as above.
            disturbed |= known.is_some() && !unsafe { intact(accumulator) };
            accumulator.group = state.groups.len();
            if product.flags & ACCUMULATE == 0 {
                accumulator.values.fill(0.0);
            }
            for (i, value) in accumulator.values.iter_mut().enumerate().take(count) {
                let (row, column) = (lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
                *value += a[row]
                    .iter()
                    .zip(&b[column])
                    .map(|(x, y)| x * y)
                    .sum::<f32>();
                // SAFETY: as above.
                unsafe { d.add(i).write(f32::from_bits(IN_FLIGHT)) };
            }
        }
        if disturbed {
            self.wgmma_report(
                Kind::Wgmma,
                warp,
                meeting,
                "accumulators were written while in flight",
            );
        }
    }

    /// Reports products whose accumulators nobody waited for before the warp's block ended.
    pub fn check_wgmma_at_end(&mut self) {
        let warps = self.block().warps.iter().enumerate();
        let busy: Vec<usize> = warps
            .filter(|(_, w)| !w.wgmma.in_flight.is_empty())
            .map(|(i, _)| i)
            .collect();
        for warp in busy {
            let agent = self.tensor_core(warp) as u16;
            let place = "accumulators nobody waited for".to_string();
            self.report_by(
                Kind::Leak,
                agent,
                "was left in flight",
                Site::default(),
                place,
            );
        }
    }
}

/// Whether the kernel has left accumulators in flight alone.
///
/// # Safety
/// The registers are a live local array of a suspended lane.
unsafe fn intact(accumulator: &Accumulator) -> bool {
    // SAFETY: by contract.
    let registers =
        unsafe { std::slice::from_raw_parts(accumulator.registers, accumulator.values.len()) };
    registers.iter().all(|value| value.to_bits() == IN_FLIGHT)
}

fn decode(bits: u16, bf16: bool) -> f32 {
    if bf16 {
        f32::from_bits(u32::from(bits) << 16)
    } else {
        half::f16::from_bits(bits).to_f32()
    }
}

/// The warp's 16 rows of `a` from its lanes' registers, laid out as for mma.m16n8k16.
fn registers_of_a(meeting: &Meeting, bf16: bool) -> Vec<[f32; K]> {
    let mut rows = vec![[0f32; K]; 16];
    for lane in lanes(meeting.arrived) {
        // SAFETY: the lane waits in its call to sim_wgmma, where its operands live.
        let Operands::Wgmma { a, .. } = (unsafe { &*meeting.operands[lane] }) else {
            continue;
        };
        for i in 0..4 {
            // SAFETY: simulator.h asks for four registers.
            let register = unsafe { *a.add(i) };
            let (row, k) = (lane / 4 + i % 2 * 8, lane % 4 * 2 + i / 2 * 8);
            rows[row][k] = decode(register as u16, bf16);
            rows[row][k + 1] = decode((register >> 16) as u16, bf16);
        }
    }
    rows
}
