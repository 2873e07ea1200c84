//! Calls on host memory, in f32.

use std::ops::Range;

use segattn::attention::{Gradients, Saved, View, ViewMut, cpu};

use crate::failure::Failure;
use crate::given::{self, Roles};
use crate::types::{Backward, Dtype, Forward, Problem, Tensor};

/// The memory of a call. What is written shares none of it, as the references of Rust need it.
#[derive(Default)]
struct Memory {
    taken: Vec<Taken>,
}

struct Taken {
    argument: &'static str,
    addresses: Range<usize>,
    is_written: bool,
}

impl Memory {
    /// Notes the memory of an argument, or refuses it.
    fn take(
        &mut self,
        argument: &'static str,
        pointer: *const f32,
        len: Option<usize>,
        is_written: bool,
    ) -> Result<usize, Failure> {
        let len = given::check_array(argument, pointer, len)?;
        let addresses = pointer.addr()..pointer.addr() + len * size_of::<f32>();
        let meets = |other: &&Taken| {
            (is_written || other.is_written)
                && addresses.start < other.addresses.end
                && other.addresses.start < addresses.end
        };
        if let Some(other) = self.taken.iter().find(meets) {
            return Err(Failure::Argument {
                argument,
                expected: format!("memory apart from that of {}", other.argument),
                got: format!("addresses {addresses:#x?} beside {:#x?}", other.addresses),
            });
        }
        if len > 0 {
            self.taken.push(Taken {
                argument,
                addresses,
                is_written,
            });
        }
        Ok(len)
    }

    /// # Safety
    /// As [`given::array`].
    unsafe fn read<'a>(
        &mut self,
        argument: &'static str,
        pointer: *const f32,
        len: Option<usize>,
    ) -> Result<&'a [f32], Failure> {
        let len = self.take(argument, pointer, len, false)?;
        // SAFETY: the caller's promise; nothing that is written shares an element.
        unsafe { given::array(argument, pointer, Some(len)) }
    }

    /// # Safety
    /// As [`given::array`], for memory that nobody else uses for `'a`.
    unsafe fn write<'a>(
        &mut self,
        argument: &'static str,
        pointer: *mut f32,
        len: Option<usize>,
    ) -> Result<&'a mut [f32], Failure> {
        match self.take(argument, pointer, len, true)? {
            0 => Ok(&mut []),
            // SAFETY: not NULL, aligned, of a size that memory can have, and apart from the call's other memory;
            // otherwise the caller's promise.
            len => Ok(unsafe { std::slice::from_raw_parts_mut(pointer, len) }),
        }
    }

    /// # Safety
    /// As [`read`](Self::read), for every row of the tensor.
    unsafe fn view<'a>(
        &mut self,
        argument: &'static str,
        tensor: &Tensor,
    ) -> Result<View<'a, f32>, Failure> {
        // SAFETY: the caller's promise, here and below.
        let layout = unsafe { given::layout(argument, tensor) }?;
        let data = unsafe { self.read(argument, tensor.data.cast(), layout.extent()) }?;
        Ok(View { data, layout })
    }

    /// # Safety
    /// As [`write`](Self::write), for every row of the tensor.
    unsafe fn view_mut<'a>(
        &mut self,
        argument: &'static str,
        tensor: &Tensor,
    ) -> Result<ViewMut<'a, f32>, Failure> {
        // SAFETY: the caller's promise, here and below.
        let layout = unsafe { given::layout(argument, tensor) }?;
        let data = unsafe { self.write(argument, tensor.data.cast(), layout.extent()) }?;
        Ok(ViewMut { data, layout })
    }
}

fn check_dtype(problem: &Problem) -> Result<(), Failure> {
    match problem.dtype == Dtype::F32 as i32 {
        true => Ok(()),
        false => Err(Failure::Dtype {
            expected: "SEGATTN_DTYPE_F32 on the CPU",
            got: problem.dtype,
        }),
    }
}

/// # Safety
/// Every tensor and array of the structs is host memory as `types` says, which nobody else uses meanwhile.
pub(crate) unsafe fn forward(problem: &Problem, forward: &Forward) -> Result<(), Failure> {
    check_dtype(problem)?;
    let mut memory = Memory::default();
    // SAFETY: the caller's promise, in each of the calls.
    unsafe {
        let roles = Roles::new(problem)?;
        let call = given::problem(problem, &roles, |name, tensor| memory.view(name, tensor))?;
        let out = memory.view_mut("out", &forward.out)?;
        let lse = memory.write("lse", forward.lse, given::query_rows(problem))?;
        Ok(cpu::forward(&call, out, lse)?)
    }
}

/// # Safety
/// As [`forward`].
pub(crate) unsafe fn backward(problem: &Problem, backward: &Backward) -> Result<(), Failure> {
    check_dtype(problem)?;
    let mut memory = Memory::default();
    let rows = given::query_rows(problem);
    // SAFETY: the caller's promise, in each of the calls.
    unsafe {
        let roles = Roles::new(problem)?;
        let call = given::problem(problem, &roles, |name, tensor| memory.view(name, tensor))?;
        let saved = Saved {
            out: memory.view("out", &backward.out)?,
            lse: memory.read("lse", backward.lse, rows)?,
            d_out: memory.view("d_out", &backward.d_out)?,
            d_lse: match backward.d_lse.is_null() {
                true => None,
                false => Some(memory.read("d_lse", backward.d_lse, rows)?),
            },
        };
        let gradients = Gradients {
            d_q: memory.view_mut("d_q", &backward.d_q)?,
            d_k: memory.view_mut("d_k", &backward.d_k)?,
            d_v: memory.view_mut("d_v", &backward.d_v)?,
            d_prior: match given::is_there(
                ["d_prior_k", "d_prior_v"],
                [&backward.d_prior_k, &backward.d_prior_v],
            )? {
                true => Some((
                    memory.view_mut("d_prior_k", &backward.d_prior_k)?,
                    memory.view_mut("d_prior_v", &backward.d_prior_v)?,
                )),
                false => None,
            },
            d_past_gate: memory.write(
                "d_past_gate",
                backward.d_past_gate,
                given::gates(problem),
            )?,
        };
        Ok(cpu::backward(&call, &saved, gradients)?)
    }
}
