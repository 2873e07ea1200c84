//! The arguments of a call as `segattn.attention` collects them.

use pyo3::prelude::*;
use segattn::attention::{Error, Gates, Len, Lengths, PastLen, Problem};

use crate::tensor::Tensor;

/// Numbers that a call reads before it starts, or their address in device memory.
#[derive(Debug, FromPyObject)]
pub enum Values<T> {
    /// In host memory.
    Host(Vec<T>),
    /// Address.
    Device(u64),
}

/// Numbers of past rows, and whether there is one for each KV head.
#[derive(Debug, FromPyObject)]
pub struct PastRows(Values<i32>, bool);

/// A dict with all of these keys.
#[derive(Debug, FromPyObject)]
#[pyo3(from_item_all)]
pub struct Arguments {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: Option<(Tensor, Tensor)>,
    prior_heads: Vec<bool>,
    past: Option<(Tensor, Tensor)>,
    past_gate: Values<f32>,
    past_heads: Vec<bool>,
    segment_len: Option<Values<i32>>,
    prior_len: Option<Values<i32>>,
    past_len: Option<PastRows>,
    sink_len: Option<PastRows>,
    query_start: Option<Values<i32>>,
    scale: Option<f32>,
}

impl Arguments {
    /// The problem, on tensors that `make` makes.
    pub fn problem<X>(
        &self,
        make: impl Fn(&'static str, &Tensor) -> Result<X, Error>,
    ) -> Result<Problem<'_, X>, Error> {
        let mut problem = Problem::causal(
            make("q", &self.q)?,
            make("k", &self.k)?,
            make("v", &self.v)?,
        );
        if let Some((k, v)) = &self.prior {
            let (k, v) = (make("prior_k", k)?, make("prior_v", v)?);
            problem = problem.prior(k, v, &self.prior_heads);
        }
        if let Some((k, v)) = &self.past {
            let gates = match &self.past_gate {
                Values::Host(gates) => Gates::Host(gates),
                Values::Device(past_gate) => Gates::Device {
                    past_gate: *past_gate,
                    reads_past: &self.past_heads,
                },
            };
            problem = problem.past(make("past_k", k)?, make("past_v", v)?, gates);
        }
        Ok(problem.lengths(self.lengths()).scale(self.scale))
    }

    fn lengths(&self) -> Lengths<'_> {
        Lengths {
            segment_len: self.segment_len.as_ref().map(Len::from),
            prior_len: self.prior_len.as_ref().map(Len::from),
            past_len: self.past_len.as_ref().map(PastLen::from),
            sink_len: self.sink_len.as_ref().map(PastLen::from),
            query_start: self.query_start.as_ref().map(Len::from),
        }
    }
}

impl<'a> From<&'a PastRows> for PastLen<'a> {
    fn from(PastRows(values, per_head): &'a PastRows) -> Self {
        match per_head {
            true => PastLen::PerHead(values.into()),
            false => PastLen::PerBatch(values.into()),
        }
    }
}

impl<'a> From<&'a Values<i32>> for Len<'a> {
    fn from(values: &'a Values<i32>) -> Self {
        match values {
            Values::Host(values) => Len::Host(values),
            Values::Device(address) => Len::Device(*address),
        }
    }
}
