//! `segattn serve`: a model over HTTP, by OpenAI's interface.

use std::env::VarError;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use segattn::generate::dry_run::dry_run_serving;
use segattn::model::chat::Chat;
use segattn::model::config::ModelConfig;
use segattn::model::tokenizer::GenerationSettings;
use segattn::serve::http::{Server, serve};
use segattn::serve::{Limits, Shared, engine};

use super::device::{Planned, on_device};
use super::model::ModelArgs;
use super::out::note;
use super::signals;

/// The key may stand here instead of on the command line, which other users of the machine can read.
const KEY_VARIABLE: &str = "SEGATTN_API_KEY";
/// Most tokens of a sequence by default.
const DEFAULT_LONGEST: usize = 32 << 10;
/// Most sequences that run side by side, each of which takes memory from the start.
const MOST_RUNNING: i64 = 1 << 16;
/// Most MiB of a request's body.
const MOST_BODY: u64 = 1 << 20;
/// How often it is asked whether a signal has come.
const SIGNALS: Duration = Duration::from_millis(50);

/// The log goes to standard error. Ctrl-C or SIGTERM stops it, at once where they come twice.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen at; others than 127.0.0.1 let other machines in
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen at; 0 for any that is free
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    port: u16,
    /// Name that requests call the model by [default: that of its folder]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Key that requests must have, else the environment's SEGATTN_API_KEY [default: none]
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Sequences that run side by side
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = 1..=MOST_RUNNING)]
    running: i64,
    /// Sequences that wait for a place; requests beyond are answered with 429
    #[arg(long, value_name = "N", default_value_t = 64)]
    waiting: usize,
    /// Most tokens of a sequence, its prompt and its new tokens [default: 32768, or the model's positions]
    #[arg(long, value_name = "N")]
    max_len: Option<usize>,
    /// Most tokens of prompts read between two steps of the sequences that generate
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = 1..)]
    read_at_once: i64,
    /// Host memory for states of prompts, so that what several begin with is read once; 0 keeps none
    #[arg(
        long,
        value_name = "GIB",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    cache: f64,
    /// Largest body of a request
    #[arg(long, value_name = "MIB", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=MOST_BODY))]
    max_body: u64,
    /// Time that running requests get to end once the server is told to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    grace: u64,
}

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    on_device!(args.model.device(), device => run_on(device, args, quiet))
}

fn run_on<D: Planned>(device: D, args: &Args, quiet: bool) -> Result<()> {
    let place = (args.host.as_str(), args.port);
    let listener = TcpListener::bind(place);
    let listener =
        listener.with_context(|| format!("cannot listen at {}:{}", args.host, args.port))?;
    let opened = args.model.open(false)?;
    let own = GenerationSettings::load(args.model.path())?;
    if !own.ignored.is_empty() {
        tracing::warn!(
            "generation_config.json: not applied: {}",
            own.ignored.join(", ")
        );
    }
    let limits = args.limits(&opened.config)?;
    let Limits {
        running,
        longest,
        read_at_once,
        ..
    } = limits;
    let model = opened.load_for(device, |model| {
        dry_run_serving(model, running, longest, read_at_once)
    })?;
    let prompt_break = model.config.prompt_break();
    let shared = Arc::new(Shared::new(limits, model.config.vocab_size, prompt_break));
    let chat = match &opened.text {
        Some(text) => Chat::open(args.model.path(), text)?,
        None => None,
    };
    let (handle, inbox) = engine::connect(shared.clone());
    let server = Server {
        handle: handle.clone(),
        name: args.name()?,
        created: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        text: opened.text.clone(),
        chat,
        sampler: own.sampler(),
        max_new: own.max_new_tokens,
        end_tokens: model.config.eos_token_id.clone(),
        api_key: args.key()?,
        largest_body: usize::try_from(args.max_body << 20)?,
    };
    signals::note_interrupts(Some("stopping; once more to stop at once"));
    if !quiet {
        note!("{} at http://{}", server.name, listener.local_addr()?);
    }
    let text = opened.text.as_ref();
    std::thread::scope(|scope| {
        let engine = std::thread::Builder::new().name("engine".into());
        let (model, shared) = (&model, &*shared);
        let engine =
            engine.spawn_scoped(scope, move || engine::run(model, text, shared, &inbox))?;
        let stop = async move {
            while !signals::interrupted() && handle.alive() {
                tokio::time::sleep(SIGNALS).await;
            }
        };
        serve(server, listener, stop, Duration::from_secs(args.grace))?;
        match engine.join() {
            Ok(ended) => Ok(ended?),
            Err(_) => bail!("the engine panicked"),
        }
    })
}

impl Args {
    fn limits(&self, config: &ModelConfig) -> Result<Limits> {
        ensure!(
            self.cache >= 0.0 && self.cache.is_finite(),
            "--cache: expected GiB of memory, at least 0, got {}",
            self.cache
        );
        let positions = match config.segment {
            Some(_) => usize::MAX,
            None => config.max_position_embeddings,
        };
        let longest = self.max_len.unwrap_or(DEFAULT_LONGEST.min(positions));
        ensure!(
            longest >= 2,
            "--max-len: expected at least 2, got {longest}"
        );
        Ok(Limits {
            running: usize::try_from(self.running)?,
            waiting: self.waiting,
            longest,
            read_at_once: usize::try_from(self.read_at_once)?,
            cache_bytes: (self.cache * f64::from(1 << 30)) as usize,
        })
    }

    fn name(&self) -> Result<String> {
        let folder: PathBuf = std::path::absolute(self.model.path())?;
        let own = folder.file_name().map(Path::new);
        let own = own.map_or("model".into(), |name| name.display().to_string());
        Ok(self.name.clone().unwrap_or(own))
    }

    fn key(&self) -> Result<Option<String>> {
        let key = match (&self.api_key, std::env::var(KEY_VARIABLE)) {
            (Some(key), _) => Some(key.clone()),
            (None, Ok(key)) => Some(key),
            (None, Err(VarError::NotPresent)) => None,
            // Without a key the server would be open to all.
            (None, Err(VarError::NotUnicode(_))) => {
                bail!("{KEY_VARIABLE}: expected text in UTF-8, got other bytes")
            }
        };
        if let Some(key) = &key {
            ensure!(
                !key.trim().is_empty(),
                "the API key: expected some characters, got none"
            );
        }
        Ok(key)
    }
}
