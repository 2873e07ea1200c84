//! Safe calls on cudarc's slices. On its stream, a call waits for earlier writes to its inputs; other streams that use
//! its results wait for the call. The host never waits.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop};
use half::{bf16, f16};

use super::backward::BackwardPlan;
use super::error::Error;
use super::forward::ForwardPlan;
use super::instances::Dtype;
use super::tensor::{DeviceSlice, Tensor};
use crate::attention::{Gradients, Layout, Problem, Saved};
use crate::cuda;
use crate::cuda::kernels::DriverKernels;

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// Elements that there are kernels for.
pub trait Element: DeviceRepr + sealed::Sealed + 'static {
    /// Their type's name.
    const DTYPE: Dtype;
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
}

/// A `[batch, rows, heads, head_dim]` tensor that is read: a `&CudaSlice` or `&CudaView` and where its rows are.
#[derive(Clone, Copy)]
pub struct Input<'a, T> {
    data: &'a dyn DevicePtr<T>,
    layout: Layout<'a>,
}

impl<'a, T> Input<'a, T> {
    /// A contiguous tensor.
    pub fn packed(data: &'a impl DevicePtr<T>, shape: [usize; 4]) -> Self {
        Input::strided(data, Layout::packed(shape))
    }

    /// A tensor of any layout inside the data.
    pub fn strided(data: &'a impl DevicePtr<T>, layout: Layout<'a>) -> Self {
        Input { data, layout }
    }
}

/// A tensor that is written: a `&mut CudaSlice` or `&mut CudaViewMut` and where its rows are, which must not overlap.
pub struct Output<'a, T> {
    data: &'a mut dyn DevicePtrMut<T>,
    layout: Layout<'a>,
}

impl<'a, T> Output<'a, T> {
    /// A contiguous tensor.
    pub fn packed(data: &'a mut impl DevicePtrMut<T>, shape: [usize; 4]) -> Self {
        Output::strided(data, Layout::packed(shape))
    }

    /// A tensor of any layout inside the data.
    pub fn strided(data: &'a mut impl DevicePtrMut<T>, layout: Layout<'a>) -> Self {
        Output { data, layout }
    }
}

/// What a backward pass reads besides the problem.
pub type SavedSlices<'a, T> = Saved<Input<'a, T>, &'a dyn DevicePtr<f32>>;
/// What a backward pass writes.
pub type GradientSlices<'a, T> = Gradients<Output<'a, T>, &'a mut dyn DevicePtrMut<f32>>;

/// Device memory for the workspaces of calls. It grows when a call needs more, and never shrinks.
#[derive(Default)]
pub struct Workspace {
    memory: Option<CudaSlice<u8>>,
}

impl Workspace {
    /// Bytes it holds.
    pub fn bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, CudaSlice::num_bytes)
    }

    /// Allocates at least `bytes` bytes, see [`Call::workspace_bytes`].
    ///
    /// # Errors
    /// Out of memory; the workspace is empty then.
    pub fn reserve(&mut self, stream: &Arc<CudaStream>, bytes: usize) -> Result<(), Error> {
        if self.bytes() >= bytes {
            return Ok(());
        }
        // Freed first, so that old and new memory need not fit side by side.
        self.memory = None;
        // SAFETY: kernels read of a workspace only what they or the call's own copies wrote.
        let mut memory = unsafe { cuda::alloc(stream, bytes) }?;
        // Recorded as a write, so that a use on another stream waits for the allocation.
        drop(memory.device_ptr_mut(stream));
        self.memory = Some(memory);
        Ok(())
    }
}

/// A slice of a call: while the guard lives, `stream` uses it.
trait Borrow {
    fn guard<'b>(&'b mut self, stream: &'b CudaStream) -> SyncOnDrop<'b>;
}

struct Read<'a, T>(&'a dyn DevicePtr<T>);

