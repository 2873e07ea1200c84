//! The C interface of segattn. `include/segattn.h` is made from this crate, and `examples/attention.c` uses it.
//!
//! Each entry point returns a [`Status`] and never unwinds. The text of a failure is kept for each thread.
#![deny(missing_docs)]

use std::ffi::{c_char, c_void};

mod failure;
mod given;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(not(feature = "cuda"))]
#[path = "no_gpu.rs"]
mod gpu;
mod host;
mod types;

pub use failure::Status;
pub use types::{Backward, Dtype, Forward, Lengths, ON_DEVICE, PER_HEAD, Problem, Tensor};

use failure::guarded;
use given::{check_place, given};

/// Version of the structs and functions of this header. Compare it with `segattn_abi`.
pub const ABI: u32 = 1;

/// An opened GPU. It can be used by several threads.
pub struct Device(gpu::Gpu);

/// A validated call on a GPU. It holds addresses and host values, no memory of the device. It can be used by several
/// threads.
pub struct Plan(gpu::GpuPlan);

/// The `SEGATTN_ABI` that the library was built with.
#[unsafe(no_mangle)]
pub extern "C" fn segattn_abi() -> u32 {
    ABI
}

/// The version of the library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn segattn_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The text of this thread's last failure: the argument, what was expected and what came; empty where nothing has
/// failed. It stays valid until this thread's next failure, or its end.
#[unsafe(no_mangle)]
pub extern "C" fn segattn_last_error() -> *const c_char {
    failure::last()
}

/// Computes `out` and `lse` on the CPU, in f32 (`SEGATTN_DTYPE_F32`), with all cores. `head_dim` is a multiple of 8 up
/// to 256. What is written shares no memory with anything else.
///
/// # Safety
/// Pointers are NULL or point to what the structs say, in host memory that nobody else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn segattn_cpu_forward(
    problem: *const Problem,
    forward: *const Forward,
) -> Status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe { host::forward(given("problem", problem)?, given("forward", forward)?) })
}

/// Computes gradients on the CPU, as `segattn_cpu_forward`. `query_start` is 0.
///
/// # Safety
/// As `segattn_cpu_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn segattn_cpu_backward(
    problem: *const Problem,
    backward: *const Backward,
) -> Status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe { host::backward(given("problem", problem)?, given("backward", backward)?) })
}

/// Opens GPU `ordinal` and makes its primary context, which CUDA's runtime uses too, the current one of the thread.
/// `*device` is written on success only.
///
/// # Safety
/// `device` is NULL or points to a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn segattn_device_open(ordinal: i32, device: *mut *mut Device) -> Status {
    guarded(|| {
        check_place("device", device)?;
        let opened = Box::new(Device(gpu::Gpu::open(ordinal)?));
        // SAFETY: the caller's promise.
        unsafe { device.write(Box::into_raw(opened)) };
        Ok(())
    })
}

/// Closes a GPU; NULL does nothing. Plans stay valid.
///
/// # Safety
/// `device` is NULL or came from `segattn_device_open`, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn segattn_device_close(device: *mut Device) {
    // SAFETY: the caller's promise.
    unsafe { free(device) }
}

/// Plans a forward call on a GPU in bf16 or f16. The first plan of an element type and head size loads its kernels.
/// `*plan` is written on success only.
///
/// # Safety
/// Pointers are NULL or point to what the structs say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn segattn_plan_forward(
    device: *const Device,
    problem: *const Problem,
    forward: *const Forward,
    plan: *mut *mut Plan,
) -> Status {
    guarded(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let device = given("device", device)?;
            check_place("plan", plan)?;
            let made = device
                .0
                .forward(given("problem", problem)?, given("forward", forward)?)?;
            plan.write(Box::into_raw(Box::new(Plan(made))));
        }
        Ok(())
    })
}

/// Plans a backward call on a GPU, as `segattn_plan_forward`. `query_start` is 0.
///
/// # Safety
/// As `segattn_plan_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn segattn_plan_backward(
    device: *const Device,
    problem: *const Problem,
    backward: *const Backward,
    plan: *mut *mut Plan,
) -> Status {
    guarded(|| {
        // SAFETY: the caller's promise.
        unsafe {
            let device = given("device", device)?;
            check_place("plan", plan)?;
            let made = device
                .0
                .backward(given("problem", problem)?, given("backward", backward)?)?;
            plan.write(Box::into_raw(Box::new(Plan(made))));
        }
        Ok(())
    })
}

/// Bytes of device memory that running the plan needs, at a multiple of 256.
///
/// # Safety
/// Pointers are NULL or point to a plan and to a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn segattn_plan_workspace_bytes(
    plan: *const Plan,
    bytes: *mut usize,
) -> Status {
    guarded(|| {
        // SAFETY: the caller's promise.
        unsafe {
            check_place("bytes", bytes)?;
            bytes.write(given("plan", plan)?.0.workspace_bytes());
        }
        Ok(())
    })
}

/// Enqueues a plan on `stream`, a `CUstream` or `cudaStream_t` of the device: a copy of the lengths and gates that were
/// in host memory, then the kernels. The host does not wait.
///
/// # Safety
/// Every address of the plan and of the workspace is device memory of the stated size that stays allocated until the
/// stream has run the call. Nothing else uses what the plan writes, and the workspace, until then. `stream` is one of
/// the device's primary context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn segattn_plan_run(
    plan: *const Plan,
    stream: *mut c_void,
    workspace: *mut c_void,
    workspace_bytes: usize,
) -> Status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe {
        given("plan", plan)?
            .0
            .run(stream, workspace, workspace_bytes, true)
    })
}

/// As `segattn_plan_run`, without the copy: the workspace still holds the values of this plan's last run. For the
/// capture of a graph.
///
/// # Safety
/// As `segattn_plan_run`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn segattn_plan_launch(
    plan: *const Plan,
    stream: *mut c_void,
    workspace: *mut c_void,
    workspace_bytes: usize,
) -> Status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe {
        given("plan", plan)?
            .0
            .run(stream, workspace, workspace_bytes, false)
    })
}

/// Frees a plan; NULL does nothing. Calls that are enqueued run on.
///
/// # Safety
/// `plan` is NULL or came from this library, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn segattn_plan_free(plan: *mut Plan) {
    // SAFETY: the caller's promise.
    unsafe { free(plan) }
}

/// # Safety
/// The pointer is NULL or came from a box, and is not used again.
unsafe fn free<T>(pointer: *mut T) {
    if !pointer.is_null() {
        guarded(|| {
            // SAFETY: the caller's promise.
            drop(unsafe { Box::from_raw(pointer) });
            Ok(())
        });
    }
}
