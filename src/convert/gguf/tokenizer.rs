//! The vocabulary in a GGUF file as `tokenizer.json`, and the small files that stand beside it.
//!
//! Two kinds of vocabularies are known: byte-level BPE (`gpt2`), whose merges stand in the file and whose way of
//! cutting text is named by `tokenizer.ggml.pre`, and SentencePiece BPE (`llama`), whose merges follow from the pieces'
//! scores.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::super::ConvertError;
use super::header::{Header, Value};
use super::metadata::{special_token, without_nulls};
use crate::model::config::ModelConfig;

/// Token types of GGUF.
const UNKNOWN: i128 = 2;
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;

/// How Llama 3 cuts text before BPE.
const LLAMA3_WORDS: &str = concat!(
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}",
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
);

/// The vocabulary of a file.
struct Vocabulary<'a> {
    header: &'a Header,
    tokens: Vec<&'a str>,
    types: Vec<i128>,
}

/// `tokenizer.json`.
pub(super) fn tokenizer(header: &Header) -> Result<Json, ConvertError> {
    let vocabulary = Vocabulary::of(header)?;
    match header.text("tokenizer.ggml.model")? {
        Some("gpt2") => vocabulary.byte_level(),
        Some("llama") => vocabulary.sentence_piece(),
        other => Err(vocabulary.unsupported(format!("a tokenizer of model {other:?}"))),
    }
}

/// `tokenizer_config.json` and `generation_config.json`.
pub(super) fn beside(header: &Header, config: &ModelConfig) -> [(&'static str, Json); 2] {
    // What is of another type was refused when the tokenizer was made of the same keys.
    let token = |key: &str| {
        special_token(header, &format!("tokenizer.ggml.{key}_token_id"))
            .ok()
            .flatten()
    };
    let tokenizer = without_nulls(json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "add_bos_token": header.flag("tokenizer.ggml.add_bos_token").ok().flatten(),
        "add_eos_token": header.flag("tokenizer.ggml.add_eos_token").ok().flatten(),
        "chat_template": header.text("tokenizer.chat_template").ok().flatten(),
        "clean_up_tokenization_spaces": false,
    }));
    let generation = without_nulls(json!({
        "bos_token_id": config.bos_token_id.first(),
        "eos_token_id": config.eos_token_id,
    }));
    [
        ("tokenizer_config.json", tokenizer),
        ("generation_config.json", generation),
    ]
}

