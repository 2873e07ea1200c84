//! The `segment` object of `config.json`: how a sequence is cut, what each head reads from earlier
//! segments, and how past rows are chosen.

use std::ops::Range;

use serde_json::{Map, Value, json};

use super::RetrievalConfig;
use super::fields::{Fields, shown};
use crate::device::PoolBits;
use crate::model::error::ConfigError;
use crate::model::segmentation::MOST_REREADS;

/// Longest pool accepted, in tokens.
pub const MAX_POOL_LEN: usize = 1 << 30;

/// Longest segment, prior tail or past selection accepted, in tokens.
pub const MAX_SEGMENT_LEN: usize = 1 << 24;

/// Segments of one model, from the `segment` object of `config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentConfig {
    /// Most tokens of a segment. It is shorter where a break ends it, or the sequence.
    pub segment_len: usize,
    /// Rows of K and V carried over from the segment before. At most `segment_len`.
    pub prior_len: usize,
    /// Rows of K and V retrieved from all earlier segments.
    pub past_len: usize,
    /// First rows of the sequence that every head of every later segment reads. At most `segment_len`.
    pub sink_len: usize,
    /// What is kept of the keys and values that the past is retrieved from: 16, 8 or 4 bits an element.
    pub pool_bits: PoolBits,
    /// Most tokens of which these keys and values are held between segments; 0: of all.
    pub pool_len: usize,
    /// `[layer][kv_head]`: what that head reads besides the current segment.
    pub head_reads: Vec<Vec<HeadReads>>,
    /// How past rows are chosen.
    pub retrieval: RetrievalConfig,
    /// Tokens that end their segment.
    pub break_ids: Vec<u32>,
    /// Whether the end of a prompt is a break, in generation and in the tasks of `eval`.
    pub break_after_prompt: bool,
    /// Tokens of a prompt's end that are read after this break, with what the prompt has retrieved.
    pub prompt_suffix_len: usize,
    /// How often these are read again, each time with what they have retrieved themselves.
    pub reread_suffix: usize,
}

/// Where prompts have their break, if they have one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptBreak {
    suffix_len: Option<usize>,
    rereads: usize,
}

impl PromptBreak {
    /// Before the last `suffix_len` tokens of each prompt.
    pub fn before_suffix(suffix_len: usize) -> Self {
        Self {
            suffix_len: Some(suffix_len),
            rereads: 0,
        }
    }

    /// The same; each suffix is read so many times again.
    #[must_use]
    pub fn with_rereads(self, rereads: usize) -> Self {
        Self { rereads, ..self }
    }

    /// The break of a prompt of so many tokens: after so many of them. All but the suffix, and at least one, choose
    /// what is retrieved.
    pub fn of(self, tokens: usize) -> Option<usize> {
        let suffix = |len: usize| len.min(tokens.saturating_sub(1));
        self.suffix_len.map(|len| tokens - suffix(len))
    }

    /// The rereads of a prompt of so many tokens
    /// ([`Sequence::rereads`](crate::model::segmentation::Sequence::rereads)): the end of its suffix, if it has one.
    pub fn rereads_of(self, tokens: usize) -> Vec<usize> {
        match self.of(tokens) {
            Some(own) if own < tokens => vec![tokens; self.rereads],
            _ => Vec::new(),
        }
    }

    /// Adds the break and the rereads of a prompt of so many tokens to others in it. A position that is there already
    /// stays as it is.
    pub(crate) fn add(self, tokens: usize, breaks: &mut Vec<usize>, rereads: &mut Vec<usize>) {
        let add = |own: &[usize], others: &mut Vec<usize>| {
            if let Some(first) = own.first()
                && let Err(place) = others.binary_search(first)
            {
                others.splice(place..place, own.iter().copied());
            }
        };
        add(self.of(tokens).as_slice(), breaks);
        add(&self.rereads_of(tokens), rereads);
    }

    /// Marks the end of a turn, which a model reads before it writes: its break and its rereads, behind those of the
    /// turns before. No token before the turn is read again.
    pub(crate) fn mark(
        self,
        turn: Range<usize>,
        breaks: &mut Vec<usize>,
        rereads: &mut Vec<usize>,
    ) {
        let at = self.of(turn.len()).map(|own| turn.start + own);
        if at.is_some_and(|at| breaks.last().is_none_or(|last| *last < at)) {
            breaks.extend(at);
            let again = self.rereads_of(turn.len()).into_iter();
            rereads.extend(again.map(|end| turn.start + end));
        }
    }
}

/// What a KV head, with all query heads of its group, reads besides the current segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadReads {
    /// The KV tail of the segment before.
    pub prior: bool,
    /// The rows retrieved from earlier segments.
    pub past: bool,
}

impl HeadReads {
    /// What a head reads where `head_reads` is left out.
    pub const PRIOR: Self = Self {
        prior: true,
        past: false,
    };
}

