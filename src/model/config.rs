//! The configuration of a model: a Hugging Face `config.json` of one of the families in `model::families`, with the
//! `segment` object beside it.
//!
//! A key that changes what a model computes is read or refused by name, so a model that loads is the model that was
//! trained. Other keys are kept and written back; [`ModelConfig::load`] warns of those that it does not know.

pub(super) mod fields;
mod heads;
mod part;
mod retrieval;
mod rope_keys;
mod rope_scaling;
mod segment;
mod supported;

use std::path::Path;

use serde_json::{Map, Value, json};

use self::fields::Fields;
pub(super) use self::fields::token_id_list;
use super::error::ConfigError;
use super::families::{self, Family, Sizes};
use super::files;
use super::lora::Lora;
use super::switches::Switches;
pub use part::Part;
pub use retrieval::RetrievalConfig;
pub(super) use rope_keys::rotary_dim;
pub use rope_scaling::RopeScaling;
pub use segment::{HeadReads, MAX_SEGMENT_LEN, PromptBreak, SegmentConfig};

/// The file's name in a model folder.
pub const CONFIG_FILE: &str = "config.json";

/// The key that says that every byte is a token, whatever tokenizer files lie beside.
pub(super) const BYTE_TOKENS: &str = "byte_tokens";
/// Largest `config.json` accepted, in bytes.
pub(super) const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Bounds far above any model, so that no size computed from them overflows and no absurd value allocates.
const MAX_VOCAB: usize = 1 << 24;
const MAX_HIDDEN: usize = 1 << 18;
const MAX_INTERMEDIATE: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 10;
const MAX_HEADS: usize = 1 << 12;
const MAX_HEAD_DIM: usize = 1 << 10;
const MAX_POSITIONS: usize = 1 << 40;
const MAX_TOKEN_IDS: usize = 64;

/// The number format of weights in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
}

impl WeightType {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name in `config.json`.
    pub fn config_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    fn from_config_name(name: &str) -> Option<Self> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            // Numbers of double precision are rounded when they are read.
            "float32" | "float" | "float64" | "double" => Some(Self::F32),
            "float16" | "half" => Some(Self::F16),
            "bfloat16" => Some(Self::Bf16),
            _ => None,
        }
    }
}

/// A decoder, with or without segments. Field names are those of `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family that `model_type` names.
    pub family: &'static Family,
    /// What it computes differently from a plain Llama.
    pub switches: Switches,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads in a layer; a multiple of `num_key_value_heads`.
    pub num_attention_heads: usize,
    /// Key and value heads in a layer.
    pub num_key_value_heads: usize,
    /// Width of a head as it is computed with; even, and at least [`Self::file_head_dim`].
    pub head_dim: usize,
    /// Width of a head in files.
    pub file_head_dim: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Change of the rotary frequencies for longer contexts.
    pub rope_scaling: RopeScaling,
    /// Length of texts that frequencies which depend on it are computed for; see [`Self::rope_length`].
    pub rope_length: Option<usize>,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Context the model was made for, in tokens. Not a limit here.
    pub max_position_embeddings: usize,
    /// Ids that begin a text; they need not be below `vocab_size` where no text uses them.
    pub bos_token_id: Vec<u32>,
    /// Ids that end a text; as `bos_token_id`.
    pub eos_token_id: Vec<u32>,
    /// Format the weights are said to be in; the weight files decide.
    pub dtype: Option<WeightType>,
    /// Segments; without, the sequence is one.
    pub segment: Option<SegmentConfig>,
    /// Adapters of the projections, which no `config.json` holds.
    pub lora: Option<Lora>,
    /// Which part of the model this is: all of it, in files.
    pub part: Part,
    /// Everything the file holds, known keys included. [`Self::to_json`] writes the fields above over it.
    pub source: Map<String, Value>,
}

