//! The checks of an attention call's shapes, lengths and gates: once, for every backend.

use super::error::Error;
use super::layout::{Batch, Elements, Layout, Strided};
use super::lengths::{Len, PastLen};
use super::problem::{Gates, Gradients, Problem, Saved};
use super::source::{PerSource, Source};

/// Names of a source's keys, values and lengths.
const NAMES: PerSource<[&str; 3]> = PerSource {
    past: ["past_k", "past_v", "past_len"],
    prior: ["prior_k", "prior_v", "prior_len"],
    current: ["k", "v", "segment_len"],
};

impl<X: Strided> Problem<'_, X> {
    /// Checks every argument; the computations trust what passed. Device-resident lengths and gates are trusted, and
    /// every row of the tensors they count must lie inside its memory.
    ///
    /// # Errors
    /// An [`Error`] that names the argument, what was expected and what came.
    pub fn validate(&self) -> Result<(), Error> {
        self.check_shapes()?;
        self.check_roles()?;
        self.check_counts()?;
        self.check_lengths()?;
        self.check_rows("q", &self.q, |batch_index, _| self.query_rows(batch_index))?;
        for source in Source::ALL {
            let Some(tensors) = self.source(source) else {
                continue;
            };
            for (name, tensor) in NAMES[source].iter().zip(tensors) {
                self.check_rows(name, tensor, |batch_index, head| {
                    self.source_rows(source, batch_index, head)
                })?;
            }
        }
        Ok(())
    }

    /// Checks everything that a forward pass gets: `out` like `q`, and `lse` `[batch, q_heads, rows]`, or `[q_heads,
    /// rows]` of each packed batch element.
    pub(super) fn validate_forward(
        &self,
        out: &impl Strided,
        lse: &impl Elements,
    ) -> Result<(), Error> {
        self.validate()?;
        self.check_output("out", out, ("q", &self.q))?;
        self.check_lse("lse", lse)
    }

    /// Checks everything that a backward pass gets.
    pub(super) fn validate_backward(
        &self,
        saved: &Saved<X, impl Elements>,
        gradients: &Gradients<impl Strided, impl Elements>,
    ) -> Result<(), Error> {
        self.validate()?;
        self.check_no_query_start()?;
        self.check_like_q("out", &saved.out)?;
        self.check_like_q("d_out", &saved.d_out)?;
        self.check_lse("lse", &saved.lse)?;
        if let Some(d_lse) = &saved.d_lse {
            self.check_lse("d_lse", d_lse)?;
        }
        self.check_output("d_q", &gradients.d_q, ("q", &self.q))?;
        self.check_key_output("d_k", &gradients.d_k, ("k", &self.k))?;
        self.check_key_output("d_v", &gradients.d_v, ("v", &self.v))?;
        match (&gradients.d_prior, &self.prior) {
            (None, _) => {}
            (Some((d_k, d_v)), Some(prior)) => {
                for (name, tensor, like) in [
                    ("d_prior_k", d_k, ("prior_k", &prior.k)),
                    ("d_prior_v", d_v, ("prior_v", &prior.v)),
                ] {
                    self.check_output(name, tensor, like)?;
                    if tensor.layout().is_packed() {
                        return Err(shape(name, "batch elements of equal rows", "packed ones"));
                    }
                }
            }
            (Some(_), None) => {
                let expected = "none, as the problem has no prior";
                return Err(shape("d_prior", expected, "gradients"));
            }
        }
        let expected = self.batch().saturating_mul(self.q_heads());
        let got = gradients.d_past_gate.elements();
        check_count("d_past_gate", got, expected, "batch * q_heads")
    }

    /// Heads, row sizes and batch elements of every tensor.
    fn check_shapes(&self) -> Result<(), Error> {
        let (q_heads, kv_heads) = (self.q_heads(), self.kv_heads());
        if kv_heads == 0 {
            return Err(shape("kv_heads", "at least 1", 0));
        }
        if q_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
            let expected = format!("a positive multiple of kv_heads = {kv_heads}");
            return Err(shape("q_heads", expected, q_heads));
        }
        if self.head_dim() == 0 {
            return Err(shape("head_dim", "at least 1", 0));
        }
        check_packed("q", &self.q.layout())?;
        self.tensors()[1..].iter().try_for_each(|(name, tensor)| {
            tensor.map_or(Ok(()), |tensor| self.check_shape(name, tensor, kv_heads))
        })
    }

    fn check_shape(
        &self,
        argument: &'static str,
        tensor: &impl Strided,
        heads: usize,
    ) -> Result<(), Error> {
        let layout = tensor.layout();
        check_packed(argument, &layout)?;
        let (got, batch) = (layout.batch.len(), self.batch());
        if got != batch {
            return Err(shape(argument, format!("{batch} batch elements"), got));
        }
        if layout.heads != heads {
            return Err(shape(argument, format!("{heads} heads"), layout.heads));
        }
        if layout.head_dim != self.head_dim() {
            let expected = format!("rows of head_dim = {}", self.head_dim());
            return Err(shape(argument, expected, layout.head_dim));
        }
        Ok(())
    }

    /// Which heads read what, and with which weight.
    fn check_roles(&self) -> Result<(), Error> {
        let heads = self.q_heads();
        if let Some(prior) = &self.prior {
            check_count("prior_heads", prior.heads.len(), heads, "q_heads")?;
        }
        let gates = match self.past.as_ref().map(|past| past.gates) {
            None => &[],
            Some(Gates::Host(gates)) => {
                check_count("past_gate", gates.len(), heads, "q_heads")?;
                gates
            }
            Some(Gates::Device { reads_past, .. }) => {
                check_count("reads_past", reads_past.len(), heads, "q_heads")?;
                &[]
            }
        };
        let wrong = |argument, index, expected, got| {
            Err(Error::Value {
                argument,
                index,
                expected,
                got,
            })
        };
        let is_gate = |gate: &f32| gate.is_finite() && *gate >= 0.0;
        if let Some(index) = gates.iter().position(|gate| !is_gate(gate)) {
            return wrong("past_gate", index, "a finite number >= 0", gates[index]);
        }
        match self.scale {
            Some(scale) if !scale.is_finite() => wrong("scale", 0, "a finite number", scale),
            _ => Ok(()),
        }
    }

    /// Whether there are as many lengths as batch elements (or KV heads), and none of a source that is not there.
    fn check_counts(&self) -> Result<(), Error> {
        let (batch, heads) = (self.batch(), self.kv_heads());
        let is_per_head = |name| {
            let len = match name {
                "past_len" => self.lengths.past_len,
                "sink_len" => self.lengths.sink_len,
                _ => None,
            };
            matches!(len, Some(PastLen::PerHead(_)))
        };
        for (name, len) in self.lengths.named() {
            let absent = match name {
                "prior_len" => self.prior.is_none(),
                "past_len" | "sink_len" => self.past.is_none(),
                _ => false,
            };
            if absent {
                return Err(shape(name, "none, as the source is not there", "lengths"));
            }
            match len {
                Len::Device(_) => {}
                Len::Host(len) if is_per_head(name) => {
                    let expected = batch.saturating_mul(heads);
                    check_count(name, len.len(), expected, "batch * kv_heads")?;
                }
                Len::Host(len) => check_count(name, len.len(), batch, "batch")?,
            }
        }
        Ok(())
    }

    /// Every length against the rows of its tensors.
    fn check_lengths(&self) -> Result<(), Error> {
        for source in Source::ALL {
            let [_, v_name, len_name] = NAMES[source];
            let mut lengths = self.lengths.named();
            match (
                lengths.find(|(name, _)| *name == len_name),
                self.source(source),
            ) {
                (Some((name, Len::Host(len))), _) => self.check_range(source, name, len)?,
                (None, Some([k, v])) => {
                    check_same_rows(v_name, &v.layout(), (NAMES[source][0], &k.layout()))?;
                }
                _ => {}
            }
        }
        self.check_sinks()?;
        (0..self.batch()).try_for_each(|batch_index| self.check_query_rows(batch_index))
    }

    /// Lengths in host memory against the rows of their source. There may be one for each KV head.
    fn check_range(
        &self,
        source: Source,
        argument: &'static str,
        lengths: &[i32],
    ) -> Result<(), Error> {
        let each = (lengths.len() / self.batch().max(1)).max(1);
        for (index, &len) in lengths.iter().enumerate() {
            let rows = self.capacity_of(source, index / each);
            if !usize::try_from(len).is_ok_and(|len| len <= rows) {
                return Err(Error::Length {
                    argument,
                    index,
                    expected: format!("0 to {rows} rows"),
                    got: len.into(),
                });
            }
        }
        Ok(())
    }

    /// Sinks are rows of the past.
    fn check_sinks(&self) -> Result<(), Error> {
        let Some((len, Len::Host(values))) = self.lengths.sink_len.map(|len| (len, len.values()))
        else {
            return Ok(());
        };
        let kv_heads = self.kv_heads();
        for (batch_index, kv_head) in
            (0..self.batch()).flat_map(|b| (0..kv_heads).map(move |head| (b, head)))
        {
            let index = len.index(batch_index, kv_head, kv_heads);
            let rows = self.source_rows(Source::Past, batch_index, kv_head);
            if usize::try_from(values[index]).is_ok_and(|sinks| sinks <= rows) {
                continue;
            }
            return Err(Error::Length {
                argument: "sink_len",
                index,
                expected: format!("0 to past_len = {rows}"),
                got: values[index].into(),
            });
        }
        Ok(())
    }

    /// The query rows of a batch element, which end with its segment.
    fn check_query_rows(&self, batch_index: usize) -> Result<(), Error> {
        let refused = |argument, expected, got| {
            Err(Error::Length {
                argument,
                index: batch_index,
                expected,
                got,
            })
        };
        let end = self.source_rows(Source::Current, batch_index, 0);
        let start = match self.lengths.query_start {
            Some(Len::Host(start)) => i64::from(start[batch_index]),
            _ => self.query_start(batch_index) as i64,
        };
        if start < 0 || start > end as i64 {
            return refused("query_start", format!("0 to segment_len = {end}"), start);
        }
        let (rows, own) = (end - start as usize, self.rows_of(batch_index));
        match self.q.layout().is_packed() {
            true if rows != own => {
                let expected = format!("query_start + the {own} rows of q, which is packed");
                refused("segment_len", expected, end as i64)
            }
            false if rows > own => {
                let expected = format!("query_start + at most {own} rows of q");
                refused("segment_len", expected, end as i64)
            }
            _ => Ok(()),
        }
    }

    fn check_no_query_start(&self) -> Result<(), Error> {
        let (argument, expected) = ("query_start", "0 in a backward pass");
        match self.lengths.query_start {
            Some(Len::Device(_)) => Err(Error::Unsupported {
                argument,
                expected,
                got: "a device address".into(),
            }),
            Some(Len::Host(start)) => match start.iter().position(|&start| start != 0) {
                None => Ok(()),
                Some(index) => Err(Error::Length {
                    argument,
                    index,
                    expected: expected.into(),
                    got: start[index].into(),
                }),
            },
            None => Ok(()),
        }
    }

    /// Checks that the valid rows of an input lie inside its data.
    fn check_rows(
        &self,
        argument: &'static str,
        tensor: &X,
        rows: impl Fn(usize, usize) -> usize,
    ) -> Result<(), Error> {
        let (layout, elements) = (tensor.layout(), tensor.elements());
        for batch_index in 0..self.batch() {
            for head in 0..layout.heads {
                layout.check_rows(
                    argument,
                    elements,
                    [batch_index, rows(batch_index, head), head],
                )?;
            }
        }
        Ok(())
    }

    /// Checks a tensor like `q` that a backward pass reads.
    fn check_like_q(&self, argument: &'static str, tensor: &X) -> Result<(), Error> {
        self.check_shape(argument, tensor, self.q_heads())?;
        check_same_rows(argument, &tensor.layout(), ("q", &self.q.layout()))?;
        self.check_rows(argument, tensor, |batch_index, _| {
            self.query_rows(batch_index)
        })
    }

    /// Checks `[batch, q_heads, rows]` numbers.
    fn check_lse(&self, argument: &'static str, numbers: &impl Elements) -> Result<(), Error> {
        let expected = self.q_heads().saturating_mul(self.all_rows());
        let meaning = "batch * q_heads * rows of q";
        check_count(argument, numbers.elements(), expected, meaning)
    }

    /// Checks the gradient of current keys or values. Where the queries are packed, it is packed like them, whatever
    /// the layout of the keys.
    fn check_key_output(
        &self,
        argument: &'static str,
        tensor: &impl Strided,
        (like_name, like): (&str, &X),
    ) -> Result<(), Error> {
        let (layout, q) = (tensor.layout(), self.q.layout());
        if !q.is_packed() && !layout.is_packed() {
            return self.check_output(argument, tensor, (like_name, like));
        }
        self.check_shape(argument, tensor, like.layout().heads)?;
        check_same_rows(argument, &layout, ("q", &q))?;
        self.check_written(argument, tensor)
    }

    /// Checks a tensor that is written: shaped like `like`, every row inside the data, none overlapping.
    fn check_output(
        &self,
        argument: &'static str,
        tensor: &impl Strided,
        (like_name, like): (&str, &X),
    ) -> Result<(), Error> {
        let layout = tensor.layout();
        self.check_shape(argument, tensor, like.layout().heads)?;
        check_same_rows(argument, &layout, (like_name, &like.layout()))?;
        self.check_written(argument, tensor)
    }

    /// Every row inside the data, none overlapping.
    fn check_written(&self, argument: &'static str, tensor: &impl Strided) -> Result<(), Error> {
        let (layout, elements) = (tensor.layout(), tensor.elements());
        for batch_index in 0..self.batch() {
            layout.check_rows(
                argument,
                elements,
                [batch_index, layout.rows_of(batch_index), layout.heads - 1],
            )?;
        }
        match layout.overlaps(elements) {
            false => Ok(()),
            true => Err(Error::Overlap {
                argument,
                got: format!("{layout:?}"),
            }),
        }
    }
}

