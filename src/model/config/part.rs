//! A model cut into consecutive layers, each part a configuration of its own.

use std::ops::Range;

use super::{ModelConfig, SegmentConfig};

/// Which part of a model a configuration describes. Layers are counted within the part everywhere but in the names of
/// tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Number of the part's first layer in the whole model.
    pub first_layer: usize,
    /// Whether the part begins with the embedding.
    pub begins: bool,
    /// Whether it ends with the last norm and the head.
    pub ends: bool,
}

impl Part {
    /// All of a model.
    pub const WHOLE: Self = Self {
        first_layer: 0,
        begins: true,
        ends: true,
    };
}

impl ModelConfig {
    /// The part of this whole model that consists of `layers`.
    ///
    /// # Panics
    /// For layers that the model does not have.
    pub fn part_of(&self, layers: Range<usize>) -> Self {
        let mut part = self.clone();
        part.part = Part {
            first_layer: layers.start,
            begins: layers.start == 0,
            ends: layers.end == self.num_hidden_layers,
        };
        part.num_hidden_layers = layers.len();
        part.switches.unrotated = (self.switches.unrotated.iter())
            .filter(|l| layers.contains(l))
            .map(|l| l - layers.start)
            .collect();
        if let Some(SegmentConfig { head_reads, .. }) = &mut part.segment {
            *head_reads = head_reads[layers].to_vec();
        }
        part
    }

    /// The layers of each of `stages` parts, 1 to as many as there are layers, of about equal work. `head`: whether
    /// the head's product is made for all tokens, as in training; then it counts as so many layers as it has weights.
    pub fn stages(&self, stages: usize, head: bool) -> Vec<Range<usize>> {
        let (hidden, layers) = (self.hidden_size as f64, self.num_hidden_layers);
        let matrices = (2 * self.q_dim() + 2 * self.kv_dim() + 3 * self.intermediate_size) as f64;
        let work = match head {
            true => self.vocab_size as f64 * hidden / (matrices * hidden),
            false => 0.0,
        } + layers as f64;
        let mut end = 0;
        let ends = (1..=stages).map(|stage| {
            let even = (stage as f64 * work / stages as f64).round() as usize;
            end = even.clamp(end + 1, layers - (stages - stage));
            if stage == stages {
                end = layers;
            }
            end
        });
        let ends: Vec<usize> = ends.collect();
        let starts = std::iter::once(0).chain(ends.iter().copied());
        starts.zip(&ends).map(|(start, end)| start..*end).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_shared_out_evenly_and_the_head_counts_where_it_works() {
        let model = ModelConfig::new(32_000, 4096, 11_008, 32, 32, 32).unwrap();
        assert_eq!(model.stages(1, false), std::slice::from_ref(&(0..32)));
        assert_eq!(model.stages(2, false), [0..16, 16..32]);
        assert_eq!(model.stages(3, false), [0..11, 11..21, 21..32]);
        let heavy = ModelConfig::new(128_256, 2048, 8192, 16, 32, 8).unwrap();
        assert_eq!(heavy.stages(2, true), [0..10, 10..16]);
        let few = ModelConfig::new(1 << 20, 64, 64, 3, 4, 4).unwrap();
        assert_eq!(few.stages(3, true), [0..1, 1..2, 2..3]);
    }

    #[test]
    fn a_part_has_the_reads_of_its_own_layers() {
        let mut model = ModelConfig::new(256, 64, 64, 4, 4, 2).unwrap();
        model.switches.unrotated = vec![1, 3];
        let mut segment = SegmentConfig::new(16, 8, 8, 4, 2);
        segment.head_reads[3][1].past = true;
        model.segment = Some(segment);
        let part = model.part_of(2..4);
        assert_eq!(part.switches.unrotated, [1]);
        assert!(part.reads_past(1, 1) && !part.reads_past(0, 1));
        let Part {
            first_layer,
            begins,
            ends,
        } = part.part;
        assert_eq!((first_layer, begins, ends), (2, false, true));
        assert_eq!(model.part_of(0..4), model);
    }
}
