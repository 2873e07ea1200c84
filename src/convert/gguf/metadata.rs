//! The metadata of a model in GGUF as a configuration.

use serde_json::{Map, Value as Json, json};

use super::super::ConvertError;
use super::architectures::{ALL, Architecture};
use super::header::{Header, Value};
use super::{ROPE_FACTORS, read_tensor};
use crate::model::config::{ModelConfig, RopeScaling};
use crate::model::rope::Rope;

/// Keys under the architecture's name that say nothing about the computation, or are read below.
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
            remedy: "convert a plain model of a family that is read (docs/models.md)".into(),
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
            Some(Value::Float(x)) if x.is_finite() => Ok(Some(*x)),
            Some(other) => Err(self.wrong(key, "a finite float", format!("{other:?}"))),
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

/// The architecture of a file, which must be one that is read.
pub(super) fn architecture(header: &Header) -> Result<&'static Architecture, ConvertError> {
    let name = header.text("general.architecture")?.unwrap_or("");
    Architecture::of(name).ok_or_else(|| {
        let known: Vec<&str> = ALL.iter().map(|known| known.name).collect();
        header.unsupported(format!(
            "architecture {name:?} (read are {})",
            known.join(", ")
        ))
    })
}

/// The configuration of a file of this architecture.
pub(super) fn config(
    header: &Header,
    architecture: &Architecture,
) -> Result<ModelConfig, ConvertError> {
    let prefix = format!("{}.", architecture.name);
    for (key, value) in &header.metadata {
        let Some(name) = key.strip_prefix(&prefix) else {
            continue;
        };
        let further = |(known, _): &(&str, &str)| *known == name;
        if !KNOWN.contains(&name) && !architecture.numbers.iter().any(further) {
            return Err(header.unsupported(format!("key {key:?}")));
        }
        if name == "expert_count" && *value != Value::Integer(0) {
            return Err(header.unsupported("a mixture of experts".into()));
        }
    }
    let key = |name: &str| format!("{prefix}{name}");
    let tokens = header.array("tokenizer.ggml.tokens")?.map(<[Value]>::len);
    let embedding = header.tensors.get("token_embd.weight");
    let rows = embedding.and_then(|t| t.shape.first().copied());
    let vocab_size = match rows.or(header.size(&key("vocab_size"))?).or(tokens) {
        Some(rows) => rows,
        None => header.required(&key("vocab_size"))?,
    };
    let heads = header.required(&key("attention.head_count"))?;
    let hidden = header.required(&key("embedding_length"))?;
    let kv_heads = header
        .size(&key("attention.head_count_kv"))?
        .unwrap_or(heads);
    let head_dim = match header.size(&key("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    let rotary_dim = header
        .size(&key("rope.dimension_count"))?
        .unwrap_or(head_dim);
    for (name, other) in [
        (
            "attention.value_length",
            header.size(&key("attention.value_length"))?,
        ),
        (
            "rope.dimension_count",
            Some(rotary_dim).filter(|_| !architecture.partly_rotated),
        ),
    ] {
        if let Some(other) = other.filter(|other| *other != head_dim) {
            let key = key(name);
            return Err(header.unsupported(format!("{key} = {other} beside heads of {head_dim}")));
        }
    }
    // Stored as f32: the shortest decimal is what the model's own configuration said.
    let short = |x: f64| (x as f32).to_string().parse().unwrap_or(x);
    let epsilon = header.number(&key("attention.layer_norm_rms_epsilon"))?;
    let theta = header.number(&key("rope.freq_base"))?;
    let mut eos = Vec::new();
    for kind in ["eos", "eot", "eom"] {
        eos.extend(header.id(&format!("tokenizer.ggml.{kind}_token_id"))?);
    }
    let mut seen = std::collections::BTreeSet::new();
    eos.retain(|id| seen.insert(*id));
    let mut object = json!({
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": header.required(&key("feed_forward_length"))?,
        "num_hidden_layers": header.required(&key("block_count"))?,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": short(epsilon.unwrap_or(1e-5)),
        "rope_theta": short(theta.unwrap_or(10_000.0)),
        "max_position_embeddings": header.required(&key("context_length"))?,
        "tie_word_embeddings": !header.tensors.contains_key("output.weight"),
        "bos_token_id": header.id("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": eos,
    });
    for (stored, ours) in architecture.numbers {
        if let Some(number) = header.number(&key(stored))? {
            object[*ours] = json!(short(number));
        }
    }
    if rotary_dim != head_dim {
        object["partial_rotary_factor"] = json!(rotary_dim as f64 / head_dim as f64);
    }
    if header.tensors.contains_key("blk.0.attn_output.bias") {
        object["attention_bias"] = json!(true);
    }
    if header.tensors.contains_key("blk.0.ffn_down.bias") {
        object["mlp_bias"] = json!(true);
    }
    for (key, constant) in architecture.constants {
        object[*key] = json!(constant);
    }
    let mut config = ModelConfig::from_json(object)?;
    config.rope_scaling = rope_scaling(header, architecture, &config)?;
    config.validate()?;
    Ok(config)
}

fn rope_scaling(
    header: &Header,
    architecture: &Architecture,
    config: &ModelConfig,
) -> Result<RopeScaling, ConvertError> {
    let key = |name: &str| format!("{}.rope.scaling.{name}", architecture.name);
    let kind = header.text(&key("type"))?.unwrap_or("none");
    let scaling = match kind {
        "none" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: header.number(&key("factor"))?.unwrap_or(1.0),
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