impl<T> Borrow for Read<'_, T> {
    fn guard<'b>(&'b mut self, stream: &'b CudaStream) -> SyncOnDrop<'b> {
        self.0.device_ptr(stream).1
    }
}

struct Write<'a, T>(&'a mut dyn DevicePtrMut<T>);

impl<T> Borrow for Write<'_, T> {
    fn guard<'b>(&'b mut self, stream: &'b CudaStream) -> SyncOnDrop<'b> {
        self.0.device_ptr_mut(stream).1
    }
}

/// The slices of a call on a stream.
struct Borrows<'a> {
    kernels: &'a DriverKernels,
    stream: &'a Arc<CudaStream>,
    slices: Vec<Box<dyn Borrow + 'a>>,
}

impl<'a> Borrows<'a> {
    fn new(kernels: &'a DriverKernels, stream: &'a Arc<CudaStream>) -> Result<Self, Error> {
        kernels.check_context("stream", stream.context())?;
        Ok(Borrows {
            kernels,
            stream,
            slices: Vec::new(),
        })
    }

    fn read<T: 'a>(
        &mut self,
        argument: &'static str,
        data: &'a dyn DevicePtr<T>,
    ) -> Result<DeviceSlice, Error> {
        self.kernels
            .check_context(argument, data.stream().context())?;
        let (address, guard) = data.device_ptr(self.stream);
        // Nothing is launched yet, so other streams need not wait.
        std::mem::forget(guard);
        self.slices.push(Box::new(Read(data)));
        Ok(DeviceSlice::new(address, data.len()))
    }

    fn write<T: 'a>(
        &mut self,
        argument: &'static str,
        data: &'a mut dyn DevicePtrMut<T>,
    ) -> Result<DeviceSlice, Error> {
        self.kernels
            .check_context(argument, data.stream().context())?;
        let len = data.len();
        let (address, guard) = data.device_ptr_mut(self.stream);
        std::mem::forget(guard);
        self.slices.push(Box::new(Write(data)));
        Ok(DeviceSlice::new(address, len))
    }

    fn input<T: Element>(
        &mut self,
        argument: &'static str,
        input: &Input<'a, T>,
    ) -> Result<Tensor<'a>, Error> {
        let slice = self.read(argument, input.data)?;
        Ok(tensor::<T>(slice, input.layout))
    }

    fn output<T: Element>(
        &mut self,
        argument: &'static str,
        output: Output<'a, T>,
    ) -> Result<Tensor<'a>, Error> {
        let slice = self.write(argument, output.data)?;
        Ok(tensor::<T>(slice, output.layout))
    }

    /// The problem with addresses. Device-resident lengths and gates cannot be checked, so a safe call refuses them.
    fn problem<T: Element>(
        &mut self,
        problem: &Problem<'a, Input<'a, T>>,
    ) -> Result<Problem<'a, Tensor<'a>>, Error> {
        problem.check_on_host("host values in a safe call")?;
        problem.try_map(|name, input| self.input(name, input))
    }
}

fn tensor<T: Element>(slice: DeviceSlice, layout: Layout<'_>) -> Tensor<'_> {
    Tensor {
        data: slice.data,
        len: slice.len,
        dtype: T::DTYPE,
        layout,
    }
}

#[expect(clippy::large_enum_variant)] // There is one a call, on the stack.
enum Plan {
    Forward(ForwardPlan),
    Backward(BackwardPlan),
}

/// A validated call on a stream. It borrows its tensors until it is dropped.
pub struct Call<'a> {
    plan: Plan,
    borrows: Borrows<'a>,
}

