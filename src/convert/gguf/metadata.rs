//! The metadata of a Llama in GGUF as a configuration.

use serde_json::{Map, Value as Json, json};

use super::super::ConvertError;
use super::header::{Header, Value};
use super::{ROPE_FACTORS, read_tensor};
use crate::model::config::{ModelConfig, RopeScaling};
use crate::model::rope::Rope;

/// Keys under `llama.` that say nothing about the computation, or are read below.
const KNOWN: [&str; 17] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.type",
    "vocab_size",
];

/// The factors, low and high frequency factors and original contexts of the Llama 3.1 and 3.2 models: GGUF keeps only
/// the factors of frequencies that come of them.
const LLAMA3: [(f64, f64, f64, usize); 2] = [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)];

impl Header {
    /// The metadata of a key, if it is there.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    fn wrong(&self, key: &str, expected: &str, got: String) -> ConvertError {
        ConvertError::Malformed {
            path: self.path.clone(),
            what: format!("key {key:?}"),
            expected: expected.to_owned(),
            got,
        }
    }

    fn unsupported(&self, what: String) -> ConvertError {
        ConvertError::Unsupported {
            path: self.path.clone(),
            what,
            remedy: "convert a plain Llama instead".into(),
        }
    }

    fn size(&self, key: &str) -> Result<Option<usize>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) => usize::try_from(*n)
                .map(Some)
                .map_err(|_| self.wrong(key, "a size", n.to_string())),
            Some(other) => Err(self.wrong(key, "an integer", format!("{other:?}"))),
        }
    }

    fn required(&self, key: &str) -> Result<usize, ConvertError> {
        self.size(key)?
            .ok_or_else(|| self.wrong(key, "it there", "no such key".into()))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x)),
            Some(other) => Err(self.wrong(key, "a float", format!("{other:?}"))),
        }
    }

    /// The text of a key, if it is there.
    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, "text", format!("{other:?}"))),
        }
    }

    /// The flag of a key, if it is there.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(key, "a bool", format!("{other:?}"))),
        }
    }

    /// A token id, if it is there.
    pub(super) fn id(&self, key: &str) -> Result<Option<u32>, ConvertError> {
        match self.size(key)? {
            None => Ok(None),
            Some(id) => u32::try_from(id)
                .map(Some)
                .map_err(|_| self.wrong(key, "a token id", id.to_string())),
        }
    }

    /// The array of a key, if it is there.
    pub(super) fn array(&self, key: &str) -> Result<Option<&[Value]>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(self.wrong(key, "an array", format!("{other:?}"))),
        }
    }
}

