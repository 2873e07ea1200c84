//! Good files of every format that is read, with which tests and fuzzing begin.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use segattn::model::config::ModelConfig;
use segattn::model::lora::folder::to_json;
use segattn::model::lora::{Lora, LoraConfig};
use segattn::model::session::Session;
use segattn::model::session_file::{Origin, save};
use segattn::model::weights::{Checkpoint, SaveOptions, initial};

use super::formats;

/// Good files of the format, at least one.
pub fn of(name: &str) -> Vec<Vec<u8>> {
    match name {
        "adapter" => vec![
            adapter("all-linear", false),
            adapter("1.self_attn.q_proj", true),
        ],
        "bin" => vec![
            [&[8], &1u64.to_le_bytes()[..], &[7, 0, 43, 1, 9, 0]].concat(),
            vec![0, 7, 0],
        ],
        "choices" => vec![CHOICES.into(), CHOICES.trim_matches(['[', ']']).into()],
        "config" => [
            vec![config()],
            in_folder("tests/golden/families", "config.json"),
        ]
        .concat(),
        "experiment" => in_folder("experiments", ".toml"),
        "jsonl" => vec![JSONL.into()],
        "messages" => conversations(),
        "parquet" => in_folder("tests/golden/parquet", ".parquet"),
        "request" => REQUESTS
            .iter()
            .map(|(path, body)| [&[*path], body.as_bytes()].concat())
            .collect(),
        "rows" => lines_of("experiments/results/short.jsonl", 8),
        "template" => in_folder("tests/golden/chat/templates", ".jinja"),
        "tokenizer" => ["tests/model/files/data", "tests/golden/chat"]
            .iter()
            .flat_map(|folder| in_folder(folder, "tokenizer.json"))
            .collect(),
        "tokenizer_config" => vec![TOKENIZER_CONFIG.into(), TOKENIZER_CONFIG_NAMED.into()],
        "zst" => vec![zstd::encode_all(JSONL.as_bytes(), 0).unwrap()],
        other => vec![sample(other)],
    }
}

const JSONL: &str =
    "{\"text\": \"one\", \"x\": 1}\n\n{\"text\": [1, 2], \"breaks\": [1], \"weights\": [0.5, 1]}\n";
const CHOICES: &str = r#"[{"_id": "a", "domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short",
    "question": "q?", "choice_A": "a", "choice_B": "b", "choice_C": "c", "choice_D": "d", "answer": "B",
    "context": "A long text."}]"#;
const TOKENIZER_CONFIG: &str = r#"{"add_bos_token": true, "add_eos_token": false, "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": false}, "model_max_length": 1000000000000000019884624838656,
    "chat_template": "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}"}"#;
const TOKENIZER_CONFIG_NAMED: &str = r#"{"chat_template": [{"name": "default", "template": "{{ messages[0] }}"},
    {"name": "tool_use", "template": "{{ tools | tojson }}"}]}"#;