impl super::ModelConfig {
    /// Where a prompt has its break.
    pub fn prompt_break(&self) -> PromptBreak {
        match &self.segment {
            Some(s) if s.break_after_prompt => {
                PromptBreak::before_suffix(s.prompt_suffix_len).with_rereads(s.reread_suffix)
            }
            _ => PromptBreak::default(),
        }
    }
}

impl SegmentConfig {
    /// Segments in which every head reads the prior tail and no head the past.
    pub fn new(
        segment_len: usize,
        prior_len: usize,
        past_len: usize,
        layers: usize,
        kv_heads: usize,
    ) -> Self {
        Self {
            segment_len,
            prior_len,
            past_len,
            sink_len: 0,
            pool_bits: PoolBits::default(),
            pool_len: 0,
            head_reads: vec![vec![HeadReads::PRIOR; kv_heads]; layers],
            retrieval: RetrievalConfig::default(),
            break_ids: Vec::new(),
            break_after_prompt: false,
            prompt_suffix_len: 0,
            reread_suffix: 0,
        }
    }

    pub(super) fn from_json(
        object: &Map<String, Value>,
        layers: usize,
        kv_heads: usize,
    ) -> Result<Self, ConfigError> {
        let fields = Fields::new(object, "segment.");
        fields.only(&[
            "segment_len",
            "prior_len",
            "past_len",
            "sink_len",
            "pool_bits",
            "pool_len",
            "head_reads",
            "retrieval",
            "break_ids",
            "break_after_prompt",
            "prompt_suffix_len",
            "reread_suffix",
        ])?;
        let mut segment = Self::new(
            fields.required_size("segment_len", 1..=MAX_SEGMENT_LEN)?,
            fields.required_size("prior_len", 0..=MAX_SEGMENT_LEN)?,
            fields.required_size("past_len", 0..=MAX_SEGMENT_LEN)?,
            layers,
            kv_heads,
        );
        if let Some(retrieval) = fields.object("retrieval")? {
            segment.retrieval = RetrievalConfig::from_json(retrieval)?;
        }
        segment.sink_len = fields.size("sink_len", 0..=MAX_SEGMENT_LEN)?.unwrap_or(0);
        if let Some(bits) = fields.size("pool_bits", 4..=16)? {
            segment.pool_bits = PoolBits::new(bits).ok_or_else(|| ConfigError::Invalid {
                key: "segment.pool_bits".into(),
                expected: "16, 8 or 4".into(),
                got: bits.to_string(),
            })?;
        }
        segment.pool_len = fields.size("pool_len", 0..=MAX_POOL_LEN)?.unwrap_or(0);
        segment.break_ids = break_ids(&fields)?;
        segment.break_after_prompt = fields.flag("break_after_prompt")?.unwrap_or(false);
        let suffix = fields.size("prompt_suffix_len", 0..=MAX_SEGMENT_LEN)?;
        segment.prompt_suffix_len = suffix.unwrap_or(0);
        let rereads = fields.size("reread_suffix", 0..=MOST_REREADS)?;
        segment.reread_suffix = rereads.unwrap_or(0);
        if let Some(by_layer) = fields.list("head_reads")? {
            segment.head_reads = by_layer
                .iter()
                .enumerate()
                .map(|(layer, heads)| layer_reads(layer, heads))
                .collect::<Result<_, _>>()?;
        }
        Ok(segment)
    }

    pub(super) fn to_json(&self) -> Value {
        let head = |reads: &HeadReads| {
            let mut sources = Vec::new();
            if reads.prior {
                sources.push("prior");
            }
            if reads.past {
                sources.push("past");
            }
            json!(sources)
        };
        let head_reads: Vec<Vec<Value>> = self
            .head_reads
            .iter()
            .map(|heads| heads.iter().map(head).collect())
            .collect();
        let mut object = json!({
            "segment_len": self.segment_len,
            "prior_len": self.prior_len,
            "past_len": self.past_len,
            "head_reads": head_reads,
            "retrieval": self.retrieval.to_json(),
        });
        if self.sink_len > 0 {
            object["sink_len"] = json!(self.sink_len);
        }
        if self.pool_bits != PoolBits::default() {
            object["pool_bits"] = json!(self.pool_bits.count());
        }
        if self.pool_len > 0 {
            object["pool_len"] = json!(self.pool_len);
        }
        if !self.break_ids.is_empty() {
            object["break_ids"] = json!(self.break_ids);
        }
        if self.break_after_prompt {
            object["break_after_prompt"] = json!(true);
        }
        if self.prompt_suffix_len > 0 {
            object["prompt_suffix_len"] = json!(self.prompt_suffix_len);
        }
        if self.reread_suffix > 0 {
            object["reread_suffix"] = json!(self.reread_suffix);
        }
        object
    }

