//! What is done with the bytes of each format that comes from outside: a typed error, or something that holds what it
//! promises. The fuzz targets call these with whatever the fuzzer finds, `tests/formats.rs` with random changes of good
//! files.

use std::path::Path;
use std::sync::OnceLock;

use segattn::attention::{View, ViewMut, cpu};
use segattn::convert::gguf::Gguf;
use segattn::eval::choice;
use segattn::experiment::definition::Definition;
use segattn::experiment::report::report;
use segattn::experiment::rows::{Rows, read as read_rows};
use segattn::model::chat::{Chat, Conversation};
use segattn::model::config::{CONFIG_FILE, ModelConfig, WeightType};
use segattn::model::parameters::parameters;
use segattn::model::session_file::StateFile;
use segattn::model::tokenizer::{
    GENERATION_FILE, GenerationSettings, TOKENIZER_FILE, Tokenizer, end_ids,
};
use segattn::model::weights::header::Header;
use segattn::model::weights::index::Index;
use segattn::train::checkpoint::{self, Checkpoint, Disk, Fingerprints};
use segattn::train::config::{Config, DataSection};
use segattn::train::data::{
    Bytes, Conversed, Corpus, Encode, Located, Position, Reading, converse, parse_ids,
};
use segattn::train::guard::{Guard, GuardConfig};
use segattn::train::progress::{Progress, Tensors};
use sha2::{Digest, Sha256};

#[path = "adapter.rs"]
pub mod adapter;
#[allow(dead_code, reason = "the command uses all of it")]
#[path = "../src/cli/op/case.rs"]
mod case;
#[path = "request.rs"]
mod request;

/// A format's name, and what is done with its bytes; `folder` is an empty one.
pub type Format = (&'static str, fn(&[u8], &Path));

pub const ALL: [Format; 24] = [
    ("adapter", adapter::adapter),
    ("safetensors", safetensors),
    ("index", index),
    ("config", config),
    ("tokenizer", tokenizer),
    ("generation", generation),
    ("state_file", state_file),
    ("manifest", manifest),
    ("run", run),
    ("op_case", op_case),
    ("token_ids", token_ids),
    ("jsonl", jsonl),
    ("gguf", gguf),
    ("state_json", state_json),
    ("bin", bin),
    ("choices", choices),
    ("experiment", experiment),
    ("messages", messages),
    ("parquet", parquet),
    ("request", request::request),
    ("rows", rows),
    ("template", template),
    ("tokenizer_config", tokenizer_config),
    ("zst", zst),
];

/// A weight file's header: its tensors lie within the file.
pub fn safetensors(bytes: &[u8], _: &Path) {
    if let Ok(header) = Header::parse(bytes, Path::new("model.safetensors")) {
        for (_, tensor) in header.tensors {
            assert!(tensor.start + tensor.bytes <= bytes.len() as u64);
        }
    }
}

/// An index of shards: its names stay in the folder.
pub fn index(bytes: &[u8], _: &Path) {
    if let Ok(index) = Index::parse(bytes, Path::new("model.safetensors.index.json")) {
        for name in index.shards() {
            assert_eq!(Path::new(name).file_name(), Some(name.as_ref()));
        }
    }
}

/// A model's configuration: written, it is read back as it is.
pub fn config(bytes: &[u8], folder: &Path) {
    write(folder, CONFIG_FILE, bytes);
    if let Ok(config) = ModelConfig::load(folder) {
        let again =
            ModelConfig::from_json(config.to_json()).expect("what was read can be read again");
        assert_eq!(parameters(&again), parameters(&config));
    }
}

/// A tokenizer: every call of it returns.
pub fn tokenizer(bytes: &[u8], _: &Path) {
    if let Ok(tokenizer) = Tokenizer::parse(bytes, Path::new(TOKENIZER_FILE))
        && let Ok(tokens) = tokenizer.encode("the segment é\u{1f389} <end>", true)
    {
        let _ = tokenizer.decode(&tokens, true);
    }
}

/// Settings of generation: in their ranges.
pub fn generation(bytes: &[u8], folder: &Path) {
    write(folder, GENERATION_FILE, bytes);
    let config = ModelConfig::new(8, 8, 8, 1, 1, 1).expect("sizes that fit");
    let _ = end_ids(folder, &config);
    if let Ok(settings) = GenerationSettings::load(folder) {
        assert!(settings.top_p.is_none_or(|p| p > 0.0 && p <= 1.0));
        assert!(settings.temperature.is_none_or(|t| t >= 0.0));
    }
}

/// A saved session: as many tokens as it says.
pub fn state_file(bytes: &[u8], folder: &Path) {
    write(folder, "state", bytes);
    if let Ok(mut file) = StateFile::open(&folder.join("state")) {
        for (i, position) in file.positions().to_vec().into_iter().enumerate() {
            if let Ok(tokens) = file.tokens(i) {
                assert!(tokens.is_empty() || tokens.len() == position);
            }
        }
    }
}

/// A checkpoint's list of files: no checkpoint without them.
pub fn manifest(bytes: &[u8], folder: &Path) {
    write(folder, "manifest.json", bytes);
    assert!(checkpoint::load(folder).is_err());
}

/// A run's configuration: written, it is read back as it is.
pub fn run(bytes: &[u8], _: &Path) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(config) = Config::parse(text, &[])
        && let Ok(written) = config.to_toml()
    {
        let again = Config::parse(&written, &[]).expect("what was written can be read");
        assert_eq!(again, config);
    }
}