impl<'a> Vocabulary<'a> {
    fn of(header: &'a Header) -> Result<Self, ConvertError> {
        let texts = |key: &str| -> Result<Vec<&'a str>, ConvertError> {
            let values = header.array(key)?.unwrap_or_default();
            let text = |value: &'a Value| match value {
                Value::Text(text) => Ok(text.as_str()),
                other => Err(malformed(
                    header,
                    key,
                    "an array of texts",
                    format!("{other:?}"),
                )),
            };
            values.iter().map(text).collect()
        };
        let tokens = texts("tokenizer.ggml.tokens")?;
        let key = "tokenizer.ggml.token_type";
        let types = match header.array(key)? {
            None => vec![1; tokens.len()],
            Some(values) => values
                .iter()
                .map(|value| match value {
                    Value::Integer(n) => Ok(*n),
                    other => Err(malformed(header, key, "integers", format!("{other:?}"))),
                })
                .collect::<Result<_, _>>()?,
        };
        if types.len() != tokens.len() {
            let expected = format!("one for each of {} tokens", tokens.len());
            return Err(malformed(header, key, &expected, types.len().to_string()));
        }
        Ok(Self {
            header,
            tokens,
            types,
        })
    }

    fn unsupported(&self, what: String) -> ConvertError {
        ConvertError::Unsupported {
            path: self.header.path.clone(),
            what,
            remedy: "give the model's tokenizer.json with --tokenizer".into(),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ConvertError> {
        self.header.flag(&format!("tokenizer.ggml.{key}"))
    }

    /// Ids by text. Where a text stands twice, the first counts, as it does in the file's own readers.
    fn ids(&self) -> HashMap<&'a str, usize> {
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            ids.entry(*token).or_insert(id);
        }
        ids
    }

    fn vocab(&self) -> Json {
        Json::Object(
            self.ids()
                .into_iter()
                .map(|(token, id)| (token.to_owned(), json!(id)))
                .collect(),
        )
    }

    /// Control tokens, and those of the user, which are found in text before it is cut.
    fn added(&self) -> Vec<Json> {
        let found = self.tokens.iter().zip(&self.types).enumerate();
        found
            .filter(|(_, (_, kind))| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind))
            .map(|(id, (token, kind))| {
                json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": *kind != USER_DEFINED})
            })
            .collect()
    }

    /// What is put around a text.
    fn template(&self, bos_by_default: bool) -> Result<Json, ConvertError> {
        let token = |name: &str, wanted: bool| -> Result<Option<(u32, &str)>, ConvertError> {
            let id = self.header.id(&format!("tokenizer.ggml.{name}_token_id"))?;
            let Some(id) = id.filter(|_| wanted) else {
                return Ok(None);
            };
            let text = self.tokens.get(id as usize).copied();
            text.map(|text| Some((id, text))).ok_or_else(|| {
                let expected = format!("an id below {}", self.tokens.len());
                malformed(
                    self.header,
                    &format!("{name}_token_id"),
                    &expected,
                    id.to_string(),
                )
            })
        };
        let bos = token("bos", self.flag("add_bos_token")?.unwrap_or(bos_by_default))?;
        let eos = token("eos", self.flag("add_eos_token")?.unwrap_or(false))?;
        if bos.is_none() && eos.is_none() {
            return Ok(Json::Null);
        }
        let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
        let framed = |sequence: &[&str]| -> Vec<Json> {
            let mut pieces = Vec::new();
            for name in sequence {
                pieces.extend(bos.map(|(_, text)| special(text)));
                pieces.push(json!({"Sequence": {"id": name, "type_id": 0}}));
                pieces.extend(eos.map(|(_, text)| special(text)));
            }
            pieces
        };
        let tokens: serde_json::Map<String, Json> = bos
            .iter()
            .chain(&eos)
            .map(|(id, text)| {
                (
                    (*text).to_owned(),
                    json!({"id": text, "ids": [id], "tokens": [text]}),
                )
            })
            .collect();
        Ok(
            json!({"type": "TemplateProcessing", "single": framed(&["A"]), "pair": framed(&["A", "B"]),
                  "special_tokens": tokens}),
        )
    }

    fn byte_level(&self) -> Result<Json, ConvertError> {
        let bytes = |use_regex: bool| {
            json!({
                "type": "ByteLevel",
                "add_prefix_space": false,
                "trim_offsets": true,
                "use_regex": use_regex,
            })
        };
        let sequence =
            |first: Json, last: Json| json!({"type": "Sequence", "pretokenizers": [first, last]});
        let (cut, whole_words) = match self.header.text("tokenizer.ggml.pre")?.unwrap_or("default")
        {
            "gpt-2" => (bytes(true), false),
            "smollm" => (
                sequence(
                    json!({"type": "Digits", "individual_digits": true}),
                    bytes(true),
                ),
                false,
            ),
            "llama-bpe" | "llama3" | "llama-v3" => {
                let words = json!({"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated",
                                   "invert": false});
                (sequence(words, bytes(false)), true)
            }
            other => return Err(self.unsupported(format!("text cut by the rules of {other:?}"))),
        };
        let key = "tokenizer.ggml.merges";
        let mut merges = Vec::new();
        for merge in self.header.array(key)?.unwrap_or_default() {
            let pair = match merge {
                Value::Text(text) => text.split_once(' '),
                _ => None,
            };
            let Some((left, right)) = pair else {
                return Err(malformed(
                    self.header,
                    key,
                    "two tokens with a space between",
                    format!("{merge:?}"),
                ));
            };
            merges.push(json!([left, right]));
        }
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added(),
            "normalizer": null,
            "pre_tokenizer": cut,
            "post_processor": self.template(whole_words)?,
            "decoder": bytes(true),
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                      "ignore_merges": whole_words, "vocab": self.vocab(), "merges": merges},
        }))
    }

    fn sentence_piece(&self) -> Result<Json, ConvertError> {
        let prefix = self.flag("add_space_prefix")?.unwrap_or(true);
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let mut normalizers = vec![replace(" ", "\u{2581}")];
        let mut decoders = vec![
            replace("\u{2581}", " "),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "\u{2581}"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = self.header.id("tokenizer.ggml.unknown_token_id")?;
        let unknown = unknown.and_then(|id| self.tokens.get(id as usize));
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": self.template(true)?,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                      "vocab": self.vocab(), "merges": self.merges_of_scores()?},
        }))
    }

    /// Every pair of pieces that is a piece, the best piece first, then by the ids of the two.
    fn merges_of_scores(&self) -> Result<Vec<Json>, ConvertError> {
        let key = "tokenizer.ggml.scores";
        let scores = self.header.array(key)?.unwrap_or_default();
        if scores.len() != self.tokens.len() {
            let expected = format!("one for each of {} tokens", self.tokens.len());
            return Err(malformed(
                self.header,
                key,
                &expected,
                scores.len().to_string(),
            ));
        }
        let ids = self.ids();
        let mut merges = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let Value::Float(score) = scores[id] else {
                return Err(malformed(
                    self.header,
                    key,
                    "floats",
                    format!("{:?}", scores[id]),
                ));
            };
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                    merges.push((score, id, *l, *r, left, right));
                }
            }
        }
        merges.sort_by(|a, b| {
            b.0.total_cmp(&a.0)
                .then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)))
        });
        Ok(merges.into_iter().map(|m| json!([m.4, m.5])).collect())
    }
}

fn malformed(header: &Header, key: &str, expected: &str, got: String) -> ConvertError {
    ConvertError::Malformed {
        path: header.path.clone(),
        what: format!("key {key:?}"),
        expected: expected.to_owned(),
        got: got.chars().take(80).collect(),
    }
}
