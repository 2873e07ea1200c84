//! The operation on CUDA, on candle's stream.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Storage, Tensor, bail};
use cudarc::driver::{CudaContext, CudaSlice, CudaView, DeviceRepr};
use segattn::attention::cuda::slices::{
    Element, GradientSlices, Input, Output, SavedSlices, Workspace,
};
use segattn::cuda::kernels::DriverKernels;

use crate::op::{Given, Gradients, Lse, SegmentAttention};
use crate::problem::{Roles, Shape, kv_layout, kv_shape, q_shape, values_offset, wrapped};

/// The kernels of each context that was used.
fn kernels(context: &Arc<CudaContext>) -> Result<Arc<DriverKernels>> {
    static OPEN: Mutex<Vec<Arc<DriverKernels>>> = Mutex::new(Vec::new());
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernels) = open.iter().find(|kernels| kernels.context() == context) {
        return Ok(kernels.clone());
    }
    let kernels = Arc::new(DriverKernels::new(context).map_err(wrapped)?);
    open.push(kernels.clone());
    Ok(kernels)
}

/// The elements of a contiguous tensor.
fn elements<'a, T: CudaDType>(
    argument: &str,
    (storage, layout): Given<'a, CudaStorage>,
) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => bail!("{argument}: expected a contiguous tensor, got {layout:?}"),
    }
}

fn on_cuda<'a>(argument: &str, storage: &'a Storage) -> Result<&'a CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!(
            "{argument}: expected a tensor on CUDA like q, got one on {:?}",
            storage.device()
        ),
    }
}

/// The elements of a contiguous tensor that is held.
fn stored<'a, T: CudaDType>(
    argument: &str,
    storage: &'a Storage,
    layout: &'a Layout,
) -> Result<CudaView<'a, T>> {
    elements(argument, (on_cuda(argument, storage)?, layout))
}

/// The keys and the values of a tensor that has both.
struct Halves<'a, T> {
    keys: CudaView<'a, T>,
    values: CudaView<'a, T>,
    shape: Shape,
}

impl<'a, T: CudaDType> Halves<'a, T> {
    fn new(argument: &str, given: Given<'a, CudaStorage>) -> Result<Self> {
        let shape = kv_shape(argument, given.1.dims())?;
        let keys = elements(argument, given)?;
        let values = keys.slice(values_offset(shape, keys.len())..);
        Ok(Halves {
            keys,
            values,
            shape,
        })
    }

    /// Those of a tensor that is held.
    fn stored(argument: &str, storage: &'a Storage, layout: &'a Layout) -> Result<Self> {
        Self::new(argument, (on_cuda(argument, storage)?, layout))
    }
}

impl<T: Element> Halves<'_, T> {
    fn inputs(&self) -> [Input<'_, T>; 2] {
        let layout = kv_layout(self.shape);
        [
            Input::strided(&self.keys, layout),
            Input::strided(&self.values, layout),
        ]
    }
}

pub(crate) fn forward<T: Element + CudaDType + DeviceRepr>(
    op: &SegmentAttention,
    q: Given<'_, CudaStorage>,
    kv: Given<'_, CudaStorage>,
    prior: Option<Given<'_, CudaStorage>>,
) -> Result<(CudaStorage, candle_core::Shape)> {
    let shape = q_shape(q.1.dims())?;
    let [batch, rows, heads, _] = shape;
    let device = q.0.device().clone();
    let stream = device.cuda_stream();
    let kernels = kernels(stream.context())?;
    let roles = Roles::new(&op.options, heads);
    let past = op.past();
    let past = past
        .as_ref()
        .map(|past| Halves::<T>::stored("past", &past.0, past.1));
    let past = past.transpose()?;
    let kv = Halves::<T>::new("kv", kv)?;
    let prior = prior
        .map(|prior| Halves::<T>::new("prior_kv", prior))
        .transpose()?;
    let q = elements::<T>("q", q)?;
    let problem = roles.problem(
        Input::packed(&q, shape),
        kv.inputs(),
        prior.as_ref().map(Halves::inputs),
        past.as_ref().map(Halves::inputs),
    );
    // SAFETY: the call writes every element.
    let (mut out, mut lse) = unsafe {
        let out = device.alloc::<T>(shape.iter().product())?;
        (out, device.alloc::<f32>(batch * heads * rows)?)
    };
    {
        let call = kernels.forward(&stream, &problem, Output::packed(&mut out, shape), &mut lse);
        call.and_then(|mut call| call.run(&mut Workspace::default()))
            .map_err(wrapped)?;
    }
    op.keep(Lse::Cuda(lse));
    Ok((
        CudaStorage::wrap_cuda_slice(out, device),
        shape.to_vec().into(),
    ))
}

