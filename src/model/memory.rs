//! How much memory a run of a model takes, before it is started.
//!
//! Counted from the same [`Plan`] that the run is made with, buffer by buffer; what attention needs
//! while it works and the device's own padding are left out.

use super::config::{ModelConfig, WeightType};
use super::parameters::{Role, TensorSpec, specs};
use super::state::Plan;
use super::switches::QkNorm;

/// Rows of logits that exist at a time, as on the CPU.
const LOGIT_ROWS: usize = 128;

/// What a sequence is run for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Log-probabilities of all its tokens, or the reading of a prompt and generation after it: one
    /// segment at a time.
    Read,
    /// What the model says of the tokens that another one learns.
    Teach {
        /// Rows that are read at a time.
        rows: usize,
    },
    /// A gradient by exact TBPTT of this depth, and an AdamW update.
    Train {
        /// Segments that a loss reaches back.
        tbptt: usize,
        /// Segments computed side by side.
        segments_per_step: usize,
        /// Whether activations are computed again instead of kept.
        recompute: bool,
        /// Sets of gradients that exist at a time (`train::gradient_sets`): 1 where a step is one group.
        gradient_sets: usize,
        /// Ranks that share the moments, in equal parts.
        ranks: usize,
        /// Stages of layers behind this one: as many steps more wait for their backward.
        behind: usize,
    },
}

/// Bytes of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Prepared weights; for training with a transposed copy of each matrix, the values as the optimizer
    /// holds them, gradients, and this rank's share of both moments.
    pub weights: u64,
    /// Segments in flight: keys, values, probes, and the angle tables.
    pub slots: u64,
    /// Prior tails between segments, and sinks.
    pub state: u64,
    /// Keys and values of all completed tokens, for the heads that read the past: the only kind
    /// that grows with the sequence, where `pool_len` does not bound it.
    pub pool: u64,
    /// Intermediate results.
    pub activations: u64,
}

impl Memory {
    /// All kinds together.
    pub fn total(&self) -> u64 {
        self.weights + self.slots + self.state + self.pool + self.activations
    }
}

/// The memory for one sequence of `tokens` tokens on a device whose numbers take `element_bytes`.
pub fn memory(config: &ModelConfig, tokens: usize, run: Use, element_bytes: usize) -> Memory {
    let plan = Plan::new(config, tokens);
    let segments = tokens.div_ceil(plan.segment_len).max(1);
    let (alive, side_by_side) = match run {
        Use::Read | Use::Teach { .. } => (1, 1),
        Use::Train {
            tbptt,
            segments_per_step,
            behind,
            ..
        } => {
            let n = segments_per_step.clamp(1, segments);
            let kept = tbptt.min(segments).div_ceil(n) * n;
            let ahead = n.saturating_mul(behind);
            ((kept + n).saturating_add(ahead).min(segments), n)
        }
    };
    let room = plan.segment_len.min(tokens.max(1));
    let count = Count {
        config,
        plan: &plan,
    };
    let rows = |segments: usize| (segments * room).min(tokens);
    let bytes = |elements: usize| elements as u64 * element_bytes as u64;
    let activations = match run {
        Use::Read => count.forward(rows(1)),
        // What the head reads is kept until the student's losses.
        Use::Teach { rows: most } => {
            count.forward(rows(1).min(most)) + most.min(tokens) * config.hidden_size
        }
        Use::Train { recompute, .. } => {
            let [alive, side_by_side] = [alive, side_by_side].map(rows);
            count.backward(alive, side_by_side, recompute)
        }
    };
    Memory {
        weights: bytes(count.weights(run)) - count.narrow(run, element_bytes),
        slots: bytes(count.slots(alive, room)),
        // A session keeps the tails of before a step, so that a step that fails can be made again.
        state: bytes(count.state()) * if run == Use::Read { 2 } else { 1 },
        pool: bytes(count.pool(tokens, run)),
        activations: bytes(activations) + count.gate_sums(run, rows(side_by_side)),
    }
}

/// Counts elements.
struct Count<'a> {
    config: &'a ModelConfig,
    plan: &'a Plan,
}