impl ModelConfig {
    /// A plain model of the given sizes: `head_dim = hidden_size / num_attention_heads`,
    /// `rms_norm_eps = 1e-5`, `rope_theta = 10000`, untied, without segments.
    pub fn new(
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize,
        num_key_value_heads: usize,
    ) -> Result<Self, ConfigError> {
        let head_dim = hidden_size.checked_div(num_attention_heads).unwrap_or(0);
        let mut config = Self {
            family: families::LLAMA,
            switches: Switches::PLAIN,
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            file_head_dim: head_dim,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            rope_length: None,
            tie_word_embeddings: false,
            max_position_embeddings: 2048,
            bos_token_id: Vec::new(),
            eos_token_id: Vec::new(),
            dtype: None,
            segment: None,
            lora: None,
            part: Part::WHOLE,
            source: Map::new(),
        };
        config.set_head_dim(head_dim);
        config.validate()?;
        Ok(config)
    }

    /// Reads and checks `folder/config.json`. Unknown keys with a value in effect are named in one warning.
    pub fn load(folder: &Path) -> Result<Self, ConfigError> {
        let path = folder.join(CONFIG_FILE);
        let config = Self::from_json(files::read_json(&path, MAX_CONFIG_BYTES)?)?;
        let ignored = config.ignored_keys();
        if !ignored.is_empty() {
            tracing::warn!(
                "{}: keys that are not known here, and ignored: {}",
                path.display(),
                ignored.join(", ")
            );
        }
        Ok(config)
    }

    /// Keys of the file that are not known here and have a value in effect.
    pub fn ignored_keys(&self) -> Vec<&str> {
        supported::ignored(&self.source, self.family)
    }

    /// Writes `folder/config.json`: beside its place, synced, then renamed.
    pub fn save(&self, folder: &Path) -> Result<(), ConfigError> {
        self.validate()?;
        let text = format!("{:#}\n", self.to_json());
        files::write_renamed(&folder.join(CONFIG_FILE), text.as_bytes())?;
        Ok(())
    }

