//! The operation on the CPU: f32, or f64 by the reference.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Device, Layout, Result, Storage, Tensor, WithDType, bail};
use segattn::attention::{
    Error, Gradients as Written, HostGradients, HostProblem, HostSaved, Saved, View, ViewMut, cpu,
    reference,
};

use crate::op::{Given, Gradients, Lse, SegmentAttention};
use crate::problem::{Roles, Shape, kv_layout, kv_shape, q_shape, values_offset, wrapped};

/// How a call of segattn ends.
type Done = std::result::Result<(), Error>;

/// What computes an element type on the CPU.
pub(crate) trait Element: WithDType {
    fn forward(problem: &HostProblem<'_, Self>, out: ViewMut<'_, Self>, lse: &mut [Self]) -> Done;
    fn backward(
        problem: &HostProblem<'_, Self>,
        saved: &HostSaved<'_, Self>,
        gradients: HostGradients<'_, Self>,
    ) -> Done;
    fn lse(lse: Vec<Self>) -> Lse;
}

impl Element for f32 {
    fn forward(problem: &HostProblem<'_, f32>, out: ViewMut<'_, f32>, lse: &mut [f32]) -> Done {
        cpu::forward(problem, out, lse)
    }

    fn backward(
        problem: &HostProblem<'_, f32>,
        saved: &HostSaved<'_, f32>,
        gradients: HostGradients<'_, f32>,
    ) -> Done {
        cpu::backward(problem, saved, gradients)
    }

    fn lse(lse: Vec<f32>) -> Lse {
        Lse::F32(lse)
    }
}

impl Element for f64 {
    fn forward(problem: &HostProblem<'_, f64>, out: ViewMut<'_, f64>, lse: &mut [f64]) -> Done {
        reference::forward(problem, out, lse)
    }

    fn backward(
        problem: &HostProblem<'_, f64>,
        saved: &HostSaved<'_, f64>,
        gradients: HostGradients<'_, f64>,
    ) -> Done {
        reference::backward(problem, saved, gradients)
    }

    fn lse(lse: Vec<f64>) -> Lse {
        Lse::F64(lse)
    }
}

/// The elements of a contiguous tensor.
fn elements<'a, T: WithDType>(
    argument: &str,
    (storage, layout): (&'a CpuStorage, &Layout),
) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{argument}: expected a contiguous tensor, got {layout:?}");
    };
    if storage.dtype() != T::DTYPE {
        bail!(
            "{argument}: expected {:?} like q, got {:?}",
            T::DTYPE,
            storage.dtype()
        );
    }
    Ok(&storage.as_slice::<T>()?[start..end])
}

fn on_cpu<'a>(argument: &str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!(
            "{argument}: expected a tensor on the CPU like q, got one on {:?}",
            storage.device()
        ),
    }
}

/// The keys and the values of a tensor that has both.
fn halves<'a, T: WithDType>(
    argument: &str,
    given: Given<'a, CpuStorage>,
) -> Result<([View<'a, T>; 2], Shape)> {
    let shape = kv_shape(argument, given.1.dims())?;
    let data = elements(argument, given)?;
    let layout = kv_layout(shape);
    let values = &data[values_offset(shape, data.len())..];
    Ok((
        [
            View { data, layout },
            View {
                data: values,
                layout,
            },
        ],
        shape,
    ))
}

/// The same, of a tensor that is held.
fn stored<'a, T: WithDType>(
    argument: &str,
    storage: &'a Storage,
    layout: &'a Layout,
) -> Result<([View<'a, T>; 2], Shape)> {
    halves(argument, (on_cpu(argument, storage)?, layout))
}

/// A tensor that has the shape of `q`.
fn like_q<'a, T: WithDType>(
    argument: &str,
    storage: &'a Storage,
    layout: &Layout,
) -> Result<View<'a, T>> {
    let shape = q_shape(layout.dims())?;
    Ok(View::packed(
        elements(argument, (on_cpu(argument, storage)?, layout))?,
        shape,
    ))
}

