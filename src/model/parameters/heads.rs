//! Places of the elements of heads in memory, where they are not those of files.

use crate::model::config::ModelConfig;

/// The places of the elements of a head. The devices rotate element `i` together with `i + head_dim/2`. Where only the
/// first `rotary_dim` elements rotate, files pair `i` with `i + rotary_dim/2`. So queries and keys are kept in another
/// order, which their products do not depend on: the first halves of the pairs begin a head, the second halves begin
/// its second half.
///
/// Heads of a size that devices have no kernels for are kept longer than in files, all of them in this order. What is
/// added is 0 in every weight, so it is 0 in queries, keys and values and in all gradients, and adds nothing to a sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadOrder {
    /// The first heads of the tensor, which are kept so.
    pub heads: usize,
    /// Elements of a head as it is kept.
    pub head_dim: usize,
    /// Those that files have.
    pub file_dim: usize,
    /// Those that rotate.
    pub rotary_dim: usize,
    /// Numbers of an element: the columns of a matrix.
    pub width: usize,
}

impl HeadOrder {
    /// Of the first `heads` heads, where their places are not those of files.
    pub(super) fn of(config: &ModelConfig, heads: usize, width: usize) -> Option<Self> {
        let (head_dim, rotary_dim) = (config.head_dim, config.rotary_dim());
        (rotary_dim < head_dim && heads > 0).then_some(Self {
            heads,
            head_dim,
            file_dim: config.file_head_dim,
            rotary_dim,
            width,
        })
    }

    /// Of stacked queries, keys and values: values are only made longer.
    pub(super) fn of_qkv(config: &ModelConfig, width: usize) -> Option<Self> {
        let values = match config.head_dim == config.file_head_dim {
            true => 0,
            false => config.num_key_value_heads,
        };
        let turned = config.num_attention_heads + config.num_key_value_heads;
        Self::of(config, turned + values, width)
    }

    /// Of the columns of a matrix of so many rows that attention's result is multiplied by.
    pub(super) fn of_columns(config: &ModelConfig, rows: usize) -> Option<Self> {
        let order = Self::of(config, rows * config.num_attention_heads, 1);
        order.filter(|order| order.head_dim > order.file_dim)
    }

    /// Place in a file of the element that is kept at `at`, if files have it.
    fn file_place(&self, at: usize) -> Option<usize> {
        let (half, turning) = (self.head_dim / 2, self.rotary_dim / 2);
        let (second, i) = (at / half, at % half);
        let place = match i < turning {
            true => second * turning + i,
            false => self.rotary_dim + second * (half - turning) + i - turning,
        };
        (place < self.file_dim).then_some(place)
    }

    /// The order of kept columns `[column, column + out)`, as that of a tensor of their own; `None` where it is that
    /// of files. Columns are whole heads.
    pub(in crate::model) fn part(self, column: usize, out: usize) -> Option<Self> {
        let heads = (self.heads * self.head_dim).saturating_sub(column).min(out) / self.head_dim;
        (heads > 0).then_some(Self { heads, ..self })
    }

    /// The order of the columns of one of a matrix's `rows`, where this is [`Self::of_columns`].
    pub(in crate::model) fn of_row(self, rows: usize) -> Self {
        let heads = self.heads / rows;
        Self { heads, ..self }
    }

    /// The order of so many rows, of which this is one.
    pub(in crate::model) fn rows(self, rows: usize) -> Self {
        let heads = self.heads * rows;
        Self { heads, ..self }
    }

    /// Values of a file at the places at which they are kept.
    pub(super) fn kept(&self, values: &[f32]) -> Vec<f32> {
        self.moved(values, [self.file_dim, self.head_dim], |at| {
            Some((self.file_place(at)?, at))
        })
    }

    /// Kept values at the places that files have.
    pub(super) fn filed(&self, values: &[f32]) -> Vec<f32> {
        self.moved(values, [self.head_dim, self.file_dim], |at| {
            Some((at, self.file_place(at)?))
        })
    }

    /// Heads of `dims[0]` elements as heads of `dims[1]`; `places` says from where to where a kept element goes.
    fn moved(
        &self,
        values: &[f32],
        dims: [usize; 2],
        places: impl Fn(usize) -> Option<(usize, usize)>,
    ) -> Vec<f32> {
        let width = self.width;
        let [from_len, to_len] = dims.map(|dim| dim * width);
        let (heads, rest) = values.split_at(self.heads * from_len);
        let mut moved = Vec::with_capacity(self.heads * to_len + rest.len());
        moved.resize(self.heads * to_len, 0.0);
        let pairs: Vec<_> = (0..self.head_dim).filter_map(places).collect();
        for (from, to) in heads.chunks(from_len).zip(moved.chunks_mut(to_len)) {
            for (at, place) in &pairs {
                to[place * width..][..width].copy_from_slice(&from[at * width..][..width]);
            }
        }
        moved.extend_from_slice(rest);
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longer_heads_hold_what_files_have_and_zeros() {
        let order = HeadOrder {
            heads: 2,
            head_dim: 8,
            file_dim: 6,
            rotary_dim: 4,
            width: 1,
        };
        let file: Vec<f32> = (1..=14).map(|x| x as f32).collect();
        let kept = order.kept(&file);
        // Pairs that rotate are half a head apart: 1 and 3, 2 and 4.
        assert_eq!(kept[..8], [1.0, 2.0, 5.0, 6.0, 3.0, 4.0, 0.0, 0.0]);
        assert_eq!(kept[16..], [13.0, 14.0]);
        assert_eq!(order.filed(&kept), file);
    }
}
