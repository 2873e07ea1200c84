//! `segattn demo`: trains a small byte-level model on a project's sources and shows what this crate
//! promises: learning, equal bits, flat memory.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use segattn::device::cpu::Cpu;
use segattn::generate::sampler::SamplerConfig;
use segattn::generate::text::TextStream;
use segattn::generate::{Generator, GeneratorConfig, Prompt};
use segattn::model::config::PromptBreak;
use segattn::model::decoder::Decoder;
use segattn::model::session::{Session, score};
use segattn::train::config::Config;
use segattn::train::data::{Bytes, Corpus, Example, Mixture, Reading, Sequences, split};
use segattn::train::progress::Tensors;
use segattn::train::streams::{Gradients, StreamConfig, accumulate};
use segattn::train::trainer::Trainer;

use super::alloc::peak_of;
use super::out::out;

/// Train a small byte-level model for a minute or two, stream a sample, check that scoring and
/// generating agree to the bit, and show that memory stays flat as the context grows.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Files and folders to learn from
    #[arg(long, value_name = "PATH", num_args = 1.., default_values = ["src", "docs", "kernels", "tests", "README.md"])]
    data: Vec<PathBuf>,
    /// How long to train, in seconds
    #[arg(long, value_name = "S", default_value_t = 100)]
    seconds: u64,
}

/// The run, where it differs from the defaults of `segattn train`.
const SETTINGS: &str = r#"
[model.shape]
vocab_size = 256
hidden_size = 128
intermediate_size = 384
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
[model.segment]
segment_len = 128
prior_len = 128
past_len = 64
long_range_heads = [1]
long_range_layers = [2]
[data]
extensions = ["rs", "md", "cu", "cuh", "h"]
split = "document"
validation_share = 0.08
[training]
batch = 8
sequence_len = 512
segments_per_step = 2
[schedule]
kind = "constant"
lr = 3e-3
warmup_steps = 20
"#;

/// Bytes of the sample.
const SAMPLE: usize = 400;
/// What the sample begins with.
const PROMPT: &str = "//! Segment attention";
/// Held-out sequences that are scored.
const HELD_OUT: u64 = 48;
/// Contexts whose memory is shown, in segments.
const CONTEXTS: [usize; 4] = [4, 16, 64, 256];

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let paths: Vec<PathBuf> = args.data.iter().filter(|p| p.exists()).cloned().collect();
    ensure!(
        !paths.is_empty(),
        "none of {:?} is here; run this in the project's folder, or name texts with --data",
        args.data
    );
    let named = ("data.train".to_owned(), format!("{paths:?}"));
    let config = Config::parse(SETTINGS, &[named])?;
    let reading = Reading {
        section: &config.data,
        vocab_size: 256,
        before: &[],
        after: &[],
        encode: &Bytes,
        prompt_break: PromptBreak::default(),
        tokenizer: "bytes",
        cache: None,
        scratch: scratch.path(),
        progress: &|_, _| {},
    };
    let corpus = Corpus::read(&[&paths], &reading)?;
    let (train, held_out) = split(
        corpus.documents(),
        config.data.split,
        config.data.validation_share,
    );
    let cut = |documents| Sequences::new(documents, config.training.sequence_len);
    let (train, held_out) = (cut(train), cut(held_out));
    ensure!(
        !train.is_empty() && !held_out.is_empty(),
        "too few texts: one file at least to learn from and one to hold out"
    );
    let held_out = sequences(&corpus, &held_out, HELD_OUT)?;
    let bigram = Bigram::new(&sequences(&corpus, &train, u64::MAX)?).loss(&held_out);

    let model = config.model.new_config(256)?;
    let tensors = Tensors::initial(&model, config.training.seed);
    let mut trainer = Trainer::new(Cpu, model, config, &tensors, None)?;
    let weights: usize = trainer.model().specs.iter().map(|s| s.role.len()).sum();
    out!(
        "1. Train {:.2} million weights on {} kB of text, {} s",
        weights as f64 / 1e6,
        train.tokens() / 1000,
        args.seconds
    )?;
    let steps = learn(&mut trainer, &corpus, &train.into(), args.seconds, quiet)?;
    let loss = trainer.validate(&held_out)?.unwrap_or(f64::NAN);
    out!("   {steps} steps; on held-out files, in nats a byte:")?;
    out!("   byte bigrams {bigram:.3}   this model {loss:.3}\n")?;
    let model = trainer.model();
    agree(model)?;
    flat(model, &held_out)?;
    ensure!(
        loss < bigram,
        "the model did not get below the bigrams; give it longer with --seconds"
    );
    Ok(())
}

fn sequences(corpus: &Corpus, of: &Sequences, most: u64) -> Result<Vec<Example>> {
    let get = |i| Ok(of.get(corpus, i)?);
    (0..of.len().min(most)).map(get).collect()
}

/// Trains until time is up; the number of steps.
fn learn(
    trainer: &mut Trainer<Cpu>,
    corpus: &Corpus,
    data: &Mixture<'_>,
    seconds: u64,
    quiet: bool,
) -> Result<u64> {
    let bar = if quiet || !std::io::stderr().is_terminal() {
        ProgressBar::hidden()
    } else {
        ProgressBar::with_draw_target(Some(seconds), ProgressDrawTarget::stderr())
    };
    let style = "   {bar:32.cyan/blue} {msg}  {eta} left";
    bar.set_style(ProgressStyle::with_template(style)?);
    let (started, limit) = (Instant::now(), Duration::from_secs(seconds));
    let (mut steps, mut tokens, mut shown) = (0, 0, f64::NAN);
    while started.elapsed() < limit {
        let report = trainer.step(corpus, data)?;
        steps += 1;
        tokens += report.tokens;
        shown = if shown.is_nan() {
            report.loss
        } else {
            0.9 * shown + 0.1 * report.loss
        };
        let rate = tokens as f64 / started.elapsed().as_secs_f64();
        bar.set_position(started.elapsed().as_secs());
        bar.set_message(format!("loss {shown:.3}  {rate:.0} tokens/s"));
    }
    bar.finish_and_clear();
    Ok(steps)
}