    /// Reads and checks the object of a `config.json`.
    pub fn from_json(value: Value) -> Result<Self, ConfigError> {
        let Value::Object(source) = value else {
            return Err(ConfigError::Invalid {
                key: "(the file)".into(),
                expected: "an object".into(),
                got: fields::shown(&value),
            });
        };
        let fields = Fields::new(&source, "");
        let family = Family::of(&fields)?;
        supported::refuse_unsupported(&fields, family)?;
        supported::refuse_unknown(&fields, family)?;
        let defaults = &family.defaults;
        let hidden_size = fields.required_size("hidden_size", 1..=MAX_HIDDEN)?;
        let layers = fields.required_size("num_hidden_layers", 1..=MAX_LAYERS)?;
        let heads = fields.required_size("num_attention_heads", 1..=MAX_HEADS)?;
        let kv_heads = fields
            .size("num_key_value_heads", 1..=MAX_HEADS)?
            .unwrap_or(heads);
        // Read by `Tokenizer::read`; here only its type is checked.
        fields.flag(BYTE_TOKENS)?;
        let positions = fields
            .size("max_position_embeddings", 1..=MAX_POSITIONS)?
            .unwrap_or(defaults.positions);
        let (rope_theta, rope_scaling) = rope_keys::from_json(&fields, family, positions)?;
        let segment = fields
            .object("segment")?
            .map(|object| SegmentConfig::from_json(object, layers, kv_heads))
            .transpose()?;
        let head_dim = fields.size("head_dim", 1..=MAX_HEAD_DIM)?;
        let head_dim = match head_dim.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None => default_head_dim(hidden_size, heads)?,
        };
        let sizes = Sizes {
            layers,
            head_dim,
            positions,
        };
        let mut config = Self {
            family,
            switches: (family.switches)(&fields, &sizes)?,
            vocab_size: fields.required_size("vocab_size", 1..=MAX_VOCAB)?,
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size", 1..=MAX_INTERMEDIATE)?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            file_head_dim: head_dim,
            rms_norm_eps: fields
                .number("rms_norm_eps")?
                .unwrap_or(defaults.rms_norm_eps),
            rope_theta,
            rope_scaling,
            rope_length: fields.size("rope_length", 1..=MAX_POSITIONS)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(defaults.tied),
            max_position_embeddings: positions,
            bos_token_id: token_ids(&fields, "bos_token_id")?,
            eos_token_id: token_ids(&fields, "eos_token_id")?,
            dtype: weight_type(&fields)?,
            segment,
            lora: None,
            part: Part::WHOLE,
            source: Map::new(),
        };
        config.set_head_dim(head_dim);
        config.validate()?;
        Ok(Self { source, ..config })
    }

    /// The object of a `config.json`: the fields, over whatever else the loaded file held.
    pub fn to_json(&self) -> Value {
        let mut object = self.source.clone();
        let mut set = |key: &str, value: Value| {
            object.insert(key.to_owned(), value);
        };
        set("model_type", json!(self.family.model_type));
        set("architectures", json!([self.family.architectures[0]]));
        set("hidden_act", json!("silu"));
        set("vocab_size", json!(self.vocab_size));
        set("hidden_size", json!(self.hidden_size));
        set("intermediate_size", json!(self.intermediate_size));
        set("num_hidden_layers", json!(self.num_hidden_layers));
        set("num_attention_heads", json!(self.num_attention_heads));
        set("num_key_value_heads", json!(self.num_key_value_heads));
        set("head_dim", json!(self.file_head_dim));
        set("rms_norm_eps", json!(self.rms_norm_eps));
        set("tie_word_embeddings", json!(self.tie_word_embeddings));
        set(
            "max_position_embeddings",
            json!(self.max_position_embeddings),
        );
        set("bos_token_id", token_ids_json(&self.bos_token_id));
        set("eos_token_id", token_ids_json(&self.eos_token_id));
        rope_keys::write_json(
            &mut object,
            self.family,
            self.max_position_embeddings,
            (self.rope_theta, &self.rope_scaling),
        );
        let dtype = json!(self.dtype.map(WeightType::config_name));
        // The newer of the two names, where the file had it.
        if object.contains_key("dtype") {
            object.insert("dtype".into(), dtype.clone());
        }
        object.insert("torch_dtype".into(), dtype);
        match &self.segment {
            Some(segment) => object.insert("segment".into(), segment.to_json()),
            None => object.remove("segment"),
        };
        Value::Object(object)
    }

    /// Scales positions as `scaling` says, an object like `rope_scaling` of a `config.json`, in place of what the
    /// configuration had. The base of the frequencies stays, unless the object has a `rope_theta`.
    ///
    /// # Errors
    /// For an object that a `config.json` could not have either.
    pub fn scale_positions(&mut self, scaling: Map<String, Value>) -> Result<(), ConfigError> {
        let Value::Object(mut object) = self.to_json() else {
            unreachable!("a configuration is an object")
        };
        rope_keys::replace(&mut object, scaling);
        let scaled = Self::from_json(Value::Object(object))?;
        self.rope_theta = scaled.rope_theta;
        self.rope_scaling = scaled.rope_scaling;
        self.source = scaled.source;
        Ok(())
    }

    /// Checks every bound, and what ties the fields to each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (key, size, most) in [
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("hidden_size", self.hidden_size, MAX_HIDDEN),
            (
                "intermediate_size",
                self.intermediate_size,
                MAX_INTERMEDIATE,
            ),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_HEADS),
            ("num_key_value_heads", self.num_key_value_heads, MAX_HEADS),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                MAX_POSITIONS,
            ),
        ] {
            if size == 0 || size > most {
                return invalid(key, format!("an integer from 1 to {most}"), size);
            }
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads = {heads}");
            return invalid("num_key_value_heads", expected, kv_heads);
        }
        if !self.head_dim.is_multiple_of(2) {
            return invalid(
                "head_dim",
                "an even number (RoPE rotates pairs)",
                self.head_dim,
            );
        }
        let rotary = self.rotary_dim();
        if !rotary.is_multiple_of(2) || rotary > self.head_dim {
            let expected = format!("an even number, at most head_dim = {}", self.head_dim);
            return invalid("rotary_dim", expected, rotary);
        }
        if !(self.rms_norm_eps >= 0.0 && self.rms_norm_eps < 1.0) {
            return invalid(
                "rms_norm_eps",
                "a number from 0 to below 1",
                self.rms_norm_eps,
            );
        }
        rope_scaling::validate(self.rope_theta, &self.rope_scaling, rotary)?;
        match &self.segment {
            Some(segment) => segment.validate([self.num_hidden_layers, kv_heads], self.vocab_size),
            None => Ok(()),
        }
    }

    /// The same model for dry runs, whose tokens are arbitrary: full segments take the most memory for activations, and
    /// one that ends with the prompt the most for pools.
    pub(crate) fn for_dry_run(mut self) -> Self {
        if let Some(segment) = &mut self.segment {
            segment.break_after_prompt |= !segment.break_ids.is_empty();
            segment.break_ids.clear();
        }
        self
    }

    /// Whether training computes what it does in other libraries: dropout is refused by name.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`].
    pub fn check_training(&self) -> Result<(), ConfigError> {
        supported::refuse_dropout(&Fields::new(&self.source, ""))
    }

    /// First elements of a head that rotate.
    pub fn rotary_dim(&self) -> usize {
        self.switches.rotary_dim.unwrap_or(self.head_dim)
    }

    /// Length of texts that frequencies which depend on it are computed for, the same for every text: `rope_length`
    /// of `config.json`, or else the reach of a segment's queries, or else nothing beyond the original context.
    pub fn rope_length(&self) -> usize {
        let reach = |s: &SegmentConfig| s.segment_len + s.prior_len + s.past_len + s.sink_len;
        let reach = self.segment.as_ref().map(reach);
        self.rope_length.or(reach).unwrap_or(0)
    }

    /// Width of all queries of a token: `num_attention_heads * head_dim`.
    pub fn q_dim(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all keys (or values) of a token: `num_key_value_heads * head_dim`.
    pub fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Query heads that share a KV head.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Whether this KV head reads the KV tail of the segment before. False without segments.
    pub fn reads_prior(&self, layer: usize, kv_head: usize) -> bool {
        self.head_reads(layer, kv_head)
            .is_some_and(|reads| reads.prior)
    }

    /// Whether this KV head reads rows retrieved from earlier segments. False without segments.
    pub fn reads_past(&self, layer: usize, kv_head: usize) -> bool {
        self.head_reads(layer, kv_head)
            .is_some_and(|reads| reads.past)
    }

    fn head_reads(&self, layer: usize, kv_head: usize) -> Option<HeadReads> {
        let segment = self.segment.as_ref()?;
        segment.head_reads.get(layer)?.get(kv_head).copied()
    }
}