/// A case of the operation: it is computed or refused.
pub fn op_case(bytes: &[u8], _: &Path) {
    let Ok(case) = case::Case::read(bytes) else {
        return;
    };
    let problem = case.problem(|name, shape| Ok(View::packed(values(&case, name), shape)));
    let problem = problem.expect("tensors of the case");
    let [batch, segment, q_heads, _] = case.q_shape;
    let mut out = vec![0.0; case.q_shape.iter().product()];
    let mut lse = vec![0.0; batch * q_heads * segment];
    let _ = cpu::forward(&problem, ViewMut::packed(&mut out, case.q_shape), &mut lse);
}

fn values<'a>(case: &'a case::Case, name: &str) -> &'a [f32] {
    let tensor = case.floats.iter().find(|(own, _)| *own == name);
    tensor.map_or(&[], |(_, values)| &values[..])
}

/// A JSON file of token ids, with or without breaks: every token is in the vocabulary, and every break in the document.
pub fn token_ids(bytes: &[u8], folder: &Path) {
    read_data(bytes, folder, "data.json");
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(tokens) = parse_ids(text)
    {
        assert!(tokens.breaks.iter().all(|at| *at <= tokens.ids.len()));
    }
}

/// Lines of JSON for training: every token is in the vocabulary.
pub fn jsonl(bytes: &[u8], folder: &Path) {
    read_data(bytes, folder, "data.jsonl");
}

/// Packed ids, in front of them the number of the bytes that are their breaks.
pub fn bin(bytes: &[u8], folder: &Path) {
    let (breaks, ids) = bytes.split_first().map_or((0, bytes), |(n, rest)| {
        (usize::from(*n).min(rest.len()), rest)
    });
    write(folder, "data.bin.breaks", &ids[..breaks]);
    read_data(&ids[breaks..], folder, "data.bin");
}

/// A table of training data.
pub fn parquet(bytes: &[u8], folder: &Path) {
    read_data(bytes, folder, "data.parquet");
}

/// Compressed lines of JSON.
pub fn zst(bytes: &[u8], folder: &Path) {
    read_data(bytes, folder, "data.jsonl.zst");
}

/// Lines of conversations, by a template.
pub fn messages(bytes: &[u8], folder: &Path) {
    read_data_by(bytes, folder, "data.jsonl", &Conversing::get());
}

/// A chat template, on conversations of every kind: its marks and answers lie within its text.
pub fn template(bytes: &[u8], folder: &Path) {
    write(folder, "chat_template.jinja", bytes);
    let tokenizer = byte_tokenizer();
    let Ok(Some(chat)) = Chat::open(folder, &tokenizer) else {
        return;
    };
    render(&chat, &tokenizer);
}

