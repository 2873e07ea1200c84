//! Bytes from a client of the server.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use segattn::device::cpu::Cpu;
use segattn::device::sampler::SamplerConfig;
use segattn::model::chat::Chat;
use segattn::model::config::{ModelConfig, WeightType};
use segattn::model::error::WeightsError;
use segattn::model::tokenizer::Tokenizer;
use segattn::model::weights::{Checkpoint, SaveOptions, initial, save};
use segattn::serve::http::{Server, serve};
use segattn::serve::{Limits, Shared, engine};

/// Nothing that the model of 64 tokens is asked for takes so long.
const LIMIT: Duration = Duration::from_secs(10);
const PATHS: [&str; 4] = [
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
];

/// A request: the first byte says the path whose body the others are, or that they are all that is sent. The server
/// answers or hangs up, and never by status 500.
pub fn request(bytes: &[u8], _: &Path) {
    let Some((path, body)) = bytes.split_first() else {
        return;
    };
    let mut stream = TcpStream::connect(address()).expect("a server that goes on");
    stream
        .set_read_timeout(Some(LIMIT))
        .expect("a limit of time");
    let sent = match PATHS.get(usize::from(*path)) {
        Some(path) => {
            let length = body.len();
            let head = format!(
                "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
            );
            stream.write_all(&[head.as_bytes(), body].concat())
        }
        None => stream.write_all(body),
    };
    // What is not whole is not waited for.
    let sent = sent.and_then(|()| stream.shutdown(std::net::Shutdown::Write));
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    if let (Ok(()), Err(error)) = (sent, read) {
        let hung = matches!(
            error.kind(),
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
        );
        assert!(!hung, "no answer within {LIMIT:?}");
    }
    assert!(!answer.starts_with(b"HTTP/1.1 500"), "status 500");
}

/// The address of a server of this process.
fn address() -> SocketAddr {
    static ADDRESS: OnceLock<SocketAddr> = OnceLock::new();
    *ADDRESS.get_or_init(|| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        std::thread::spawn(move || run(listener));
        address
    })
}

fn run(listener: TcpListener) {
    let mut config = ModelConfig::new(300, 16, 16, 1, 2, 1).expect("sizes that fit");
    config.bos_token_id = vec![256];
    config.eos_token_id = vec![257];
    let tokenizer = Tokenizer::bytes(&config);
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ tools }}";
    let chat = Chat::of_template(template, &tokenizer).expect("a template");
    let limits = Limits {
        running: 2,
        waiting: 8,
        longest: 64,
        read_at_once: 16,
        cache_bytes: 1 << 20,
    };
    let shared = Arc::new(Shared::new(limits, config.vocab_size, Default::default()));
    let (handle, inbox) = engine::connect(shared.clone());
    let server = Server {
        handle,
        name: "tiny".into(),
        created: 0,
        text: Some(tokenizer.clone()),
        chat: Some(chat),
        sampler: SamplerConfig::greedy(),
        max_new: None,
        end_tokens: config.eos_token_id.clone(),
        api_key: None,
        largest_body: 1 << 20,
    };
    let folder = tempfile::tempdir().expect("a folder");
    let values = |i: usize| Ok::<_, WeightsError>(initial(&config, 1).tensor(i));
    let options = SaveOptions::new(WeightType::F32);
    save(folder.path(), &config, values, options).expect("weights");
    let weights = Checkpoint::open(folder.path()).expect("weights");
    let model = weights.load(Cpu, config, false).expect("a model");
    std::thread::scope(|scope| {
        let (model, tokenizer, shared) = (&model, &tokenizer, &*shared);
        scope.spawn(move || engine::run(model, Some(tokenizer), shared, &inbox));
        serve(server, listener, std::future::pending(), LIMIT)
    })
    .expect("a server");
}
