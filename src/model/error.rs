//! What can be wrong with a model's files: one error type for each kind of file, and one over them.
//!
//! Every variant names the file, key or tensor at fault, what was expected and what came, so that a
//! message alone is enough to repair the file.

use std::path::PathBuf;

/// Anything that can go wrong between a model folder and this crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// `config.json` cannot be read, or describes a model that is not supported.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The safetensors files cannot be read, or do not fit the configuration.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The tokenizer cannot be read, or does not fit the configuration.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The adapter cannot be read, or is not one of the model.
    #[error(transparent)]
    Adapter(#[from] super::lora::AdapterError),
    /// The device cannot take the model.
    #[error(transparent)]
    Device(#[from] crate::device::DeviceError),
}

/// A file that cannot be read or written as a whole, whatever it holds.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A folder, pipe or device stands where a file belongs.
    #[error("{path}: expected a regular file")]
    NotAFile {
        /// The path in question.
        path: PathBuf,
    },
    /// More bytes than a file of this kind can need.
    #[error("{path}: expected at most {limit} bytes, got {got}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Largest accepted size in bytes.
        limit: u64,
        /// Its size in bytes.
        got: u64,
    },
    /// The text is not JSON of the expected form.
    #[error("{path}: {message}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said, with line and column.
        message: String,
    },
}

/// `config.json` is unreadable, incomplete, contradictory, or of a model this crate does not compute.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// A key without which the model is not defined.
    #[error("config.json: `{key}` is missing")]
    Missing {
        /// The key, with the objects around it (`segment.prior_len`).
        key: String,
    },
    /// A value of the wrong type or outside its bounds.
    #[error("config.json: `{key}` expected {expected}, got {got}")]
    Invalid {
        /// The key, with the objects around it.
        key: String,
        /// What would be accepted.
        expected: String,
        /// What is there, shortened.
        got: String,
    },
    /// A feature this crate does not compute. Ignoring it would give wrong numbers.
    #[error("config.json: `{key}` = {got} is not supported; supported: {supported}")]
    Unsupported {
        /// The key, with the objects around it.
        key: String,
        /// What is supported instead.
        supported: String,
        /// What is there, shortened.
        got: String,
    },
}

/// Weight files are unreadable, malformed, or not those of the configuration.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// The configuration to be saved beside the weights.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Neither of the two names is there.
    #[error(
        "{folder}: expected model.safetensors or model.safetensors.index.json, found neither; other weights there: \
         {found}. Files of other kinds than .safetensors are not read: load the model in Python with transformers and \
         save it again with save_pretrained"
    )]
    NoWeights {
        /// The model folder.
        folder: PathBuf,
        /// Files in it that hold weights.
        found: NameList,
    },
    /// Shards without an index that are not one complete set.
    #[error(
        "{folder}: without model.safetensors.index.json, expected {expected} and no others, found {found}; add the \
         missing files or the index"
    )]
    Shards {
        /// The model folder.
        folder: PathBuf,
        /// The set that the first file belongs to.
        expected: String,
        /// All shards in the folder.
        found: NameList,
    },
    /// Saving would mix with weights that are already there.
    #[error("{path}: already there; weights are saved only where there are none")]
    AlreadyThere {
        /// The file in the way.
        path: PathBuf,
    },
    /// A safetensors file or an index breaks its format.
    #[error("{path}: {what}: expected {expected}, got {got}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The part of it: "header length", "tensor `x`".
        what: String,
        /// What would be accepted.
        expected: String,
        /// What is there.
        got: String,
    },
    /// One name, two tensors.
    #[error("tensor `{name}` is in {first} and again in {second}")]
    Duplicate {
        /// The tensor.
        name: String,
        /// Where it was first.
        first: PathBuf,
        /// Where it was again; may be the same file.
        second: PathBuf,
    },
    /// The index names a file outside its own folder, or of another kind.
    #[error(
        "{path}: shard `{shard}`: expected the plain name of a .safetensors file beside the index"
    )]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The name in it, shortened.
        shard: String,
    },
    /// Tensors of the configuration that the files lack, or tensors it does not know.
    #[error(
        "weights in {folder} do not fit config.json: missing {missing}, unexpected {unexpected}"
    )]
    Names {
        /// The model folder.
        folder: PathBuf,
        /// Tensors the files lack.
        missing: NameList,
        /// Tensors the configuration does not know.
        unexpected: NameList,
    },
    /// A tensor of the wrong shape.
    #[error("tensor `{name}`: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Shape by the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        got: Vec<usize>,
    },
    /// A tensor in a number format that is not read.
    #[error("tensor `{name}`: expected F64, F32, F16 or BF16, got {got}")]
    NumberFormat {
        /// The tensor.
        name: String,
        /// Format in the file.
        got: String,
    },
    /// A past gate that is negative or not finite.
    #[error("tensor `{name}`[{index}]: expected a finite number >= 0, got {got}")]
    Gate {
        /// The tensor.
        name: String,
        /// The query head.
        index: usize,
        /// Its gate.
        got: f32,
    },
    /// A weight that is infinite or not a number: a model with one computes nothing.
    #[error("tensor `{name}`[{index}]: expected a finite number, got {got}")]
    NotFinite {
        /// The tensor.
        name: String,
        /// Flat index of the number.
        index: usize,
        /// The number.
        got: f32,
    },
    /// A head beside the embedding it is said to be tied to, with other values.
    #[error(
        "{folder}: `lm_head.weight` differs from the embedding; \
         expected the same values with `tie_word_embeddings`, or that key false in config.json"
    )]
    TiedHead {
        /// The model folder.
        folder: PathBuf,
    },
    /// A tensor does not fit the host's memory.
    #[error("tensor `{name}`: out of memory, {bytes} bytes were asked for")]
    OutOfMemory {
        /// The tensor, or its first part.
        name: String,
        /// Bytes asked for.
        bytes: usize,
    },
    /// A tensor to be saved has the wrong number of elements.
    #[error("tensor `{name}`: expected {expected} numbers, got {got}")]
    Length {
        /// The tensor.
        name: String,
        /// Elements by the configuration.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// A finite weight that would become infinite in the file.
    #[error("tensor `{name}`[{index}] = {got} does not fit {dtype}; save as bfloat16 or float32")]
    Overflow {
        /// The tensor.
        name: String,
        /// Flat index of the number.
        index: usize,
        /// The number.
        got: f32,
        /// Format of the file.
        dtype: &'static str,
    },
}