    /// Checks the limits that tie the lengths, the heads and the retrieval to each other and to the model.
    pub(super) fn validate(
        &self,
        [layers, kv_heads]: [usize; 2],
        vocab_size: usize,
    ) -> Result<(), ConfigError> {
        let fail = |key: &str, expected: String, got: String| {
            Err(ConfigError::Invalid {
                key: format!("segment.{key}"),
                expected,
                got,
            })
        };
        self.retrieval.validate()?;
        let block_len = self.retrieval.rule().block_len();
        for (key, len, least) in [
            ("segment_len", self.segment_len, 1),
            ("prior_len", self.prior_len, 0),
            ("past_len", self.past_len, 0),
        ] {
            if len < least || len > MAX_SEGMENT_LEN || len % block_len != 0 {
                let range = format!("from {least} to {MAX_SEGMENT_LEN}");
                let expected = match block_len {
                    1 => format!("an integer {range}"),
                    _ => format!("a multiple of retrieval.block_len = {block_len} {range}"),
                };
                return fail(key, expected, len.to_string());
            }
        }
        if self.prior_len > self.segment_len {
            let expected = format!("at most segment_len = {}", self.segment_len);
            return fail("prior_len", expected, self.prior_len.to_string());
        }
        if self.sink_len > self.segment_len {
            let expected = format!("at most segment_len = {}", self.segment_len);
            return fail("sink_len", expected, self.sink_len.to_string());
        }
        let suffix = self.prompt_suffix_len;
        if suffix > MAX_SEGMENT_LEN || suffix > 0 && !self.break_after_prompt {
            let expected =
                format!("an integer up to {MAX_SEGMENT_LEN}, and 0 without break_after_prompt");
            return fail("prompt_suffix_len", expected, suffix.to_string());
        }
        if self.reread_suffix > MOST_REREADS {
            let expected = format!("an integer up to {MOST_REREADS}");
            return fail("reread_suffix", expected, self.reread_suffix.to_string());
        }
        if self.reread_suffix > 0 && !(1..=self.segment_len).contains(&suffix) {
            let most = self.segment_len;
            let expected = format!("prompt_suffix_len from 1 to segment_len = {most} beside it");
            return fail("reread_suffix", expected, suffix.to_string());
        }
        // What is never dropped, and a whole selection.
        let least = self.past_len + self.prior_len + self.sink_len.next_multiple_of(block_len);
        let fits = (least..=MAX_POOL_LEN).contains(&self.pool_len);
        if self.pool_len > 0 && !(fits && self.pool_len.is_multiple_of(block_len)) {
            let blocks = match block_len {
                1 => String::new(),
                _ => format!("a multiple of retrieval.block_len = {block_len} "),
            };
            let expected = format!(
                "0, or {blocks}from {least} (past_len + prior_len + sink_len) to {MAX_POOL_LEN}"
            );
            return fail("pool_len", expected, self.pool_len.to_string());
        }
        if let Some(id) = self.break_ids.iter().find(|id| **id as usize >= vocab_size) {
            let expected = format!("ids below vocab_size = {vocab_size}");
            return fail("break_ids", expected, id.to_string());
        }
        if self.head_reads.len() != layers {
            let expected = format!("one entry for each of {layers} layers");
            return fail("head_reads", expected, self.head_reads.len().to_string());
        }
        for (layer, heads) in self.head_reads.iter().enumerate() {
            if heads.len() != kv_heads {
                let key = format!("head_reads[{layer}]");
                let expected = format!("one entry for each of {kv_heads} KV heads");
                return fail(&key, expected, heads.len().to_string());
            }
        }
        Ok(())
    }
}

fn break_ids(fields: &Fields<'_>) -> Result<Vec<u32>, ConfigError> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| fields.invalid("break_ids", "a list of token ids", value))
    };
    let ids = fields.list("break_ids")?.unwrap_or_default();
    ids.iter().map(id).collect()
}

fn layer_reads(layer: usize, heads: &Value) -> Result<Vec<HeadReads>, ConfigError> {
    let invalid = |key: String, expected: &str, got: &Value| ConfigError::Invalid {
        key,
        expected: expected.into(),
        got: shown(got),
    };
    let layer_key = format!("segment.head_reads[{layer}]");
    let heads_list = heads
        .as_array()
        .ok_or_else(|| invalid(layer_key.clone(), "a list with one entry a KV head", heads))?;
    let mut reads = Vec::with_capacity(heads_list.len());
    for (head, sources) in heads_list.iter().enumerate() {
        let wrong = || {
            invalid(
                format!("{layer_key}[{head}]"),
                "a list of \"prior\" and \"past\", each at most once",
                sources,
            )
        };
        let mut read = HeadReads {
            prior: false,
            past: false,
        };
        for source in sources.as_array().ok_or_else(wrong)? {
            let slot = match source.as_str() {
                Some("prior") => &mut read.prior,
                Some("past") => &mut read.past,
                _ => return Err(wrong()),
            };
            if std::mem::replace(slot, true) {
                return Err(wrong());
            }
        }
        reads.push(read);
    }
    Ok(reads)
}