/// Streams a sample and scores it again in one piece.
fn agree(model: &Decoder<Cpu>) -> Result<()> {
    out!("2. A sample, token by token:\n")?;
    let prompt: Vec<u32> = PROMPT.bytes().map(u32::from).collect();
    let mut session = Session::new(model, 1, prompt.len() + SAMPLE, 1)?;
    let settings = GeneratorConfig {
        sampler: SamplerConfig {
            temperature: 0.7,
            ..SamplerConfig::default()
        },
        max_new: SAMPLE,
        end_tokens: Vec::new(),
    };
    let prompts = [Prompt {
        before: &[],
        tokens: &prompt,
        breaks: &[],
        rereads: &[],
        stream: 0,
    }];
    let mut generator = Generator::new(&mut session, &prompts, settings)?;
    let mut stream = TextStream::new(Vec::new())?;
    let decode = |tokens: &[u32]| -> Result<String> {
        let bytes: Vec<u8> = tokens.iter().map(|t| *t as u8).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let mut out = std::io::stdout().lock();
    write!(out, "   {PROMPT}")?;
    loop {
        let chosen = generator.step()?;
        let Some(token) = chosen.first() else { break };
        let text = stream.push(token.token, decode)?.text;
        write!(out, "{}", text.replace('\n', "\n   "))?;
        out.flush()?;
    }
    writeln!(out, "{}\n", stream.finish(decode)?)?;
    let generated = generator.generated().remove(0);
    let all = [&prompt[..], &generated.tokens].concat();
    let scored = score(model, &all, usize::MAX)?;
    let scored = &scored[prompt.len() - 1..];
    let pairs = scored.iter().zip(&generated.log_probabilities);
    let equal = pairs.filter(|(a, b)| a.to_bits() == b.to_bits()).count();
    out!(
        "3. Scored again, all segments at once: {equal} of {} log-probabilities equal to the bit\n",
        generated.tokens.len()
    )?;
    ensure!(
        equal == generated.tokens.len(),
        "generating and scoring differ: a defect"
    );
    Ok(())
}

/// Shows the memory of gradients over ever longer contexts.
fn flat(model: &Decoder<Cpu>, texts: &[Example]) -> Result<()> {
    out!("4. Memory of the exact gradient of one sequence, one segment per step:\n")?;
    out!("   context      working memory   pool of the past")?;
    let segment = model.config.segment.as_ref().map_or(1, |s| s.segment_len);
    let streams = StreamConfig {
        tbptt: 1,
        segments_per_step: 1,
        recompute: false,
    };
    for segments in CONTEXTS {
        let inputs = segments * segment;
        let tokens: Vec<u32> = texts
            .iter()
            .flat_map(|text| &text.tokens)
            .copied()
            .cycle()
            .take(inputs + 1)
            .collect();
        let mut gradients = Gradients::new(model)?;
        let (done, peak) = peak_of(|| {
            accumulate(
                model,
                &[tokens],
                streams,
                1.0 / inputs as f64,
                &mut gradients,
            )
        });
        let results = done?
            .iter()
            .map(|l| l.len() * size_of::<f64>())
            .sum::<usize>();
        let pool = inputs * pool_bytes(model);
        out!(
            "   {inputs:>7}  {:>10.1} MB  {:>15.1} MB",
            peak.saturating_sub(pool + results) as f64 / 1e6,
            pool as f64 / 1e6
        )?;
    }
    out!(
        "\n   The pool holds keys and values of the heads that read the far past ({} here), nothing else.",
        past_heads(model)
    )?;
    Ok(())
}

/// Heads, over all layers, that read the past.
fn past_heads(model: &Decoder<Cpu>) -> usize {
    let config = &model.config;
    let of = |l: usize| (0..config.num_key_value_heads).filter(move |g| config.reads_past(l, *g));
    (0..config.num_hidden_layers).map(|l| of(l).count()).sum()
}

/// Bytes of pool for each token.
fn pool_bytes(model: &Decoder<Cpu>) -> usize {
    2 * past_heads(model) * model.config.head_dim * size_of::<f32>()
}

/// A byte given the byte before it, counted with every pair seen a little already.
struct Bigram {
    pairs: Vec<f64>,
    firsts: Vec<f64>,
}

impl Bigram {
    /// What each pair is counted as before the first is seen.
    const PRIOR: f64 = 0.02;

    fn new(sequences: &[Example]) -> Self {
        let mut counts = Self {
            pairs: vec![Self::PRIOR; 256 * 256],
            firsts: vec![256.0 * Self::PRIOR; 256],
        };
        for pair in sequences.iter().flat_map(|s| s.tokens.windows(2)) {
            counts.pairs[pair[0] as usize * 256 + pair[1] as usize] += 1.0;
            counts.firsts[pair[0] as usize] += 1.0;
        }
        counts
    }

    /// Mean negative log-probability, in nats.
    fn loss(&self, sequences: &[Example]) -> f64 {
        let pairs = || sequences.iter().flat_map(|s| s.tokens.windows(2));
        let nats = |p: &[u32]| {
            let (a, b) = (p[0] as usize, p[1] as usize);
            (self.firsts[a] / self.pairs[a * 256 + b]).ln()
        };
        pairs().map(nats).sum::<f64>() / pairs().count() as f64
    }
}
