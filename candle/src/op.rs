//! The operation as candle's autograd knows it. Candle gives a backward pass one result of the forward pass, so the
//! other one, the log-sum-exp of each row, is kept here.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape,
    StorageRef, Tensor, bail,
};

use crate::{Options, host};

/// The log-sum-exp of a forward pass, `[batch, q_heads, rows]`.
pub(crate) enum Lse {
    F32(Vec<f32>),
    F64(Vec<f64>),
    #[cfg(feature = "cuda")]
    Cuda(cudarc::driver::CudaSlice<f32>),
}

/// One call.
pub(crate) struct SegmentAttention {
    pub options: Options,
    lse: Mutex<Option<Lse>>,
}

/// A tensor as a forward pass gets it.
pub(crate) type Given<'a, S> = (&'a S, &'a Layout);

/// The gradients of `q`, `kv` and, where there is one, of `prior_kv`.
pub(crate) type Gradients = (Tensor, Tensor, Option<Tensor>);

impl SegmentAttention {
    pub fn new(options: &Options) -> Result<Self> {
        let mut options = options.clone();
        if let Some(past) = &mut options.past {
            past.kv = past.kv.detach().contiguous()?;
        }
        Ok(SegmentAttention {
            options,
            lse: Mutex::new(None),
        })
    }

    pub fn keep(&self, lse: Lse) {
        *self.lse.lock().unwrap_or_else(PoisonError::into_inner) = Some(lse);
    }

    /// The past rows, where there are any.
    pub fn past(&self) -> Option<(StorageRef<'_>, &Layout)> {
        let past = self.options.past.as_ref()?;
        Some(past.kv.storage_and_layout())
    }

    fn on_cpu(
        &self,
        q: Given<'_, CpuStorage>,
        kv: Given<'_, CpuStorage>,
        prior: Option<Given<'_, CpuStorage>>,
    ) -> Result<(CpuStorage, Shape)> {
        match q.0.dtype() {
            DType::F32 => host::forward::<f32>(self, q, kv, prior),
            DType::F64 => host::forward::<f64>(self, q, kv, prior),
            dtype => bail!("q: supported are f32 and f64 on the CPU, got {dtype:?}"),
        }
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(
        &self,
        q: Given<'_, CudaStorage>,
        kv: Given<'_, CudaStorage>,
        prior: Option<Given<'_, CudaStorage>>,
    ) -> Result<(CudaStorage, Shape)> {
        match q.0.dtype() {
            DType::BF16 => crate::gpu::forward::<half::bf16>(self, q, kv, prior),
            DType::F16 => crate::gpu::forward::<half::f16>(self, q, kv, prior),
            dtype => bail!("q: supported are bf16 and f16 on CUDA, got {dtype:?}"),
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn on_cuda(
        &self,
        _: Given<'_, CudaStorage>,
        _: Given<'_, CudaStorage>,
        _: Option<Given<'_, CudaStorage>>,
    ) -> Result<(CudaStorage, Shape)> {
        bail!("segattn-candle was built without CUDA: build it with the feature `cuda`")
    }

    fn gradients(
        &self,
        q: &Tensor,
        kv: &Tensor,
        prior_kv: Option<&Tensor>,
        [out, d_out]: [&Tensor; 2],
    ) -> Result<Gradients> {
        let lse = self.lse.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lse) = lse.as_ref() else {
            bail!("a backward pass without a forward pass");
        };
        let (out, d_out) = (&out.contiguous()?, &d_out.contiguous()?);
        match (q.device(), lse) {
            (Device::Cpu, Lse::F32(lse)) => {
                host::backward(self, q, kv, prior_kv, [out, d_out], lse)
            }
            (Device::Cpu, Lse::F64(lse)) => {
                host::backward(self, q, kv, prior_kv, [out, d_out], lse)
            }
            #[cfg(feature = "cuda")]
            (Device::Cuda(device), Lse::Cuda(lse)) => match q.dtype() {
                DType::BF16 => crate::gpu::backward::<half::bf16>(
                    self,
                    device,
                    q,
                    kv,
                    prior_kv,
                    [out, d_out],
                    lse,
                ),
                _ => crate::gpu::backward::<half::f16>(
                    self,
                    device,
                    q,
                    kv,
                    prior_kv,
                    [out, d_out],
                    lse,
                ),
            },
            (device, _) => bail!("q: expected the device of the forward pass, got {device:?}"),
        }
    }
}

impl CustomOp2 for SegmentAttention {
    fn name(&self) -> &'static str {
        "segment-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        kv: &CpuStorage,
        kv_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu((q, q_layout), (kv, kv_layout), None)
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        kv: &CudaStorage,
        kv_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda((q, q_layout), (kv, kv_layout), None)
    }

    fn bwd(
        &self,
        q: &Tensor,
        kv: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_q, d_kv, _) = self.gradients(q, kv, None, [out, d_out])?;
        Ok((Some(d_q), Some(d_kv)))
    }
}

impl CustomOp3 for SegmentAttention {
    fn name(&self) -> &'static str {
        "segment-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        kv: &CpuStorage,
        kv_layout: &Layout,
        prior: &CpuStorage,
        prior_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu((q, q_layout), (kv, kv_layout), Some((prior, prior_layout)))
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        kv: &CudaStorage,
        kv_layout: &Layout,
        prior: &CudaStorage,
        prior_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda((q, q_layout), (kv, kv_layout), Some((prior, prior_layout)))
    }

    fn bwd(
        &self,
        q: &Tensor,
        kv: &Tensor,
        prior_kv: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (d_q, d_kv, d_prior) = self.gradients(q, kv, Some(prior_kv), [out, d_out])?;
        Ok((Some(d_q), Some(d_kv), d_prior))
    }
}
