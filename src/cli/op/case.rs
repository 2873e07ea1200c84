//! The files of the operation: a case in, results out. The simulated GPU's own `op` reads and writes by this file too.

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use segattn::attention::{Lengths, Problem};

/// A case as it lies in the file.
pub struct Case {
    /// batch, segment, q_heads, head_dim
    pub q_shape: [usize; 4],
    pub kv_heads: usize,
    pub prior: usize,
    pub past: usize,
    pub floats: Vec<(&'static str, Vec<f32>)>,
    pub d_lse: Option<Vec<f32>>,
    pub past_gate: Vec<f32>,
    pub prior_heads: Vec<bool>,
    pub segment_len: Vec<i32>,
    pub prior_len: Vec<i32>,
    pub past_len: Vec<i32>,
    pub sink_len: Option<Vec<i32>>,
    pub scale: Option<f32>,
}

/// Names of the result, in order.
pub const RESULTS: [&str; 8] = [
    "out",
    "lse",
    "d_q",
    "d_k",
    "d_v",
    "d_prior_k",
    "d_prior_v",
    "d_past_gate",
];

impl Case {
    /// Reads a case's file.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).context("not a safetensors file")?;
        let scale =
            match metadata.metadata().as_ref().and_then(|m| m.get("scale")) {
                Some(text) => Some(text.parse().with_context(|| {
                    format!("metadata `scale`: expected a number, got {text:?}")
                })?),
                None => None,
            };
        let file = SafeTensors::deserialize(bytes)?;
        let q_shape = four(&file, "q")?;
        let [batch, segment, q_heads, dim] = q_shape;
        // Without elements a tensor of a few bytes may have any number of rows, and `lse` has a number for each.
        ensure!(
            dim > 0,
            "tensor `q`: expected head_dim of at least 1, got shape {q_shape:?}"
        );
        let [.., kv_heads, _] = four(&file, "k")?;
        let rows = |name| Ok::<_, anyhow::Error>(four(&file, name)?[1]);
        let (prior, past) = (rows("prior_k")?, rows("past_k")?);
        let kv = |rows| vec![batch, rows, kv_heads, dim];
        let expected = [
            ("q", q_shape.to_vec()),
            ("k", kv(segment)),
            ("v", kv(segment)),
            ("prior_k", kv(prior)),
            ("prior_v", kv(prior)),
            ("past_k", kv(past)),
            ("past_v", kv(past)),
            ("d_out", q_shape.to_vec()),
        ];
        let floats = expected
            .iter()
            .map(|(name, shape)| Ok((*name, f32s(&file, name, shape)?)))
            .collect::<Result<_>>()?;
        let d_lse = file.tensor("d_lse").is_ok();
        let d_lse = d_lse.then(|| f32s(&file, "d_lse", &[batch, q_heads, segment]));
        let i32s = |name| -> Result<Vec<i32>> {
            let data = tensor(&file, name, Dtype::I32, &[batch])?;
            Ok(bytemuck::allocation::pod_collect_to_vec(data.data()))
        };
        Ok(Self {
            q_shape,
            kv_heads,
            prior,
            past,
            floats,
            d_lse: d_lse.transpose()?,
            past_gate: f32s(&file, "past_gate", &[q_heads])?,
            prior_heads: flags(&file, q_heads)?,
            segment_len: i32s("segment_len")?,
            prior_len: i32s("prior_len")?,
            past_len: i32s("past_len")?,
            sink_len: match file.tensor("sink_len") {
                Ok(_) => Some(i32s("sink_len")?),
                Err(_) => None,
            },
            scale,
        })
    }

    /// The case's problem, given each tensor by its name and shape.
    pub fn problem<'a, X>(
        &'a self,
        mut tensor: impl FnMut(&'static str, [usize; 4]) -> Result<X>,
    ) -> Result<Problem<'a, X>> {
        let [batch, segment, _, dim] = self.q_shape;
        let kv = |rows| [batch, rows, self.kv_heads, dim];
        let q = tensor("q", self.q_shape)?;
        let (k, v) = (tensor("k", kv(segment))?, tensor("v", kv(segment))?);
        let prior = kv(self.prior);
        let (prior_k, prior_v) = (tensor("prior_k", prior)?, tensor("prior_v", prior)?);
        let past = kv(self.past);
        let (past_k, past_v) = (tensor("past_k", past)?, tensor("past_v", past)?);
        let lengths = Lengths::segment(&self.segment_len)
            .prior(&self.prior_len)
            .past(&self.past_len);
        let lengths = match &self.sink_len {
            Some(len) => lengths.sinks(len),
            None => lengths,
        };
        Ok(Problem::causal(q, k, v)
            .prior(prior_k, prior_v, &self.prior_heads)
            .past(past_k, past_v, &self.past_gate)
            .lengths(lengths)
            .scale(self.scale))
    }

    /// Shapes of the results, in the order of [`RESULTS`].
    pub fn result_shapes(&self) -> Vec<Vec<usize>> {
        let [batch, segment, q_heads, dim] = self.q_shape;
        let kv = |rows| vec![batch, rows, self.kv_heads, dim];
        vec![
            self.q_shape.to_vec(),
            vec![batch, q_heads, segment],
            self.q_shape.to_vec(),
            kv(segment),
            kv(segment),
            kv(self.prior),
            kv(self.prior),
            vec![q_heads],
        ]
    }

    /// The file of the results, which are in the order of [`RESULTS`].
    pub fn serialize(&self, results: &[Vec<f32>]) -> Result<Vec<u8>> {
        let shapes = self.result_shapes();
        let views = RESULTS
            .iter()
            .zip(&shapes)
            .zip(results)
            .map(|((name, shape), data)| {
                let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(data))?;
                Ok((*name, view))
            });
        let views = views.collect::<Result<Vec<_>>>()?;
        Ok(safetensors::serialize(views, None)?)
    }
}

fn tensor<'a>(
    file: &SafeTensors<'a>,
    name: &str,
    dtype: Dtype,
    shape: &[usize],
) -> Result<TensorView<'a>> {
    let found = file
        .tensor(name)
        .with_context(|| format!("tensor `{name}`"))?;
    ensure!(
        found.dtype() == dtype,
        "tensor `{name}`: expected {dtype:?}, got {:?}",
        found.dtype()
    );
    ensure!(
        found.shape() == shape,
        "tensor `{name}`: expected shape {shape:?}, got {:?}",
        found.shape()
    );
    Ok(found)
}

/// The shape of a tensor of four dimensions.
fn four(file: &SafeTensors<'_>, name: &str) -> Result<[usize; 4]> {
    let found = file
        .tensor(name)
        .with_context(|| format!("tensor `{name}`"))?;
    let shape = found.shape();
    match <[usize; 4]>::try_from(shape) {
        Ok(shape) => Ok(shape),
        Err(_) => {
            bail!("tensor `{name}`: expected [batch, rows, heads, head_dim], got shape {shape:?}")
        }
    }
}

fn f32s(file: &SafeTensors<'_>, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let found = tensor(file, name, Dtype::F32, shape)?;
    Ok(bytemuck::allocation::pod_collect_to_vec(found.data()))
}

fn flags(file: &SafeTensors<'_>, heads: usize) -> Result<Vec<bool>> {
    let found = tensor(file, "prior_heads", Dtype::U8, &[heads])?;
    let flag = |x: &u8| match x {
        0 => Ok(false),
        1 => Ok(true),
        other => bail!("tensor `prior_heads`: expected 0 or 1, got {other}"),
    };
    found.data().iter().map(flag).collect()
}