impl Call<'_> {
    /// Bytes of workspace that [`run`](Self::run) needs.
    pub fn workspace_bytes(&self) -> usize {
        match &self.plan {
            Plan::Forward(plan) => plan.workspace_bytes(),
            Plan::Backward(plan) => plan.workspace_bytes(),
        }
    }

    /// Enqueues the call on its stream; it can run many times. The workspace grows if needed.
    ///
    /// # Errors
    /// Out of memory, or what the driver says.
    pub fn run(&mut self, workspace: &mut Workspace) -> Result<(), Error> {
        let bytes = self.workspace_bytes();
        let Borrows {
            kernels,
            stream,
            slices,
        } = &mut self.borrows;
        let (kernels, stream): (&DriverKernels, &Arc<CudaStream>) = (kernels, stream);
        workspace.reserve(stream, bytes)?;
        let mut guards: Vec<SyncOnDrop<'_>> =
            slices.iter_mut().map(|slice| slice.guard(stream)).collect();
        let mut place = DeviceSlice::new(0, 0);
        if let Some(memory) = &mut workspace.memory {
            kernels.check_context("workspace", memory.context())?;
            place.len = memory.len();
            let (address, guard) = memory.device_ptr_mut(stream);
            place.data = address;
            guards.push(guard);
        }
        let mut launcher = kernels.on(stream)?;
        // SAFETY: every address is that of a slice that this call holds borrowed, of the length its plan checked;
        // lengths and gates are the host's. The guards make other streams, and the slices' drops, wait.
        unsafe {
            match &self.plan {
                Plan::Forward(plan) => plan.run(&mut launcher, place),
                Plan::Backward(plan) => plan.run(&mut launcher, place),
            }
        }
    }
}

impl DriverKernels {
    /// A forward call on a stream: writes `out`, like `q`, and `lse` `[batch, q_heads, rows]`; padding rows to 0 and
    /// -inf.
    ///
    /// # Errors
    /// An argument that does not fit, or what the driver says. Nothing is launched or written then.
    pub fn forward<'a, T: Element>(
        &'a self,
        stream: &'a Arc<CudaStream>,
        problem: &Problem<'a, Input<'a, T>>,
        out: Output<'a, T>,
        lse: &'a mut dyn DevicePtrMut<f32>,
    ) -> Result<Call<'a>, Error> {
        let mut borrows = Borrows::new(self, stream)?;
        let problem = borrows.problem(problem)?;
        let out = borrows.output("out", out)?;
        let lse = borrows.write("lse", lse)?;
        let plan = ForwardPlan::new(&problem, &out, lse, None, self)?;
        Ok(Call {
            plan: Plan::Forward(plan),
            borrows,
        })
    }

    /// A backward call on a stream: writes every gradient (`=`, not `+=`), padding rows to 0.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward<'a, T: Element>(
        &'a self,
        stream: &'a Arc<CudaStream>,
        problem: &Problem<'a, Input<'a, T>>,
        saved: &SavedSlices<'a, T>,
        gradients: GradientSlices<'a, T>,
    ) -> Result<Call<'a>, Error> {
        let mut borrows = Borrows::new(self, stream)?;
        let problem = borrows.problem(problem)?;
        let d_lse = saved.d_lse.map(|d_lse| borrows.read("d_lse", d_lse));
        let saved = Saved {
            out: borrows.input("out", &saved.out)?,
            lse: borrows.read("lse", saved.lse)?,
            d_out: borrows.input("d_out", &saved.d_out)?,
            d_lse: d_lse.transpose()?,
        };
        let d_prior = match gradients.d_prior {
            Some((d_k, d_v)) => Some((
                borrows.output("d_prior_k", d_k)?,
                borrows.output("d_prior_v", d_v)?,
            )),
            None => None,
        };
        let gradients = Gradients {
            d_q: borrows.output("d_q", gradients.d_q)?,
            d_k: borrows.output("d_k", gradients.d_k)?,
            d_v: borrows.output("d_v", gradients.d_v)?,
            d_prior,
            d_past_gate: borrows.write("d_past_gate", gradients.d_past_gate)?,
        };
        let plan = BackwardPlan::new(&problem, &saved, &gradients, self)?;
        Ok(Call {
            plan: Plan::Backward(plan),
            borrows,
        })
    }
}