impl Count<'_> {
    fn weights(&self, run: Use) -> usize {
        let specs = specs(self.config);
        let sum = |of: &dyn Fn(&&TensorSpec) -> bool| -> usize {
            specs.iter().filter(of).map(|s| s.role.len()).sum()
        };
        let all = sum(&|_| true);
        let Use::Train {
            gradient_sets,
            ranks,
            ..
        } = run
        else {
            return all;
        };
        // Frozen weights are there once.
        let trained = sum(&|s| !s.frozen);
        let matrices = sum(&|s| !s.frozen && matches!(s.role, Role::Matrix { .. }));
        // The head's share of a tied embedding's gradient is kept apart.
        let tied = match self.config.tie_word_embeddings && !specs[0].frozen {
            true => specs[0].role.len(),
            false => 0,
        };
        // A stage that only reads a tied embedding has its values, and no more gradient than the head's share.
        let owned = match self.config.part.begins {
            true => trained,
            false => trained - tied,
        };
        let moments = 2 * owned.div_ceil(ranks);
        all + trained + gradient_sets * owned + moments + matrices + tied
    }

    /// Bytes that the CPU's matrices take less because a checkpoint's numbers have 16 bits: those that are only read
    /// stay so.
    fn narrow(&self, run: Use, element_bytes: usize) -> u64 {
        let is_16_bit = matches!(self.config.dtype, Some(WeightType::F16 | WeightType::Bf16));
        if !is_16_bit || element_bytes != size_of::<f32>() {
            return 0;
        }
        // Adapters have f32 values of their own.
        let only_read = |s: &&TensorSpec| match &self.config.lora {
            Some(_) => s.frozen,
            None => !matches!(run, Use::Train { .. }),
        };
        let specs = specs(self.config);
        let matrices = specs.iter().filter(only_read);
        let matrices = matrices.filter(|s| matches!(s.role, Role::Matrix { .. }));
        2 * matrices.map(|s| s.role.len() as u64).sum::<u64>()
    }

    /// As `Slots::new` allocates them.
    fn slots(&self, slots: usize, room: usize) -> usize {
        let layer = |l: usize| {
            let [prior, past] = self.plan.sources(&self.plan.reads[l]);
            let keys = if prior + past > 0 { 2 } else { 1 };
            let probes = if past > self.plan.sink_len {
                self.plan.probe_rows * self.plan.q_width()
            } else {
                0
            };
            ((keys + 1) * room + 2 * prior + 2 * past) * self.plan.kv_width() + probes
        };
        let layers: usize = (0..self.plan.reads.len()).map(layer).sum();
        // Layers that do not rotate have tables of their own.
        let tables = 1 + usize::from(!self.config.switches.unrotated.is_empty());
        slots * layers + tables * (self.plan.origin() + room) * self.plan.heads.dim
    }

    /// Bytes of the sums in f64 from which the CPU computes the gradients of gates: two times two for each row and
    /// query head of the layer at work.
    fn gate_sums(&self, run: Use, rows: usize) -> u64 {
        let reads_past = self.plan.reads.iter().any(|reads| !reads.past.is_empty());
        match run {
            Use::Train { .. } if reads_past => 32 * (rows * self.plan.heads.q) as u64,
            _ => 0,
        }
    }

    /// As `SequenceState::new` allocates it.
    fn state(&self) -> usize {
        let reads = self.plan.reads.iter();
        let rows = reads.map(|reads| 2 * (self.plan.sources(reads)[0] + self.plan.sink_len));
        rows.sum::<usize>() * self.plan.kv_width()
    }

    /// Where tokens are dropped, what is left is a copy. A session keeps the pools of before the step until it is
    /// complete; otherwise only the layer at work has two, the longer with the rows of a segment.
    fn pool(&self, tokens: usize, run: Use) -> usize {
        let segment = self.plan.segment_len;
        let completed = tokens / segment * segment;
        let heads = self.plan.reads.iter().map(|reads| reads.past.len());
        let (all, most) = (heads.clone().sum::<usize>(), heads.max().unwrap_or(0));
        let held = self.plan.held(completed);
        let rows = match run {
            _ if held == completed => completed * all,
            Use::Read => 2 * held * all + segment * most,
            Use::Train { .. } | Use::Teach { .. } => held * all + (held + segment) * most,
        };
        2 * rows * self.plan.heads.dim
    }

    /// One row of what a layer's forward always leaves for its backward.
    fn tape(&self) -> usize {
        self.config.hidden_size + self.plan.q_width() + self.plan.heads.q
    }

    /// One row of what is derived from that.
    fn derived(&self) -> usize {
        let qk = self.raw_qkv() + self.scaled();
        3 * self.config.hidden_size
            + self.plan.q_width()
            + qk
            + 2 * self.config.intermediate_size
            + 2
    }

    /// One row of queries, keys and values before their norms, where they have some.
    fn raw_qkv(&self) -> usize {
        match self.config.switches.qk_norm {
            QkNorm::None => 0,
            QkNorm::Head | QkNorm::Full => self.plan.qkv_width(),
        }
    }

    /// One row of attention's output as sink logits scale it, where the model has them; in a backward pass, of its
    /// gradient before that.
    fn scaled(&self) -> usize {
        match self.config.switches.sink_logits {
            true => self.plan.q_width(),
            false => 0,
        }
    }

    fn logits(&self, rows: usize) -> usize {
        match self.config.part.ends {
            true => rows.min(LOGIT_ROWS) * self.config.vocab_size,
            false => 0,
        }
    }

    /// Of the layer at work, at its widest: everything of its tape, the MLP's inner row and the result.
    fn forward(&self, rows: usize) -> usize {
        let derived = self.derived();
        let row = self.tape() + derived + self.config.intermediate_size + self.config.hidden_size;
        rows * row + self.logits(rows)
    }

    /// Tapes of all layers for the `alive` rows, sums of all layers for those that waited for this
    /// step (whose place the step's own take layer by layer), both of the layer at work for all, and what
    /// the pass at work needs beside them for the step's `rows`.
    fn backward(&self, alive: usize, rows: usize, recompute: bool) -> usize {
        let layers = self.config.num_hidden_layers;
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let qkv = self.plan.qkv_width();
        let sums = qkv + self.raw_qkv() + 4 * hidden + 2 * inner;
        let derived = self.derived() * if recompute { 1 } else { layers };
        alive * (layers * self.tape() + derived + sums + 2 * hidden)
            + (alive - rows) * layers * sums
            + rows * (3 * inner + 2 * qkv + 2 * hidden + self.scaled())
            + self.logits(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::device::reference::Reference;
    use crate::model::state::{Angles, SequenceState, Slots};

    fn config() -> ModelConfig {
        let json = serde_json::json!({
            "model_type": "llama", "vocab_size": 50, "hidden_size": 12, "intermediate_size": 20,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
            "segment": {
                "segment_len": 16, "prior_len": 8, "past_len": 8, "sink_len": 3,
                "head_reads": [[["prior"], ["past"]], [[], ["prior"]], [[], ["past"]]],
            },
        });
        ModelConfig::from_json(json).unwrap()
    }

    #[test]
    fn slots_and_state_are_counted_as_they_are_allocated() {
        let config = config();
        for tokens in [5, 16, 100] {
            let plan = Plan::new(&config, tokens);
            let room = plan.segment_len.min(tokens);
            let angles = Angles::new(&Reference, &config, &plan, room).unwrap();
            let slots = Slots::new(&Reference, &plan, &angles, 1, room).unwrap();
            let len = |buffer: &Vec<f64>| Reference.len(buffer);
            let mut held = len(slots.tables(0).0) + len(slots.tables(0).1);
            for layer in &slots.layers {
                let kv = &layer.kv;
                let buffers = [
                    &kv.k,
                    &kv.raw_k,
                    &kv.v,
                    &kv.prior_k,
                    &kv.prior_v,
                    &kv.past_k,
                    &kv.past_v,
                ];
                held += buffers.into_iter().map(len).sum::<usize>();
                held += layer.probes.as_ref().map_or(0, len);
            }
            let state = SequenceState::<Reference>::new(&Reference, &plan).unwrap();
            let tails = state.layers.iter().map(|l| {
                let buffers = [&l.prior_k, &l.prior_v, &l.sinks.k, &l.sinks.v];
                buffers.into_iter().map(len).sum::<usize>()
            });
            let memory = memory(&config, tokens, Use::Read, 8);
            assert_eq!(memory.slots, 8 * held as u64, "{tokens} tokens");
            // As they are, and as they were before the step.
            assert_eq!(memory.state, 2 * 8 * tails.sum::<usize>() as u64);
        }
    }

    #[test]
    fn sets_of_gradients_and_shares_of_moments_are_counted() {
        let config = config();
        let all: usize = specs(&config).iter().map(|s| s.role.len()).sum();
        let weights = |gradient_sets, ranks| {
            let run = Use::Train {
                tbptt: 1,
                segments_per_step: 1,
                recompute: false,
                gradient_sets,
                ranks,
                behind: 0,
            };
            memory(&config, 64, run, 1).weights as usize
        };
        assert_eq!(weights(4, 1) - weights(1, 1), 3 * all);
        assert_eq!(weights(1, 1) - weights(1, 4), 2 * (all - all.div_ceil(4)));
    }

    #[test]
    fn matrices_of_16_bits_that_are_only_read_take_half() {
        let (wide, mut config) = (config(), config());
        config.dtype = Some(WeightType::Bf16);
        let matrices = specs(&config).into_iter().map(|spec| match spec.role {
            Role::Matrix { .. } => spec.role.len() as u64,
            _ => 0,
        });
        let matrices: u64 = matrices.sum();
        let train = Use::Train {
            tbptt: 1,
            segments_per_step: 1,
            recompute: true,
            gradient_sets: 1,
            ranks: 1,
            behind: 0,
        };
        let weights = |config: &ModelConfig, run| memory(config, 16, run, 4).weights;
        let [narrow, all] = [&config, &wide].map(|config| weights(config, Use::Read));
        assert_eq!(narrow + 2 * matrices, all);
        assert_eq!(weights(&config, train), weights(&wide, train));
        let in_f64 = |config: &ModelConfig| memory(config, 16, Use::Read, 8).weights;
        assert_eq!(in_f64(&config), in_f64(&wide));
    }

    #[test]
    fn a_teacher_takes_what_reading_takes_but_reads_the_students_rows() {
        let mut config = config();
        config.segment = None;
        let of = |run| memory(&config, 100, run, 4);
        let (read, teach) = (of(Use::Read), of(Use::Teach { rows: 10 }));
        assert_eq!([read.weights, read.slots], [teach.weights, teach.slots]);
        let all = of(Use::Teach { rows: 1000 });
        // What the head reads of the rows.
        assert_eq!(all.activations - read.activations, 4 * 100 * 12);
        let [part, all] = [teach, all].map(|m| m.activations);
        assert_eq!(10 * part, all);
    }

    #[test]
    fn parts_of_a_model_take_together_what_it_takes() {
        let config = config();
        let of = |config: &ModelConfig| memory(config, 160, Use::Read, 4);
        let (whole, parts) = (
            of(&config),
            [0..1, 1..3].map(|part| of(&config.part_of(part))),
        );
        let sum = |f: fn(&Memory) -> u64| parts.iter().map(f).sum::<u64>();
        assert_eq!(sum(|m| m.weights), whole.weights);
        assert_eq!(sum(|m| m.pool), whole.pool);
        assert_eq!(sum(|m| m.state), whole.state);
        assert!(parts[0].activations < parts[1].activations);
    }

    #[test]
    fn only_the_pool_grows_with_a_segmented_sequence() {
        let config = config();
        let train = Use::Train {
            tbptt: 1,
            segments_per_step: 1,
            recompute: true,
            gradient_sets: 1,
            ranks: 1,
            behind: 0,
        };
        for run in [Use::Read, train] {
            let (short, long) = (memory(&config, 160, run, 4), memory(&config, 1600, run, 4));
            assert_eq!(Memory { pool: 0, ..short }, Memory { pool: 0, ..long });
            // Two heads of 6 read the past: keys and values of 1600 tokens.
            assert_eq!(long.pool, 2 * 2 * 6 * 1600 * 4);
            assert_eq!(short.pool * 10, long.pool);
        }
        let mut bounded = config.clone();
        bounded.segment.as_mut().unwrap().pool_len = 48;
        bounded.validate().unwrap();
        let of = |tokens, run| memory(&bounded, tokens, run, 4);
        assert_eq!(
            of(40, Use::Read).pool,
            memory(&config, 40, Use::Read, 4).pool
        );
        for (run, rows) in [(Use::Read, 2 * 2 * 48 + 16), (train, 2 * 48 + 48 + 16)] {
            assert_eq!(of(64, run), of(1600, run));
            assert_eq!(of(64, run).pool, 2 * 6 * rows * 4);
        }
        let mut plain = config;
        plain.segment = None;
        let (short, long) = (
            memory(&plain, 160, Use::Read, 4),
            memory(&plain, 1600, Use::Read, 4),
        );
        assert!(long.slots > 9 * short.slots && long.pool == 0);
    }
}