/// The configuration of a file of architecture `llama`.
pub(super) fn config(header: &Header) -> Result<ModelConfig, ConvertError> {
    let architecture = header.text("general.architecture")?.unwrap_or("");
    if architecture != "llama" {
        return Err(header.unsupported(format!("architecture {architecture:?}")));
    }
    for (key, value) in &header.metadata {
        let Some(name) = key.strip_prefix("llama.") else {
            continue;
        };
        if !KNOWN.contains(&name) {
            return Err(header.unsupported(format!("key {key:?}")));
        }
        if name == "expert_count" && *value != Value::Integer(0) {
            return Err(header.unsupported("a mixture of experts".into()));
        }
    }
    let tokens = header.array("tokenizer.ggml.tokens")?.map(<[Value]>::len);
    let embedding = header.tensors.get("token_embd.weight");
    let rows = embedding.and_then(|t| t.shape.first().copied());
    let vocab_size = match rows.or(header.size("llama.vocab_size")?).or(tokens) {
        Some(rows) => rows,
        None => header.required("llama.vocab_size")?,
    };
    let heads = header.required("llama.attention.head_count")?;
    let mut config = ModelConfig::new(
        vocab_size,
        header.required("llama.embedding_length")?,
        header.required("llama.feed_forward_length")?,
        header.required("llama.block_count")?,
        heads,
        header
            .size("llama.attention.head_count_kv")?
            .unwrap_or(heads),
    )?;
    let head_dims = [
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
    ];
    for (i, name) in head_dims.into_iter().enumerate() {
        let key = format!("llama.{name}");
        match header.size(&key)? {
            Some(head_dim) if i == 0 => config.set_head_dim(head_dim),
            Some(other) if other != config.file_head_dim => {
                return Err(header.unsupported(format!(
                    "{key} = {other} beside heads of {}",
                    config.file_head_dim
                )));
            }
            _ => {}
        }
    }
    // Stored as f32: the shortest decimal is what the model's own configuration said.
    let short = |x: f64| (x as f32).to_string().parse().unwrap_or(x);
    let epsilon = header.number("llama.attention.layer_norm_rms_epsilon")?;
    config.rms_norm_eps = short(epsilon.unwrap_or(1e-5));
    config.rope_theta = short(header.number("llama.rope.freq_base")?.unwrap_or(10_000.0));
    config.max_position_embeddings = header.required("llama.context_length")?;
    config.tie_word_embeddings = !header.tensors.contains_key("output.weight");
    config.bos_token_id = header
        .id("tokenizer.ggml.bos_token_id")?
        .into_iter()
        .collect();
    for key in ["eos", "eot", "eom"] {
        config
            .eos_token_id
            .extend(header.id(&format!("tokenizer.ggml.{key}_token_id"))?);
    }
    let mut seen = std::collections::BTreeSet::new();
    config.eos_token_id.retain(|id| seen.insert(*id));
    config.rope_scaling = rope_scaling(header, &config)?;
    config.validate()?;
    Ok(config)
}

fn rope_scaling(header: &Header, config: &ModelConfig) -> Result<RopeScaling, ConvertError> {
    let kind = header.text("llama.rope.scaling.type")?.unwrap_or("none");
    let scaling = match kind {
        "none" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: header.number("llama.rope.scaling.factor")?.unwrap_or(1.0),
        },
        other => return Err(header.unsupported(format!("RoPE scaling {other:?}"))),
    };
    let Some(info) = header.tensors.get(ROPE_FACTORS) else {
        return Ok(scaling);
    };
    let mut factors = Vec::new();
    if info.shape != [config.rotary_dim() / 2] || scaling != RopeScaling::Default {
        return Err(header.unsupported(format!("{ROPE_FACTORS:?} of shape {:?}", info.shape)));
    }
    read_tensor(&header.path, info, &mut factors)?;
    let frequencies = |rope_scaling| {
        let config = ModelConfig {
            rope_scaling,
            ..config.clone()
        };
        Rope::new(&config).inv_freq().to_vec()
    };
    let plain = frequencies(RopeScaling::Default);
    for (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings) in LLAMA3 {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        };
        let scaled = frequencies(scaling.clone());
        let mut pairs = plain.iter().zip(&scaled).zip(&factors);
        if pairs.all(|((plain, scaled), factor)| {
            (plain / scaled / f64::from(*factor) - 1.0).abs() < 1e-5
        }) {
            return Ok(scaling);
        }
    }
    Err(header.unsupported(format!(
        "{ROPE_FACTORS:?} of other factors than Llama 3.1's and 3.2's"
    )))
}

/// What the metadata says of itself, for `tokenizer_config.json`: tokens by name.
pub(super) fn special_token(header: &Header, key: &str) -> Result<Option<Json>, ConvertError> {
    let (Some(id), Some(tokens)) = (header.id(key)?, header.array("tokenizer.ggml.tokens")?) else {
        return Ok(None);
    };
    Ok(match tokens.get(id as usize) {
        Some(Value::Text(text)) => Some(json!(text)),
        _ => None,
    })
}

/// An object without its entries that are null.
pub(super) fn without_nulls(json: Json) -> Json {
    match json {
        Json::Object(object) => Json::Object(
            object
                .into_iter()
                .filter(|(_, v)| !v.is_null())
                .collect::<Map<_, _>>(),
        ),
        other => other,
    }
}
