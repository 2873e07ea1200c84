//! GGUF files of every family that is read: the tiny models of `tests/golden/families`, written as GGUF under the names
//! that the package `gguf` gives (tests/golden/gguf/names.py), come back with their weights to the bit.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use segattn::convert::gguf::Gguf;
use segattn::model::config::{ModelConfig, WeightType};
use segattn::model::parameters::base_specs;
use segattn::model::weights::Checkpoint;
use serde_json::Value;

/// Architecture, folder, and whether rows of queries and keys lie with rotated pairs side by side.
const FAMILIES: [(&str, &str, bool); 7] = [
    ("llama", "llama_bias", true),
    ("qwen2", "qwen2", false),
    ("qwen3", "qwen3_bias", false),
    ("granite", "granite", true),
    ("phi3", "phi3", false),
    ("olmo2", "olmo2", false),
    ("smollm3", "smollm3_bias", true),
];
/// Types of values and of tensors in GGUF.
const UINT32: u32 = 4;
const FLOAT32: u32 = 6;
const STRING: u32 = 8;
const BF16: u32 = 30;
const ALIGNMENT: usize = 32;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// A GGUF file in the making.
#[derive(Default)]
struct Writer {
    keys: Vec<u8>,
    count: u64,
    infos: Vec<u8>,
    tensors: u64,
    data: Vec<u8>,
}

fn text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

impl Writer {
    fn key(&mut self, name: &str, kind: u32) -> &mut Vec<u8> {
        self.count += 1;
        text(&mut self.keys, name);
        self.keys.extend(kind.to_le_bytes());
        &mut self.keys
    }

    fn size(&mut self, name: &str, value: usize) {
        let value = (value as u32).to_le_bytes();
        self.key(name, UINT32).extend(value);
    }

    fn number(&mut self, name: &str, value: f64) {
        let value = (value as f32).to_le_bytes();
        self.key(name, FLOAT32).extend(value);
    }

    fn tensor(&mut self, name: &str, shape: &[usize], bytes: &[u8]) {
        self.tensors += 1;
        text(&mut self.infos, name);
        self.infos.extend((shape.len() as u32).to_le_bytes());
        for len in shape.iter().rev() {
            self.infos.extend((*len as u64).to_le_bytes());
        }
        self.infos.extend(BF16.to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(bytes);
        self.data
            .resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
    }

    fn finish(self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(self.tensors.to_le_bytes());
        file.extend(self.count.to_le_bytes());
        file.extend(self.keys);
        file.extend(self.infos);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(self.data);
        file
    }
}

/// The rows of heads with the two that rotate together side by side.
fn interleaved(bytes: &[u8], heads: usize, head_dim: usize) -> Vec<u8> {
    let row = bytes.len() / heads / head_dim;
    let mut moved = Vec::with_capacity(bytes.len());
    for head in bytes.chunks(head_dim * row) {
        for i in 0..head_dim / 2 {
            moved.extend(&head[i * row..][..row]);
            moved.extend(&head[(i + head_dim / 2) * row..][..row]);
        }
    }
    moved
}

/// A folder's model as a GGUF file of this architecture.
fn as_gguf(architecture: &str, folder: &Path, side_by_side: bool) -> Vec<u8> {
    let config = ModelConfig::load(folder).unwrap();
    let names: Value =
        serde_json::from_slice(&std::fs::read(golden("gguf/names.json")).unwrap()).unwrap();
    let mut file = Writer::default();
    text(file.key("general.architecture", STRING), architecture);
    let key = |name: &str| format!("{architecture}.{name}");
    for (name, size) in [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("rope.dimension_count", config.rotary_dim()),
    ] {
        file.size(&key(name), size);
    }
    file.number(&key("rope.freq_base"), config.rope_theta);
    file.number(
        &key("attention.layer_norm_rms_epsilon"),
        config.rms_norm_eps,
    );
    if architecture == "granite" {
        let switches = &config.switches;
        file.number(&key("attention.scale"), switches.attention_scale.unwrap());
        file.number(&key("embedding_scale"), switches.embedding_multiplier);
        file.number(&key("residual_scale"), switches.residual_multiplier);
        file.number(&key("logit_scale"), switches.logits_divisor);
    }
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (name, tensor) in tensors.tensors() {
        let stored = match name.strip_prefix("model.layers.") {
            Some(rest) => {
                let (layer, part) = rest.split_once('.').unwrap();
                let (stem, end) = part.rsplit_once('.').unwrap();
                let stem = names[architecture][stem].as_str().unwrap();
                format!("blk.{layer}.{stem}.{end}")
            }
            None => match name.as_str() {
                "model.embed_tokens.weight" => "token_embd.weight".to_owned(),
                "model.norm.weight" => "output_norm.weight".to_owned(),
                other => {
                    assert_eq!(other, "lm_head.weight");
                    "output.weight".to_owned()
                }
            },
        };
        let heads = match name.split('.').nth_back(1) {
            Some("q_proj") => config.num_attention_heads,
            Some("k_proj") => config.num_key_value_heads,
            _ => 0,
        };
        let data = match side_by_side && heads > 0 {
            true => interleaved(tensor.data(), heads, config.head_dim),
            false => tensor.data().to_vec(),
        };
        file.tensor(&stored, tensor.shape(), &data);
    }
    file.finish()
}

#[test]
fn every_family_comes_back_from_gguf_to_the_bit() {
    for (architecture, name, side_by_side) in FAMILIES {
        let folder = golden("families").join(name);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, as_gguf(architecture, &folder, side_by_side)).unwrap();
        let gguf = Gguf::open(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (before, got) = (ModelConfig::load(&folder).unwrap(), gguf.config());
        assert_eq!(got.family.model_type, before.family.model_type);
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.abs();
        let scale = |config: &ModelConfig| config.switches.attention_scale.unwrap_or(1.0);
        assert!(close(scale(got), scale(&before)), "{name}");
        assert!(close(got.rope_theta, before.rope_theta), "{name}");
        let flags = |config: &ModelConfig| {
            let s = &config.switches;
            let flags = [s.qkv_bias, s.output_bias, s.mlp_bias, s.norm_after];
            (flags, s.qk_norm, config.rotary_dim(), s.unrotated.clone())
        };
        assert_eq!(flags(got), flags(&before), "{name}");
        let out = dir.path().join("out");
        gguf.save(&out, got, WeightType::Bf16, Some("{}".into()))
            .unwrap();
        let [old, new] = [&folder, &out].map(|folder| Checkpoint::open(folder).unwrap());
        let again = ModelConfig::load(&out).unwrap();
        new.check(&again).unwrap();
        for spec in base_specs(&before) {
            let [old, new] = [&old, &new].map(|files| files.read(&spec).unwrap());
            assert!(old == new, "{name}: {}", spec.parts[0].0);
        }
    }
}

#[test]
fn other_architectures_are_refused_with_those_that_are_read() {
    let mut file = Writer::default();
    text(file.key("general.architecture", STRING), "gemma3");
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), file.finish()).unwrap();
    let said = Gguf::open(path.path()).unwrap_err().to_string();
    assert!(said.contains("gemma3") && said.contains("qwen3"), "{said}");
}