pub(crate) fn forward<T: Element>(
    op: &SegmentAttention,
    q: Given<'_, CpuStorage>,
    kv: Given<'_, CpuStorage>,
    prior: Option<Given<'_, CpuStorage>>,
) -> Result<(CpuStorage, candle_core::Shape)> {
    let shape = q_shape(q.1.dims())?;
    let [batch, rows, heads, _] = shape;
    let roles = Roles::new(&op.options, heads);
    let past = op.past();
    let past = past
        .as_ref()
        .map(|past| stored::<T>("past", &past.0, past.1));
    let past = past.transpose()?.map(|past| past.0);
    let prior = prior
        .map(|prior| halves::<T>("prior_kv", prior))
        .transpose()?;
    let q = View::packed(elements("q", q)?, shape);
    let problem = roles.problem(q, halves("kv", kv)?.0, prior.map(|prior| prior.0), past);
    let mut out = vec![T::zero(); shape.iter().product()];
    let mut lse = vec![T::zero(); batch * heads * rows];
    T::forward(&problem, ViewMut::packed(&mut out, shape), &mut lse).map_err(wrapped)?;
    op.keep(T::lse(lse));
    Ok((T::to_cpu_storage_owned(out), shape.to_vec().into()))
}

pub(crate) fn backward<T: Element>(
    op: &SegmentAttention,
    q: &Tensor,
    kv: &Tensor,
    prior_kv: Option<&Tensor>,
    [out, d_out]: [&Tensor; 2],
    lse: &[T],
) -> Result<Gradients> {
    let shape = q_shape(q.dims())?;
    let [batch, _, heads, _] = shape;
    let roles = Roles::new(&op.options, heads);
    let [q, kv, out, d_out] = [q, kv, out, d_out].map(Tensor::storage_and_layout);
    let prior_kv = prior_kv.map(Tensor::storage_and_layout);
    let past = op.past();
    let past = past
        .as_ref()
        .map(|past| stored::<T>("past", &past.0, past.1));
    let past = past.transpose()?.map(|past| past.0);
    let prior = prior_kv.as_ref();
    let prior = prior.map(|prior| stored::<T>("prior_kv", &prior.0, prior.1));
    let prior = prior.transpose()?;
    let (kv, kv_shape) = stored("kv", &kv.0, kv.1)?;
    let problem = roles.problem(
        like_q("q", &q.0, q.1)?,
        kv,
        prior.map(|prior| prior.0),
        past,
    );
    let saved = Saved::new(
        like_q("out", &out.0, out.1)?,
        lse,
        like_q("d_out", &d_out.0, d_out.1)?,
    );

    let zeros = |shape: Shape| vec![T::zero(); shape.iter().product()];
    let mut d_q = zeros(shape);
    let [mut d_k, mut d_v] = [zeros(kv_shape), zeros(kv_shape)];
    let mut d_prior = prior.map(|(_, shape)| ([zeros(shape), zeros(shape)], shape));
    let mut d_gate = vec![T::zero(); batch * heads];
    let mut written = Written::new(
        ViewMut::packed(&mut d_q, shape),
        ViewMut::packed(&mut d_k, kv_shape),
        ViewMut::packed(&mut d_v, kv_shape),
        d_gate.as_mut_slice(),
    );
    if let Some(([d_k, d_v], shape)) = &mut d_prior {
        written = written.prior(ViewMut::packed(d_k, *shape), ViewMut::packed(d_v, *shape));
    }
    T::backward(&problem, &saved, written).map_err(wrapped)?;
    let tensor = |data, shape: Shape| Tensor::from_vec(data, shape.to_vec(), &Device::Cpu);
    let beside =
        |[k, v]: [Vec<T>; 2], shape| Tensor::stack(&[tensor(k, shape)?, tensor(v, shape)?], 2);
    let d_prior = d_prior
        .map(|(halves, shape)| beside(halves, shape))
        .transpose()?;
    Ok((tensor(d_q, shape)?, beside([d_k, d_v], kv_shape)?, d_prior))
}
