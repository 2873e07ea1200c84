//! What retrieval has selected for a sequence: to look at, and to replace by an oracle's choice.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{Command, Session};
use crate::device::{Device, DeviceError, PastPool, Result, SelectedBlocks};

/// The tokens that one head has selected for the segment that comes next, or that is being read. Where its pool has
/// dropped tokens ([`Session::holds_all`]), these are no positions but numbers of tokens that are held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelectedTokens {
    /// The layer.
    pub layer: usize,
    /// The KV head.
    pub kv_head: usize,
    /// Positions in the sequence, ascending.
    pub tokens: Vec<usize>,
    /// Positions that could be selected.
    pub eligible: Range<usize>,
}

impl<D: Device> Session<'_, D> {
    /// Whether the pools of a sequence hold every token of its complete segments: `segment.pool_len` bounds them.
    pub fn holds_all(&self, sequence: usize) -> bool {
        let completed = self.cursors[sequence].completed();
        self.plan.held(completed) == completed
    }

    /// What each head that reads the past has selected, by layer and KV head.
    ///
    /// # Errors
    /// Those of the device.
    pub fn selected(&self, sequence: usize) -> Result<Vec<SelectedTokens>> {
        self.told.tell(&Command::Selected(sequence))?;
        let mut selected = self.own_selected(sequence)?;
        for more in self.told.answers::<Vec<SelectedTokens>>()? {
            selected.extend(more);
        }
        selected.sort_by_key(|head| (head.layer, head.kv_head));
        Ok(selected)
    }

    /// [`Session::selected`] in the layers that are here.
    pub(super) fn own_selected(&self, sequence: usize) -> Result<Vec<SelectedTokens>> {
        let first = self.model.config.part.first_layer;
        let mut selected = Vec::new();
        for (layer, carry) in self.states[sequence].layers.iter().enumerate() {
            let Some(pool) = &carry.pool else {
                continue;
            };
            let reads = &self.plan.reads[layer];
            let tokens = carry.selected.tokens(&self.model.device)?;
            for (kv_head, tokens) in reads.past.iter().zip(tokens) {
                let rows = [pool.tokens(), carry.prior_rows];
                selected.push(SelectedTokens {
                    layer: first + layer,
                    kv_head: *kv_head,
                    tokens,
                    eligible: self.plan.eligible(reads, *kv_head, rows),
                });
            }
        }
        Ok(selected)
    }

    /// Replaces what a head has selected for the segment that comes next, by other tokens of the same kind: ascending,
    /// eligible, whole blocks where the rule selects blocks, and at most `past_len`. An oracle for evaluation: training
    /// and generation never call it. It has no effect on a segment that is being read.
    ///
    /// # Errors
    /// [`DeviceError::Argument`] for a head that does not read the past or for tokens that it cannot select, or what
    /// the device says.
    pub fn replace_selected(&mut self, sequence: usize, selected: &[SelectedTokens]) -> Result<()> {
        self.told
            .tell(&Command::Select(sequence, selected.to_vec()))?;
        self.replace_own_selected(sequence, selected)
    }

    /// [`Session::replace_selected`] in the layers that are here.
    pub(super) fn replace_own_selected(
        &mut self,
        sequence: usize,
        selected: &[SelectedTokens],
    ) -> Result<()> {
        let first = self.model.config.part.first_layer;
        for (i, carry) in self.states[sequence].layers.iter_mut().enumerate() {
            let (layer, heads) = (first + i, &self.plan.reads[i].past);
            let of_layer = || selected.iter().filter(|s| s.layer == layer);
            if of_layer().next().is_none() {
                continue;
            }
            let mut tokens = carry.selected.tokens(&self.model.device)?;
            for SelectedTokens {
                kv_head,
                tokens: new,
                eligible,
                ..
            } in of_layer()
            {
                let Some(i) = heads.iter().position(|head| head == kv_head) else {
                    let expected = format!("a KV head of layer {layer} that reads the past");
                    return Err(DeviceError::argument("selected tokens", expected, kv_head));
                };
                let fits =
                    new.len() <= self.plan.past_len && new.iter().all(|t| eligible.contains(t));
                if !fits {
                    let expected = format!("at most {} tokens of {eligible:?}", self.plan.past_len);
                    return Err(DeviceError::argument(
                        "selected tokens",
                        expected,
                        format!("{new:?}"),
                    ));
                }
                tokens[i] = new.clone();
            }
            carry.selected =
                D::Blocks::new(&self.model.device, &tokens, self.plan.rule.block_len())?;
        }
        Ok(())
    }

    /// Tokens of a block that retrieval selects as a whole; 1 where it selects single tokens.
    pub fn block_len(&self) -> usize {
        self.plan.rule.block_len()
    }

    /// Most tokens that a head selects.
    pub fn past_len(&self) -> usize {
        self.plan.past_len
    }
}
