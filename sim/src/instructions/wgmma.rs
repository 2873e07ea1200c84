//! wgmma: products of a warpgroup that read shared memory by descriptors and run on after they were issued.
//!
//! Each warp computes its own 16 of the 64 rows. Its tensor core is an actor with a clock of its own: it reads
//! through the async proxy, and what it read or holds is known to the warp only after the wait. Accumulators in
//! flight are poisoned in the kernel's own registers. Register operands of `a` are read when the product is issued,
//! so a change before the wait is not seen; a missing wgmma.fence before them is.

use super::collective::{Meeting, Operands, Product, lanes};
use super::context::Context;
use crate::checks::access::Access;
use crate::checks::clock::Clock;
use crate::checks::report::Kind;
use crate::checks::shadow::Mode;
use crate::checks::symbols::Site;

/// Flags of sim_wgmma; see simulator.h.
const BF16: u32 = 1;
const ACCUMULATE: u32 = 2;
const A_MN_MAJOR: u32 = 4;
const B_MN_MAJOR: u32 = 8;
/// Depth of one product.
const K: usize = 16;
/// What registers hold while a product writes them: a NaN no arithmetic makes.
const IN_FLIGHT: u32 = 0x7fc5_e6a7;

/// The finding that the kernel wrote to accumulators that a product was writing.
const DISTURBED: &str = "accumulators were written while in flight";

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
pub(crate) struct TensorCore {
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

/// An operand in shared memory, and who reads it.
struct Shared<'a> {
    agent: u16,
    clock: &'a Clock,
    site: Site,
    descriptor: u64,
    mn_major: bool,
    bf16: bool,
}

impl TensorCore {
    /// wgmma.fence by the warp.
    pub fn fence(&mut self) {
        (self.fenced, self.fenced_since_wait) = (true, true);
        self.returned.clear();
    }

    /// wgmma.commit_group by the warp.
    pub fn commit(&mut self) {
        self.groups.push(self.ticks);
    }

    /// wgmma.wait_group by the warp: the older groups' accumulators are the kernel's again.
    pub fn wait(&mut self, cx: &mut Context, warp: usize, newest_left: u32, meeting: &Meeting) {
        let agent = cx.actors.tensor_core(warp) as usize;
        self.fenced_since_wait = false;
        let done = self.groups.len().saturating_sub(newest_left as usize);
        let Some(&tick) = done.checked_sub(1).and_then(|last| self.groups.get(last)) else {
            return;
        };
        for thread in meeting.threads(warp) {
            let known = &mut cx.clocks[thread as usize].now.local[agent];
            *known = (*known).max(tick);
        }
        let all = std::mem::take(&mut self.in_flight).into_iter();
        let (ended, going): (Vec<_>, Vec<_>) = all.partition(|acc| acc.group < done);
        self.in_flight = going;
        let mut disturbed = false;
        for accumulator in &ended {
            self.returned.push(accumulator.registers as usize);
            // SAFETY: the registers are a local array of a lane that waits in this very call.
            unsafe {
                disturbed |= !intact(accumulator);
                let (from, count) = (accumulator.values.as_ptr(), accumulator.values.len());
                std::ptr::copy_nonoverlapping(from, accumulator.registers, count);
            }
        }
        if disturbed {
            report(cx, Kind::Wgmma, warp, meeting, DISTURBED);
        }
    }

    /// One product by the warp.
    pub fn product(&mut self, cx: &mut Context, warp: usize, product: Product, meeting: &Meeting) {
        let whole = (warp / 4 * 4 + 4) * 32 <= cx.actors.threads();
        let swizzled = |descriptor: u64| descriptor >> 62 == 1;
        let descriptors = (product.a_in_registers || swizzled(product.a)) && swizzled(product.b);
        if !whole || !product.n.is_multiple_of(8) || !(8..=256).contains(&product.n) || !descriptors
        {
            let place =
                "needs a whole warpgroup, n a multiple of 8 up to 256, swizzles of 128 bytes";
            report(cx, Kind::Operand, warp, meeting, place);
            return cx.checker.stop();
        }
        cx.stats.products += 1;
        self.check_fence(cx, warp, product, meeting);
        let clock = self.start(cx, warp, meeting);
        let bf16 = product.flags & BF16 != 0;
        let operand = |descriptor, major_flag| Shared {
            agent: cx.actors.tensor_core(warp),
            clock: &clock,
            site: meeting.first(warp).1,
            descriptor,
            mn_major: product.flags & major_flag != 0,
            bf16,
        };
        let (a, b) = (
            operand(product.a, A_MN_MAJOR),
            operand(product.b, B_MN_MAJOR),
        );
        let first_row = warp % 4 * 16;
        let a = match product.a_in_registers {
            true => registers_of_a(meeting, bf16),
            false => a.rows(cx, first_row..first_row + 16),
        };
        let b = b.rows(cx, 0..product.n as usize);
        self.clock = clock;
        if !cx.checker.stopped() && self.accumulate(product, meeting, &a, &b) {
            report(cx, Kind::Wgmma, warp, meeting, DISTURBED);
        }
    }

    fn check_fence(&self, cx: &mut Context, warp: usize, product: Product, meeting: &Meeting) {
        let returned = lanes(meeting.arrived).any(|lane| {
            // SAFETY: the lane waits in its call to sim_wgmma, where its operands live.
            let operands = unsafe { &*meeting.operands[lane] };
            matches!(operands, Operands::Wgmma { d, .. } if self.returned.contains(&(*d as usize)))
        });
        if !self.fenced || returned || (product.a_in_registers && !self.fenced_since_wait) {
            let place = "with no wgmma.fence since its registers were last free";
            report(cx, Kind::Wgmma, warp, meeting, place);
        }
    }

