//! Section `model`: a folder to fine-tune, or the shape of a new model, and how either reads segments.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::device::PoolBits;
use crate::model::config::{HeadReads, ModelConfig, SegmentConfig};
use crate::model::error::ConfigError;
use crate::model::families;
use crate::train::error::{Result, TrainError};

/// What is trained.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// Model folder whose weights are trained further; `None` starts from random weights of `shape`.
    pub folder: Option<PathBuf>,
    /// Folder with a `tokenizer.json`; by default the model folder's, else bytes.
    pub tokenizer: Option<PathBuf>,
    /// Scaling of positions in place of the folder's: keys of `rope_scaling` in `config.json`, and `rope_theta`.
    pub rope_scaling: Option<Map<String, Value>>,
    /// Sizes of a new model.
    pub shape: ShapeSection,
    /// Segments, over those of the folder.
    pub segment: SegmentSection,
}

/// Sizes of a new model, under the names of `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShapeSection {
    /// Rows of the embedding; by default the tokenizer's size.
    pub vocab_size: Option<usize>,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head; by default `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether a learned number of each query head joins the softmax's denominator (docs/contract.md, section 2).
    pub sink_logits: bool,
}

impl Default for ShapeSection {
    fn default() -> Self {
        Self {
            vocab_size: None,
            hidden_size: 256,
            intermediate_size: 704,
            num_hidden_layers: 4,
            num_attention_heads: 8,
            num_key_value_heads: 4,
            head_dim: None,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            tie_word_embeddings: true,
            sink_logits: false,
        }
    }
}

/// Segments: what is given here replaces what the model folder says. Lengths in tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SegmentSection {
    /// Tokens of a segment. `None`: as in the folder, and plain attention for a new model. 0: plain attention.
    pub segment_len: Option<usize>,
    /// Rows carried over from the segment before.
    pub prior_len: Option<usize>,
    /// Rows retrieved from all earlier segments.
    pub past_len: Option<usize>,
    /// First rows of the sequence that every head of every later segment reads.
    pub sink_len: Option<usize>,
    /// Bits an element that are kept of the keys and values that the past is retrieved from: 16, 8 or 4.
    pub pool_bits: Option<usize>,
    /// Most tokens of which these keys and values are held between segments; 0: of all.
    pub pool_len: Option<usize>,
    /// `[layer][kv_head]`: names out of `prior` and `past`.
    pub head_reads: Option<Vec<Vec<Vec<String>>>>,
    /// KV heads that read the past beside the prior tail, which all read: `LAYER.HEAD`, `LAYER.*`, or `all`. The
    /// command line takes `gate:N` too: the N with the largest gates in the folder's weights.
    pub past_heads: Option<Vec<String>>,
    /// KV heads that read the past instead of the prior tail, in `long_range_layers`; nothing in the others.
    pub long_range_heads: Option<Vec<usize>>,
    /// Layers in which they do; by default all.
    pub long_range_layers: Option<Vec<usize>>,
    /// Consecutive tokens that are retrieved together.
    pub block_len: Option<usize>,
    /// Last tokens of a segment whose queries make the probes.
    pub probe_len: Option<usize>,
    /// Queries averaged into one probe.
    pub probe_window: Option<usize>,
    /// Distance between two probes.
    pub probe_stride: Option<usize>,
    /// Last tokens of a segment whose queries choose the past by the second rule of retrieval, instead of the four
    /// keys before.
    pub queries: Option<usize>,
    /// Tokens that the second rule takes around a token.
    pub window_len: Option<usize>,
    /// Tokens of such a window before that token: less than `window_len`, by default half of it.
    pub window_before: Option<usize>,
    /// Tokens that end their segment.
    pub break_ids: Option<Vec<u32>>,
    /// Whether the end of a prompt ends a segment, in generation.
    pub break_after_prompt: Option<bool>,
    /// Tokens of a prompt's end that are read after this break.
    pub prompt_suffix_len: Option<usize>,
    /// How often these are read again, each time with what they have retrieved themselves.
    pub reread_suffix: Option<usize>,
}

impl ModelSection {
    pub(super) fn validate(&self) -> Result<()> {
        let segment = &self.segment;
        let ways = [
            segment.head_reads.is_some(),
            segment.past_heads.is_some(),
            segment.long_range_heads.is_some(),
        ];
        if ways.into_iter().filter(|given| *given).count() > 1 {
            let expected = "one of `head_reads`, `past_heads` and `long_range_heads`";
            return Err(TrainError::config("model.segment", expected, "several"));
        }
        if segment.long_range_layers.is_some() && segment.long_range_heads.is_none() {
            let expected = "`long_range_heads` beside it";
            let key = "model.segment.long_range_layers";
            return Err(TrainError::config(key, expected, "none"));
        }
        if self.folder.is_none() {
            let vocab_size = self.shape.vocab_size.unwrap_or(256);
            self.new_config(vocab_size)?;
        }
        Ok(())
    }

    /// The configuration of a new model whose tokenizer has `vocab_size` ids; `shape.vocab_size` wins.
    ///
    /// # Errors
    /// [`TrainError::Config`] where the sizes do not fit together.
    pub fn new_config(&self, vocab_size: usize) -> Result<ModelConfig> {
        let shape = &self.shape;
        let mut object = serde_json::to_value(shape).expect("numbers and booleans are JSON");
        object["vocab_size"] = json!(shape.vocab_size.unwrap_or(vocab_size));
        // In `config.json` the family says it.
        object
            .as_object_mut()
            .and_then(|keys| keys.remove("sink_logits"));
        object["model_type"] = json!(families::made_here(shape.sink_logits).model_type);
        let mut config = ModelConfig::from_json(object).map_err(|e| typed("model.shape", &e))?;
        self.apply(&mut config)?;
        Ok(config)
    }

    /// Lays `rope_scaling` and section `segment` over a model's own.
    ///
    /// # Errors
    /// [`TrainError::Config`] where the result does not fit together.
    pub fn apply(&self, config: &mut ModelConfig) -> Result<()> {
        if let Some(scaling) = &self.rope_scaling {
            let scaled = config.scale_positions(scaling.clone());
            scaled.map_err(|e| typed("model", &e))?;
        }
        self.apply_segments(config)
    }

    fn apply_segments(&self, config: &mut ModelConfig) -> Result<()> {
        let given = &self.segment;
        let (layers, kv_heads) = (config.num_hidden_layers, config.num_key_value_heads);
        if given.segment_len == Some(0) {
            config.segment = None;
            return Ok(());
        }
        let own = config.segment.take();
        let mut segment = match (own, given.segment_len) {
            (Some(own), _) => own,
            (None, Some(len)) => SegmentConfig::new(len, 0, 0, layers, kv_heads),
            (None, None) if *given == SegmentSection::default() => return Ok(()),
            (None, None) => {
                let expected = "a number of tokens, since other keys of the section are given";
                let key = "model.segment.segment_len";
                return Err(TrainError::config(key, expected, "none"));
            }
        };
        let set = |to: &mut usize, from: Option<usize>| *to = from.unwrap_or(*to);
        set(&mut segment.segment_len, given.segment_len);
        set(&mut segment.prior_len, given.prior_len);
        set(&mut segment.past_len, given.past_len);
        set(&mut segment.sink_len, given.sink_len);
        if let Some(bits) = given.pool_bits {
            let key = "model.segment.pool_bits";
            let unknown = || TrainError::config(key, "16, 8 or 4", bits);
            segment.pool_bits = PoolBits::new(bits).ok_or_else(unknown)?;
        }
        set(&mut segment.pool_len, given.pool_len);
        let rule = segment.retrieval.set(|key| Ok(given.retrieval_len(key)));
        rule.map_err(|e| typed("model", &e))?;
        if let Some(ids) = &given.break_ids {
            segment.break_ids.clone_from(ids);
        }
        segment.break_after_prompt = given
            .break_after_prompt
            .unwrap_or(segment.break_after_prompt);
        set(&mut segment.prompt_suffix_len, given.prompt_suffix_len);
        set(&mut segment.reread_suffix, given.reread_suffix);
        given.set_reads(&mut segment, layers, kv_heads)?;
        config.segment = Some(segment);
        config.validate().map_err(|e| typed("model", &e))
    }
}

impl SegmentSection {
    /// A length of retrieval by its key in `config.json`.
    fn retrieval_len(&self, key: &str) -> Option<usize> {
        match key {
            "block_len" => self.block_len,
            "probe_len" => self.probe_len,
            "probe_window" => self.probe_window,
            "probe_stride" => self.probe_stride,
            "queries" => self.queries,
            "window_len" => self.window_len,
            "window_before" => self.window_before,
            _ => None,
        }
    }

    fn set_reads(&self, segment: &mut SegmentConfig, layers: usize, kv_heads: usize) -> Result<()> {
        if let Some(reads) = &self.head_reads {
            segment.head_reads = parse_reads(reads)?;
        }
        if let Some(names) = &self.past_heads {
            segment.head_reads = past_heads(names, layers, kv_heads)?;
        }
        let Some(heads) = &self.long_range_heads else {
            return Ok(());
        };
        below("model.segment.long_range_heads", heads, kv_heads)?;
        let all: Vec<usize> = (0..layers).collect();
        let chosen = self.long_range_layers.as_ref().unwrap_or(&all);
        below("model.segment.long_range_layers", chosen, layers)?;
        let head = |layer: usize, head: usize| {
            let long_range = heads.contains(&head);
            HeadReads {
                prior: !long_range,
                past: long_range && chosen.contains(&layer),
            }
        };
        segment.head_reads = (0..layers)
            .map(|layer| (0..kv_heads).map(|h| head(layer, h)).collect())
            .collect();
        Ok(())
    }
}

fn parse_reads(reads: &[Vec<Vec<String>>]) -> Result<Vec<Vec<HeadReads>>> {
    let head = |layer: usize, head: usize, names: &[String]| {
        let mut read = HeadReads {
            prior: false,
            past: false,
        };
        for name in names {
            let slot = match name.as_str() {
                "prior" => &mut read.prior,
                "past" => &mut read.past,
                _ => {
                    let key = format!("model.segment.head_reads[{layer}][{head}]");
                    let expected = "names out of \"prior\" and \"past\"";
                    return Err(TrainError::config(key, expected, format!("{name:?}")));
                }
            };
            *slot = true;
        }
        Ok(read)
    };
    let layer = |(l, heads): (usize, &Vec<Vec<String>>)| {
        let heads = heads.iter().enumerate();
        heads.map(|(h, names)| head(l, h, names)).collect()
    };
    reads.iter().enumerate().map(layer).collect()
}

/// Every head reads the prior tail, and these read the past too.
fn past_heads(names: &[String], layers: usize, kv_heads: usize) -> Result<Vec<Vec<HeadReads>>> {
    let tail = HeadReads {
        prior: true,
        past: false,
    };
    let mut reads = vec![vec![tail; kv_heads]; layers];
    for name in names {
        let number = |text: &str, limit: usize| text.parse().ok().filter(|n: &usize| *n < limit);
        let named = match name.split_once('.') {
            None if name == "all" => Some((0..layers, 0..kv_heads)),
            None => None,
            Some((layer, head)) => number(layer, layers).and_then(|layer| {
                let heads = match head {
                    "*" => 0..kv_heads,
                    head => number(head, kv_heads).map(|head| head..head + 1)?,
                };
                Some((layer..layer + 1, heads))
            }),
        };
        let Some((in_layers, heads)) = named else {
            let expected = format!(
                "LAYER.HEAD below {layers}.{kv_heads}, LAYER.*, or all; gate:N with a model folder"
            );
            let got = format!("{name:?}");
            return Err(TrainError::config(
                "model.segment.past_heads",
                expected,
                got,
            ));
        };
        for read in reads[in_layers]
            .iter_mut()
            .flat_map(|layer| &mut layer[heads.clone()])
        {
            if read.past {
                let (expected, got) = ("each head once", format!("{name:?} again"));
                return Err(TrainError::config(
                    "model.segment.past_heads",
                    expected,
                    got,
                ));
            }
            read.past = true;
        }
    }
    Ok(reads)
}

fn below(key: &str, values: &[usize], limit: usize) -> Result<()> {
    match values.iter().find(|v| **v >= limit) {
        Some(v) => Err(TrainError::config(key, format!("numbers below {limit}"), v)),
        None => Ok(()),
    }
}

/// A model configuration's error under the key of this file.
fn typed(section: &str, error: &ConfigError) -> TrainError {
    match error {
        ConfigError::Invalid { key, expected, got } => {
            // Retrieval's keys stand in `segment` itself here.
            let key = key.replace("segment.retrieval.", "segment.");
            TrainError::config(format!("{section}.{key}"), expected, got)
        }
        other => TrainError::config(section, "a model that can be computed", other),
    }
}