pub(super) fn invalid<T>(
    key: &str,
    expected: impl Into<String>,
    got: impl ToString,
) -> Result<T, ConfigError> {
    Err(ConfigError::Invalid {
        key: key.into(),
        expected: expected.into(),
        got: got.to_string(),
    })
}

fn default_head_dim(hidden_size: usize, heads: usize) -> Result<usize, ConfigError> {
    if !hidden_size.is_multiple_of(heads) {
        let expected =
            format!("a multiple of num_attention_heads = {heads} where head_dim is left out");
        return invalid("hidden_size", expected, hidden_size);
    }
    Ok(hidden_size / heads)
}

fn token_ids(fields: &Fields<'_>, key: &str) -> Result<Vec<u32>, ConfigError> {
    let Some(value) = fields.get(key) else {
        return Ok(Vec::new());
    };
    token_id_list(value, MAX_TOKEN_IDS).ok_or_else(|| {
        let expected = format!("a token id or a list of at most {MAX_TOKEN_IDS}");
        fields.invalid(key, expected, value)
    })
}

fn token_ids_json(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    }
}

fn weight_type(fields: &Fields<'_>) -> Result<Option<WeightType>, ConfigError> {
    for key in ["dtype", "torch_dtype"] {
        let Some(name) = fields.text(key)? else {
            continue;
        };
        let Some(found) = WeightType::from_config_name(name) else {
            return Err(fields.unsupported(
                key,
                "float64, float32, float16, bfloat16",
                &json!(name),
            ));
        };
        return Ok(Some(found));
    }
    Ok(None)
}