pub(crate) fn backward<T: Element + CudaDType + DeviceRepr>(
    op: &SegmentAttention,
    device: &CudaDevice,
    q: &Tensor,
    kv: &Tensor,
    prior_kv: Option<&Tensor>,
    [out, d_out]: [&Tensor; 2],
    lse: &CudaSlice<f32>,
) -> Result<Gradients> {
    let shape = q_shape(q.dims())?;
    let [batch, _, heads, _] = shape;
    let stream = device.cuda_stream();
    let kernels = kernels(stream.context())?;
    let roles = Roles::new(&op.options, heads);
    let [q, kv, out, d_out] = [q, kv, out, d_out].map(Tensor::storage_and_layout);
    let prior_kv = prior_kv.map(Tensor::storage_and_layout);
    let past = op.past();
    let kv = Halves::<T>::stored("kv", &kv.0, kv.1)?;
    let prior = prior_kv.as_ref();
    let prior = prior.map(|prior| Halves::<T>::stored("prior_kv", &prior.0, prior.1));
    let prior = prior.transpose()?;
    let past = past
        .as_ref()
        .map(|past| Halves::<T>::stored("past", &past.0, past.1));
    let past = past.transpose()?;
    let q = stored::<T>("q", &q.0, q.1)?;
    let out = stored::<T>("out", &out.0, out.1)?;
    let d_out = stored::<T>("d_out", &d_out.0, d_out.1)?;
    let problem = roles.problem(
        Input::packed(&q, shape),
        kv.inputs(),
        prior.as_ref().map(Halves::inputs),
        past.as_ref().map(Halves::inputs),
    );
    let saved: SavedSlices<'_, T> = SavedSlices::new(
        Input::packed(&out, shape),
        lse,
        Input::packed(&d_out, shape),
    );

    // SAFETY: the call writes every element.
    let empty = |shape: Shape| unsafe { device.alloc::<T>(shape.iter().product()) };
    let mut d_q = empty(shape)?;
    let [mut d_k, mut d_v] = [empty(kv.shape)?, empty(kv.shape)?];
    let mut d_prior = match &prior {
        Some(prior) => Some(([empty(prior.shape)?, empty(prior.shape)?], prior.shape)),
        None => None,
    };
    // SAFETY: as above.
    let mut d_gate = unsafe { device.alloc::<f32>(batch * heads) }?;
    {
        let mut written: GradientSlices<'_, T> = GradientSlices::new(
            Output::packed(&mut d_q, shape),
            Output::packed(&mut d_k, kv.shape),
            Output::packed(&mut d_v, kv.shape),
            &mut d_gate,
        );
        if let Some(([d_k, d_v], shape)) = &mut d_prior {
            written = written.prior(Output::packed(d_k, *shape), Output::packed(d_v, *shape));
        }
        let call = kernels.backward(&stream, &problem, &saved, written);
        call.and_then(|mut call| call.run(&mut Workspace::default()))
            .map_err(wrapped)?;
    }
    let tensor = |data: CudaSlice<T>, shape: Shape| {
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(data, device.clone()));
        Tensor::from_storage(storage, shape.to_vec(), BackpropOp::none(), false)
    };
    let beside =
        |[k, v]: [CudaSlice<T>; 2], shape| Tensor::stack(&[tensor(k, shape), tensor(v, shape)], 2);
    let d_prior = d_prior
        .map(|(halves, shape)| beside(halves, shape))
        .transpose()?;
    Ok((tensor(d_q, shape), beside([d_k, d_v], kv.shape)?, d_prior))
}