/// Names in an error: all are kept, the message shows the first few.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameList(pub Vec<String>);

impl std::fmt::Display for NameList {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 8;
        if self.0.is_empty() {
            return out.write_str("none");
        }
        out.write_str(&self.0[..self.0.len().min(SHOWN)].join(", "))?;
        match self.0.len().checked_sub(SHOWN) {
            None | Some(0) => Ok(()),
            Some(more) => write!(out, " and {more} more"),
        }
    }
}

/// The tokenizer is unreadable, or not that of the model.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// `tokenizer.json` is not understood.
    #[error("{path}: not a tokenizer: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the tokenizer library said.
        message: String,
    },
    /// The folder has a `tokenizer.json`, and this build cannot read it.
    #[error("{path}: this build reads no tokenizer.json; build with the feature `tokenizer`")]
    NotBuiltIn {
        /// The file.
        path: PathBuf,
    },
    /// No `tokenizer.json`, and too few ids for one of each byte.
    #[error(
        "{folder}: no tokenizer.json, and vocab_size = {vocab_size} is too few for bytes; \
         expected at least 256"
    )]
    TooFewIds {
        /// The model folder.
        folder: PathBuf,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },
    /// The folder has a tokenizer that is not read, of another kind than `tokenizer.json`.
    #[error(
        "{folder}: has the tokenizer file {file} but no tokenizer.json, which text needs (token ids do not). To make \
         one, in Python: transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR). If the model's tokens \
         are bytes, put \"byte_tokens\": true into config.json"
    )]
    OtherKind {
        /// The model folder.
        folder: PathBuf,
        /// The name of such a file in it.
        file: String,
    },
    /// A setting of generation out of its range.
    #[error("{path}: `{key}` expected {expected}, got {got}")]
    Generation {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What would be accepted.
        expected: String,
        /// What is there, shortened.
        got: String,
    },
    /// The text becomes ids for which the model has no embedding.
    #[error(
        "tokenizer: the text has the id {largest}, the model only those below vocab_size = {vocab_size}"
    )]
    Vocabulary {
        /// Largest id of the text.
        largest: u32,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },
    /// The tokenizer library failed on a text or on ids.
    #[error("tokenizer: {message}")]
    Failed {
        /// What it said.
        message: String,
    },
}

/// A chat template that is missing or cannot be used, or messages that it does not take.
#[cfg(feature = "tokenizer")]
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// A file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// The text that the template wrote has no tokens.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The folder has templates, but not the one asked for.
    #[error("{folder}: expected the chat template `{expected}`, found {found}")]
    Name {
        /// The model folder.
        folder: PathBuf,
        /// The template asked for.
        expected: String,
        /// Those that the folder has.
        found: NameList,
    },
    /// The template is not one of the language, or it fails on these messages, or it refuses them itself.
    #[error("chat template: {message}")]
    Template {
        /// What its engine or the template said.
        message: String,
    },
    /// Messages that no template takes.
    #[error("messages: {what}: expected {expected}, got {got}")]
    Messages {
        /// Which part of them.
        what: String,
        /// What would be accepted.
        expected: String,
        /// What is there.
        got: String,
    },
    /// The template does not say which text is the assistant's, and its text does not show it.
    #[error(
        "chat template: message {message}: {what}, so the assistant's text cannot be told from the rest; expected a \
         template with {{% generation %}} around what the assistant writes"
    )]
    Answer {
        /// Which message, from 0.
        message: usize,
        /// What the template does.
        what: &'static str,
    },
}
