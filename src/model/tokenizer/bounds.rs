//! What a `tokenizer.json` may ask for. The tokenizer library takes the file's word for sizes, so that a few bytes
//! could make it reserve gigabytes or write a text to a length without bound; those are refused before it reads them.

use serde::Deserialize;
use serde_json::Value;

/// Longest text in bytes that one step may put into a text.
const MAX_INSERTED: usize = 1 << 10;
/// How many times longer all replacements together may make a text.
const MAX_GROWTH: usize = 1 << 10;
/// Most steps of a pipeline, and most parts of a template.
const MAX_STEPS: usize = 1 << 10;

/// All that asks for sizes; the vocabulary is passed over.
#[derive(Deserialize)]
struct Parts {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: Option<Model>,
}

#[derive(Deserialize)]
struct Model {
    continuing_subword_prefix: Option<Value>,
    end_of_word_suffix: Option<Value>,
    unk_token: Option<Value>,
}

/// Refuses a file that asks for too much.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let parts: Parts = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    for part in [
        &parts.normalizer,
        &parts.pre_tokenizer,
        &parts.post_processor,
        &parts.decoder,
    ] {
        let mut pipeline = Pipeline {
            growth: 1,
            steps: 0,
        };
        part.iter().try_for_each(|part| pipeline.step(part))?;
    }
    let Some(model) = &parts.model else {
        return Ok(());
    };
    for (key, text) in [
        (
            "continuing_subword_prefix",
            &model.continuing_subword_prefix,
        ),
        ("end_of_word_suffix", &model.end_of_word_suffix),
        ("unk_token", &model.unk_token),
    ] {
        short(key, text.as_ref())?;
    }
    Ok(())
}

/// The steps of one part of the file.
struct Pipeline {
    growth: usize,
    steps: usize,
}

impl Pipeline {
    fn step(&mut self, step: &Value) -> Result<(), String> {
        self.steps += 1;
        if self.steps > MAX_STEPS {
            return Err(format!("expected at most {MAX_STEPS} steps, got more"));
        }
        match step.get("type").and_then(Value::as_str) {
            Some("Precompiled") => character_map(step)?,
            Some("Replace") => self.replace(step)?,
            Some("TemplateProcessing") => template(step)?,
            _ => {
                for key in [
                    "prepend",
                    "content",
                    "replacement",
                    "prefix",
                    "suffix",
                    "cleanup",
                ] {
                    short(key, step.get(key))?;
                }
            }
        }
        for key in ["normalizers", "pretokenizers", "processors", "decoders"] {
            if let Some(Value::Array(steps)) = step.get(key) {
                steps.iter().try_for_each(|step| self.step(step))?;
            }
        }
        Ok(())
    }

    /// The worst that a replacement can do: one byte of the text becomes all of `content`.
    fn replace(&mut self, step: &Value) -> Result<(), String> {
        short("content", step.get("content"))?;
        let content = step.get("content").and_then(Value::as_str).unwrap_or("");
        let pattern = step.pointer("/pattern/String").and_then(Value::as_str);
        let replaced = pattern.map_or(1, str::len).max(1);
        self.growth = self
            .growth
            .saturating_mul(content.len().div_ceil(replaced).max(1));
        match self.growth <= MAX_GROWTH {
            true => Ok(()),
            false => Err(format!(
                "expected replacements that make a text at most {MAX_GROWTH} times longer, got more"
            )),
        }
    }
}

/// A character map begins with the length of its table in bytes, which the library reserves.
fn character_map(step: &Value) -> Result<(), String> {
    let Some(Value::String(text)) = step.get("precompiled_charsmap") else {
        return Ok(());
    };
    let map = base64::decode(text);
    let map = map.map_err(|error| format!("precompiled_charsmap: {error}"))?;
    let Some((size, rest)) = map.split_first_chunk() else {
        return Ok(());
    };
    let size = u32::from_le_bytes(*size) as usize;
    match size <= rest.len() {
        true => Ok(()),
        false => Err(format!(
            "precompiled_charsmap: expected a table of at most the {} bytes that follow, got {size}",
            rest.len()
        )),
    }
}

fn template(step: &Value) -> Result<(), String> {
    let lists = ["single", "pair"].map(|key| step.get(key).and_then(Value::as_array));
    let parts = lists.iter().flatten().map(|list| list.len());
    let tokens = step.get("special_tokens").and_then(Value::as_object);
    let ids = tokens.into_iter().flat_map(|tokens| tokens.values());
    let ids = ids.map(|token| {
        token
            .get("ids")
            .and_then(Value::as_array)
            .map_or(0, Vec::len)
    });
    match parts.chain(ids).max().unwrap_or(0) {
        0..=MAX_STEPS => Ok(()),
        got => Err(format!(
            "post_processor: expected at most {MAX_STEPS} parts of a template and ids of a token, got {got}"
        )),
    }
}

fn short(key: &str, text: Option<&Value>) -> Result<(), String> {
    match text.and_then(Value::as_str).map_or(0, str::len) {
        0..=MAX_INSERTED => Ok(()),
        got => Err(format!(
            "`{key}`: expected at most {MAX_INSERTED} bytes, got {got}"
        )),
    }
}