/// By the number of their path, see `fuzz/request.rs`.
const REQUESTS: [(u8, &str); 6] = [
    (
        0,
        r#"{"prompt": "ab", "max_tokens": 4, "temperature": 0.8, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7,
            "n": 2, "stop": ["c", "d"], "logprobs": 2, "echo": true, "repetition_penalty": 1.1, "ignore_eos": true,
            "return_token_ids": true, "stop_token_ids": [5], "prompt_logprobs": 1}"#,
    ),
    (
        0,
        r#"{"prompt": [[1, 2], [3]], "max_tokens": 2, "stream": true, "stream_options": {"include_usage": true}}"#,
    ),
    (
        1,
        r#"{"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 3, "logprobs": true,
            "top_logprobs": 2, "chat_template_kwargs": {"x": 1}, "tools": [], "add_generation_prompt": true}"#,
    ),
    (
        2,
        r#"{"prompt": "text", "add_special_tokens": false, "return_token_strs": true}"#,
    ),
    (3, r#"{"tokens": [1, 2, 300]}"#),
    (
        9,
        "GET /v1/models/tiny HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n\r\n",
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files below a folder whose names end so, in the order of their paths.
fn in_folder(folder: &str, end: &str) -> Vec<Vec<u8>> {
    let (mut folders, mut paths) = (vec![root().join(folder)], Vec::new());
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
        {
            match path.is_dir() {
                true => folders.push(path),
                false if path.to_string_lossy().ends_with(end) => paths.push(path),
                false => {}
            }
        }
    }
    paths.sort();
    assert!(!paths.is_empty());
    paths
        .into_iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

/// The first lines of a file, in one sample.
fn lines_of(path: &str, count: usize) -> Vec<Vec<u8>> {
    let text = std::fs::read(root().join(path)).unwrap();
    let lines = text.split_inclusive(|byte| *byte == b'\n').take(count);
    vec![lines.collect::<Vec<_>>().concat()]
}

fn conversations() -> Vec<Vec<u8>> {
    let all = std::fs::read(root().join("tests/golden/chat/conversations.json")).unwrap();
    let all: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&all).unwrap();
    all.values()
        .map(|one| format!("{one}\n").into_bytes())
        .collect()
}

fn config() -> Vec<u8> {
    let mut config = ModelConfig::new(300, 16, 16, 2, 4, 2).unwrap();
    config.bos_token_id = vec![1];
    config.eos_token_id = vec![2, 3];
    config.to_json().to_string().into_bytes()
}

/// A good file of the format.
fn sample(name: &str) -> Vec<u8> {
    let read = |path: &str| std::fs::read(root().join(path)).unwrap();
    match name {
        "safetensors" => {
            let header = br#"{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}"#;
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend_from_slice(header);
            file.extend([0; 8]);
            file
        }
        "index" => br#"{"metadata":{"total_size":12},"weight_map":{"a":"model-1.safetensors","b":"m.safetensors"}}"#
            .to_vec(),
        "generation" => br#"{"do_sample":true,"temperature":0.6,"top_p":0.9,"top_k":5,"eos_token_id":[1,2],"min_p":0}"#
            .to_vec(),
        "state_file" => state(),
        "manifest" => {
            br#"{"version":1,"files":{"state.json":{"bytes":12,"sha256":"00","tensors":{"a":"00"}}}}"#.to_vec()
        }
        "run" => read("configs/train.toml"),
        "op_case" => op_case(),
        "token_ids" => br#"[[1, 2, 3], [], {"tokens": [4, 299, 5], "breaks": [1, 3]}]"#.to_vec(),
        "gguf" => read("tests/golden/gguf/tiny.gguf"),
        "state_json" => {
            let files = formats::checkpoint_files();
            let state = files.iter().find(|(name, _)| name == "state.json");
            state.unwrap().1.clone()
        }
        other => panic!("no sample of {other}"),
    }
}

/// The settings and the tensors of an adapter.
fn adapter(target: &str, rslora: bool) -> Vec<u8> {
    const RANK: usize = 2;
    let config = LoraConfig {
        rank: RANK,
        alpha: 4.0,
        rslora,
        targets: vec![target.to_owned()],
    };
    let lora = Lora::new(&formats::adapter::config(), config).unwrap();
    let value = 0.25f32.to_le_bytes();
    let values = value.repeat(64);
    let tensors = lora.adapters().iter().flat_map(|adapter| {
        let shapes = [vec![RANK, adapter.inner], vec![adapter.out, RANK]];
        adapter.names().into_iter().zip(shapes)
    });
    let views = tensors.map(|(name, shape)| {
        let bytes = shape.iter().product::<usize>() * value.len();
        (
            name,
            TensorView::new(Dtype::F32, shape, &values[..bytes]).unwrap(),
        )
    });
    let tensors = safetensors::serialize(views, None).unwrap();
    let config = to_json(&lora.config, None).to_string().into_bytes();
    [&(config.len() as u16).to_le_bytes()[..], &config, &tensors].concat()
}

/// A case of the operation: one row of each source, one head of 8.
fn op_case() -> Vec<u8> {
    let row: Vec<u8> = (1..=8u8).flat_map(|x| f32::from(x).to_le_bytes()).collect();
    let one = 1i32.to_le_bytes();
    let gate = 0.5f32.to_le_bytes();
    let rows = [
        "q", "k", "v", "prior_k", "prior_v", "past_k", "past_v", "d_out",
    ];
    let rows = rows.map(|name| (name, Dtype::F32, vec![1, 1, 1, 8], &row[..]));
    let lengths = ["segment_len", "prior_len", "past_len"];
    let lengths = lengths.map(|name| (name, Dtype::I32, vec![1], &one[..]));
    let roles = [
        ("past_gate", Dtype::F32, vec![1], &gate[..]),
        ("prior_heads", Dtype::U8, vec![1], &[1u8][..]),
    ];
    let all = rows.into_iter().chain(lengths).chain(roles);
    let views =
        all.map(|(name, dtype, shape, data)| (name, TensorView::new(dtype, shape, data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// The state file of a small model.
fn state() -> Vec<u8> {
    use segattn::device::cpu::Cpu;
    use segattn::model::files::OutputFile;
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig::new(16, 16, 8, 1, 2, 1).unwrap();
    let values = |i: usize| -> Result<Vec<f32>, segattn::model::error::WeightsError> {
        Ok(initial(&config, 1).tensor(i))
    };
    segattn::model::weights::save(
        folder.path(),
        &config,
        values,
        SaveOptions::new(segattn::model::config::WeightType::F32),
    )
    .unwrap();
    let model = Checkpoint::open(folder.path())
        .unwrap()
        .load(Cpu, config, false)
        .unwrap();
    let mut session = Session::new(&model, 1, 8, 1).unwrap();
    let tokens = vec![vec![1, 2, 3]];
    let feed = segattn::model::session::Feed {
        sequence: 0,
        tokens: &tokens[0],
        targets: &[],
        breaks: &[],
        rereads: &[],
    };
    session.feed(&[feed]).unwrap();
    let path = folder.path().join("state");
    let origin = Origin {
        tokens: &tokens,
        weights: "",
        ..Origin::default()
    };
    save(&session, origin, &OutputFile::open(&path).unwrap()).unwrap();
    std::fs::read(path).unwrap()
}