impl<X> Problem<'_, X> {
    /// Refuses lengths and gates in device memory, of which only addresses are known. `expected` says where they must
    /// be.
    pub(super) fn check_on_host(&self, expected: &'static str) -> Result<(), Error> {
        let on_device = |argument| {
            Err(Error::Unsupported {
                argument,
                expected,
                got: "a device address".into(),
            })
        };
        let mut lengths = self.lengths.named();
        if let Some((name, _)) = lengths.find(|(_, len)| matches!(len, Len::Device(_))) {
            return on_device(name);
        }
        match self.past.as_ref().map(|past| past.gates) {
            Some(Gates::Device { .. }) => on_device("past_gate"),
            _ => Ok(()),
        }
    }
}

fn shape(argument: &'static str, expected: impl Into<String>, got: impl ToString) -> Error {
    Error::Shape {
        argument,
        expected: expected.into(),
        got: got.to_string(),
    }
}

fn rows_of(name: &str, rows: usize) -> String {
    format!("the {rows} rows of {name}")
}

fn check_same_rows(
    argument: &'static str,
    layout: &Layout<'_>,
    (like_name, like): (&str, &Layout<'_>),
) -> Result<(), Error> {
    match (layout.batch, like.batch) {
        (Batch::Packed(got), Batch::Packed(expected)) if got == expected => Ok(()),
        (Batch::Packed(_), _) | (_, Batch::Packed(_)) => {
            let expected = format!("rows like those of {like_name}, {:?}", like.batch);
            Err(shape(argument, expected, format!("{:?}", layout.batch)))
        }
        _ if layout.rows == like.rows => Ok(()),
        _ => Err(shape(argument, rows_of(like_name, like.rows), layout.rows)),
    }
}

/// Checks that the offsets of packed batch elements ascend from 0 on, and the rows that an element has at most.
fn check_packed(argument: &'static str, layout: &Layout<'_>) -> Result<(), Error> {
    let Batch::Packed(offsets) = layout.batch else {
        return Ok(());
    };
    let rows = |pair: &[usize]| pair[1].checked_sub(pair[0]);
    let most = (offsets.windows(2)).try_fold(0, |most, pair| Some(rows(pair)?.max(most)));
    if offsets.first() != Some(&0) || most.is_none() {
        let expected = "row offsets that ascend from 0 on";
        return Err(shape(argument, expected, format!("{offsets:?}")));
    }
    match most == Some(layout.rows) {
        true => Ok(()),
        false => {
            let expected = format!(
                "the most rows of a packed batch element, {}",
                most.unwrap_or(0)
            );
            Err(shape(argument, expected, layout.rows))
        }
    }
}

fn check_count(
    argument: &'static str,
    got: usize,
    expected: usize,
    meaning: &str,
) -> Result<(), Error> {
    if got == expected {
        return Ok(());
    }
    Err(shape(
        argument,
        format!("{meaning} = {expected} elements"),
        got,
    ))
}