    /// A new tick of the tensor core, which knows what the warp's lanes know.
    fn start(&mut self, cx: &mut Context, warp: usize, meeting: &Meeting) -> Clock {
        let mut clock = std::mem::take(&mut self.clock);
        if clock.local.is_empty() {
            clock = Clock::new(cx.actors.count());
        }
        self.ticks += 1;
        for thread in meeting.threads(warp) {
            let own = &mut cx.clocks[thread as usize].now;
            clock.join(own);
            own.local[thread as usize] += 1;
        }
        clock.local[cx.actors.tensor_core(warp) as usize] = self.ticks;
        clock
    }

    /// Adds the product to the lanes' accumulators, which stay in flight. Whether the kernel has written to any of them
    /// meanwhile.
    fn accumulate(
        &mut self,
        product: Product,
        meeting: &Meeting,
        a: &[[f32; K]],
        b: &[[f32; K]],
    ) -> bool {
        let mut disturbed = false;
        for lane in lanes(meeting.arrived) {
            // SAFETY: the lane waits in its call to sim_wgmma, where its operands live.
            let Operands::Wgmma { d, .. } = (unsafe { &*meeting.operands[lane] }) else {
                continue;
            };
            let count = product.n as usize / 2;
            let mut accumulators = self.in_flight.iter();
            let known = accumulators.position(|acc| acc.lane == lane && acc.registers == *d);
            let index = known.unwrap_or_else(|| {
                // SAFETY: simulator.h asks for n / 2 accumulators.
                let values = unsafe { std::slice::from_raw_parts(*d, count) }.to_vec();
                self.in_flight.push(Accumulator {
                    lane,
                    registers: *d,
                    values,
                    group: 0,
                });
                self.in_flight.len() - 1
            });
            let accumulator = &mut self.in_flight[index];
            // SAFETY: as above.
            disturbed |= known.is_some() && !unsafe { intact(accumulator) };
            accumulator.group = self.groups.len();
            if product.flags & ACCUMULATE == 0 {
                accumulator.values.fill(0.0);
            }
            for (i, value) in accumulator.values.iter_mut().enumerate().take(count) {
                let (row, column) = (lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
                let terms = a[row].iter().zip(&b[column]);
                *value += terms.map(|(x, y)| x * y).sum::<f32>();
                // SAFETY: as above.
                unsafe { d.add(i).write(f32::from_bits(IN_FLIGHT)) };
            }
        }
        disturbed
    }

    /// Reports products whose accumulators nobody waited for before the warp's block ended.
    pub fn check_at_end(&self, cx: &mut Context, warp: usize) {
        if !self.in_flight.is_empty() {
            let agent = cx.actors.tensor_core(warp);
            let place = "accumulators nobody waited for".to_string();
            let action = "was left in flight";
            cx.report_by(Kind::Leak, agent, action, Site::default(), place);
        }
    }
}

impl Shared<'_> {
    /// Rows of the operand, each with its K values.
    fn rows(&self, cx: &mut Context, rows: std::ops::Range<usize>) -> Vec<[f32; K]> {
        let field = |shift: u64| ((self.descriptor >> shift & 0x3fff) << 4) as usize;
        let (start, leading, stride) = (field(0), field(16), field(32));
        let base = cx.shared.base;
        let first = rows.start;
        let mut values = vec![[0f32; K]; rows.len()];
        // Chunks of eight elements: along k of one row, or along the rows of one k.
        let (outer, inner) = if self.mn_major {
            (0..K, rows.step_by(8))
        } else {
            (rows, (0..K).step_by(8))
        };
        for major in outer {
            for minor in inner.clone() {
                let row = major / 8 * stride + major % 8 * 128;
                let column = match self.mn_major {
                    true => minor / 64 * leading + minor % 64 * 2,
                    false => minor * 2,
                };
                let offset = start + row + column;
                let address = base + (offset ^ ((offset >> 7 & 7) << 4));
                if !self.read_chunk(cx, address) {
                    return values;
                }
                for i in 0..8 {
                    // SAFETY: 16 bytes of the block's shared memory, checked above.
                    let bits = unsafe { (address as *const u16).add(i).read_unaligned() };
                    let (row, k) = if self.mn_major {
                        (minor + i, major)
                    } else {
                        (major, minor + i)
                    };
                    values[row - first][k] = decode(bits, self.bf16);
                }
            }
        }
        values
    }

    fn read_chunk(&self, cx: &mut Context, address: usize) -> bool {
        if !cx.shared.contains(address, 16) {
            let place = format!("operand at {}", cx.describe(address));
            cx.report_by(Kind::OutOfBounds, self.agent, "read", self.site, place);
            cx.checker.stop();
            return false;
        }
        let access = Access::new(address, 16, Mode::Read, "read");
        cx.access_by(self.agent, self.clock, access, self.site)
    }
}

/// Reports something that a warp did.
fn report(cx: &mut Context, kind: Kind, warp: usize, meeting: &Meeting, place: &str) {
    let (thread, site) = meeting.first(warp);
    cx.report_by(kind, thread, meeting.op.name(), site, place.to_string());
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