/// What stands beside a tokenizer: its framing, and its chat templates.
pub fn tokenizer_config(bytes: &[u8], folder: &Path) {
    static TOKENIZER: &[u8] = include_bytes!("../tests/golden/chat/tokenizer.json");
    write(folder, TOKENIZER_FILE, TOKENIZER);
    write(folder, "tokenizer_config.json", bytes);
    let Ok(tokenizer) = Tokenizer::from_file(&folder.join(TOKENIZER_FILE)) else {
        return;
    };
    let _ = tokenizer.encode("a text", true);
    if let Ok(Some(chat)) = Chat::open(folder, &tokenizer) {
        render(&chat, &tokenizer);
    }
}

fn render(chat: &Chat, tokenizer: &Tokenizer) {
    let conversations = [
        r#"{"messages": [{"role": "user", "content": "<s>é"}, {"role": "assistant", "content": "b\n"}]}"#,
        r#"{"messages": [{"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "t"}]},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.5}}}]},
            {"role": "tool", "content": "{}"}, {"role": "assistant", "content": "</s>"}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "documents": []}"#,
    ];
    for conversation in conversations {
        let conversation: Conversation =
            serde_json::from_str(conversation).expect("a conversation");
        let rendered = chat.render(&conversation, true).into_iter();
        let answers = chat.answers(&conversation).unwrap_or_default();
        for rendered in rendered.chain(answers) {
            for range in rendered.plain.iter().chain(&rendered.generated) {
                assert!(rendered.text.get(range.clone()).is_some());
            }
            if let Ok(encoded) = chat.encode(tokenizer, &rendered) {
                assert!(
                    encoded
                        .generated
                        .iter()
                        .all(|range| range.end <= encoded.ids.len())
                );
            }
        }
        let _ = chat.after_answer(&conversation, &conversation.messages);
    }
}

fn byte_tokenizer() -> Tokenizer {
    let mut config = ModelConfig::new(300, 8, 8, 1, 1, 1).expect("sizes that fit");
    config.bos_token_id = vec![256];
    Tokenizer::bytes(&config)
}

/// Bytes, and conversations by a template.
struct Conversing {
    chat: Chat,
    tokenizer: Tokenizer,
}

impl Conversing {
    fn get() -> Self {
        let tokenizer = byte_tokenizer();
        let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls }}\n{% endfor %}\
                        {{ tools }}";
        let chat = Chat::of_template(template, &tokenizer).expect("a template");
        Self { chat, tokenizer }
    }
}

impl Encode for Conversing {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        Bytes.encode(text)
    }

    fn locate(&self, text: &str) -> Result<Vec<Located>, String> {
        Bytes.locate(text)
    }

    fn ends_line(&self, id: u32) -> bool {
        Bytes.ends_line(id)
    }

    fn converse(&self, conversation: &str) -> Result<Vec<Conversed>, String> {
        converse(&self.chat, &self.tokenizer, conversation)
    }
}

/// Questions of LongBench v2: each has a prompt, or is refused.
pub fn choices(bytes: &[u8], _: &Path) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let encode = |text: &str, _: bool| Ok(text.bytes().map(u32::from).collect());
    for question in choice::read(text).unwrap_or_default() {
        for longest in [None, Some(0), Some(200)] {
            let reading = choice::Reading {
                encode: &encode,
                longest,
                segments_per_step: 1,
            };
            if let (Ok(prompt), Some(longest)) = (reading.prompt(&question), longest) {
                assert!(prompt.tokens.len() <= longest);
            }
        }
    }
}

/// An experiment's definition: what can be read has runs with configurations.
pub fn experiment(bytes: &[u8], _: &Path) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    for smoke in [false, true] {
        if let Ok(definition) = Definition::parse("name", text, smoke, &[]) {
            for (arm, seed) in definition.runs() {
                let config = arm.config(
                    seed,
                    Path::new("model"),
                    Some(Path::new("teacher")),
                    Path::new("run"),
                );
                config.expect("what was checked");
                for evaluation in &arm.evaluations {
                    let _ = definition.fingerprint(arm, evaluation);
                }
            }
        }
    }
}

/// Rows of results: their report is made.
pub fn rows(bytes: &[u8], folder: &Path) {
    write(folder, "rows.jsonl", bytes);
    if let Ok(rows) = read_rows(&folder.join("rows.jsonl")) {
        let _ = report("name", "name", "rows.jsonl", &rows, None);
    }
    let _ = Rows::open(&folder.join("rows.jsonl"));
}

fn read_data(bytes: &[u8], folder: &Path, name: &str) {
    read_data_by(bytes, folder, name, &Bytes);
}

fn read_data_by(bytes: &[u8], folder: &Path, name: &str, encode: &dyn Encode) {
    write(folder, name, bytes);
    let section = DataSection::default();
    let reading = Reading {
        section: &section,
        vocab_size: 300,
        before: &[1],
        after: &[2],
        encode,
        prompt_break: Default::default(),
        tokenizer: "bytes",
        cache: None,
        scratch: folder,
        progress: &|_, _| (),
    };
    if let Ok(corpus) = Corpus::read(&[&[folder.join(name)]], &reading) {
        for document in corpus.documents() {
            let tokens = corpus.tokens(document, 0..document.len);
            let tokens = tokens.expect("tokens of a document");
            assert!(tokens.ids.iter().all(|token| *token < 300));
            assert!(tokens.breaks.is_sorted());
            assert!(tokens.breaks.iter().all(|at| *at <= tokens.ids.len()));
        }
    }
}

/// A GGUF file: what can be opened is converted or refused.
pub fn gguf(bytes: &[u8], folder: &Path) {
    write(folder, "model.gguf", bytes);
    if let Ok(gguf) = Gguf::open(&folder.join("model.gguf")) {
        let out = folder.join("out");
        let _ = gguf.save(&out, gguf.config(), WeightType::F32, None);
        let _ = std::fs::remove_dir_all(out);
    }
}

/// The state of a checkpoint whose other files are good, under a hash that fits it.
pub fn state_json(bytes: &[u8], folder: &Path) {
    let files = checkpoint_files();
    for (name, content) in files {
        write(folder, name, content);
    }
    write(folder, "state.json", bytes);
    let manifest = files.iter().find(|(name, _)| name == "manifest.json");
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&manifest.expect("a manifest").1).expect("JSON");
    let entry = &mut manifest["files"]["state.json"];
    entry["bytes"] = bytes.len().into();
    let hash = Sha256::digest(bytes);
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    entry["sha256"] = hash.into();
    write(folder, "manifest.json", manifest.to_string().as_bytes());
    if let Ok(read) = checkpoint::load(folder) {
        let names = read.extra.iter().map(|(name, _)| Path::new(name));
        assert!(
            names
                .into_iter()
                .all(|name| !name.has_root() && !name.starts_with(".."))
        );
    }
}

/// The files of a good checkpoint.
pub fn checkpoint_files() -> &'static [(String, Vec<u8>)] {
    static FILES: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    FILES.get_or_init(|| {
        let model = ModelConfig::new(8, 8, 8, 1, 1, 1).expect("sizes that fit");
        let train = [("data.train".to_owned(), "x".to_owned())];
        let good = Checkpoint {
            config: Config::parse("", &train).expect("a configuration"),
            tensors: Tensors::initial(&model, 1),
            model,
            progress: Progress {
                step: 3,
                updates: 3,
                tokens: 30,
                position: Position::default(),
                guard: Guard::new(GuardConfig::default()).expect("defaults"),
            },
            data: Fingerprints {
                train: "documents".into(),
                validation: "others".into(),
                base: None,
                teacher: None,
            },
            extra: vec![("tokenizer.json".into(), b"{}".to_vec())],
        };
        let root = tempfile::tempdir().expect("a folder");
        let folder = checkpoint::save(&mut Disk, root.path(), &good, 2).expect("a checkpoint");
        let entries = std::fs::read_dir(folder).expect("a folder");
        let file = |entry: std::io::Result<std::fs::DirEntry>| {
            let path = entry.expect("an entry").path();
            let name = path
                .file_name()
                .expect("a name")
                .to_string_lossy()
                .into_owned();
            (name, std::fs::read(path).expect("a file"))
        };
        entries.map(file).collect()
    })
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(folder.join(name), bytes).expect("an empty folder takes a file");
}
