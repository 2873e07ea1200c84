//! `segattn generate`: continues prompts, one or several in a batch, printing as it goes.

use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use segattn::device::Device;
use segattn::generate::dry_run::Reading;
use segattn::generate::sampler::SamplerConfig;
use segattn::generate::text::TextStream;
use segattn::generate::{Finish, Generated, Generator, GeneratorConfig, Prompt};
use segattn::model::decoder::Decoder;
use segattn::model::files::OutputFile;
use segattn::model::segmentation::Tokens;
use segattn::model::session::Session;
use segattn::model::session_file::{Origin, StateFile, save};
use segattn::model::tokenizer::{GenerationSettings, Tokenizer};
use serde::Serialize;

use super::device::{Planned, on_device};
use super::files::{Results, read_tokens};
use super::model::ModelArgs;
use super::out::{harmless, note};
use super::ranks::Party;
use super::stages::StageArgs;

/// Largest prompt file that is read, in bytes.
const MAX_PROMPT_FILE: u64 = 1 << 30;

/// The new text goes to standard output, everything else to standard error.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    stages: StageArgs,
    /// Text to continue; several make a batch, and none sees the others
    #[arg(short, long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// File with a text to continue, `-` for standard input; several make a batch
    #[arg(short = 'f', long, value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    /// JSON array of token ids to continue, or an object with `tokens` and `breaks`; no tokenizer is needed, ids are
    /// printed
    #[arg(long, value_name = "FILE")]
    tokens: Vec<PathBuf>,
    /// Most new tokens of each prompt [default: that of generation_config.json, else 256]
    #[arg(short = 'n', long, value_name = "N")]
    max_new: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after an end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    /// Where the new tokens and the model's own log-probabilities of them go, JSON
    #[arg(long, value_name = "FILE")]
    logprobs: Option<PathBuf>,
    /// Go on from a state that --state-out saved: prompts follow what was read then, and a single
    /// saved sequence begins all of them
    #[arg(long, value_name = "FILE")]
    state_in: Option<PathBuf>,
    /// Save the state after the prompts, before the new tokens; with --max-new 0 they are only read
    #[arg(long, value_name = "FILE")]
    state_out: Option<PathBuf>,
    /// Segments of a prompt computed side by side: faster, more memory, the same bits
    #[arg(long, value_name = "N", default_value_t = 1)]
    segments_per_step: usize,
}

/// How tokens are chosen; what is left out is as the model's generation_config.json says.
#[derive(Debug, clap::Args)]
pub(super) struct SamplingArgs {
    /// Divides the logits; 0 takes the likeliest token every time [default: 1, or the model's]
    #[arg(short, long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Choose among the K likeliest tokens; 0 for all [default: 0, or the model's]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the likeliest tokens that together have this probability [default: 1, or the model's]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Leave out tokens less likely than this share of the likeliest [default: 0, or the model's]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Penalty on tokens of the text so far; 1 for none [default: 1, or the model's]
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
    /// Seed; the same seed gives the same text, in any batch
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    /// The flags over the model's own settings over the defaults.
    pub(super) fn over(&self, model: &GenerationSettings) -> SamplerConfig {
        let model = model.sampler();
        SamplerConfig {
            temperature: self.temperature.unwrap_or(model.temperature),
            top_k: self.top_k.unwrap_or(model.top_k),
            top_p: self.top_p.unwrap_or(model.top_p),
            min_p: self.min_p.unwrap_or(model.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(model.repetition_penalty),
            seed: self.seed,
        }
    }
}

/// One prompt: how it is shown, and its tokens.
struct Input {
    title: String,
    tokens: Tokens,
}

/// New tokens of one sequence as they lie in the `--logprobs` file.
#[derive(Serialize)]
struct LogProbs<'a> {
    tokens: &'a [u32],
    /// Widened, because the digits of an f64 survive readers of either width.
    logprobs: Vec<f64>,
}

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    args.stages.run(&args.model, |party| {
        on_device!(args.model.device(), party.local_rank(), device => run_on(device, args, party, quiet))
    })
}

fn run_on<D: Planned>(device: D, args: &Args, party: &Party, quiet: bool) -> Result<()> {
    let log_probabilities = Results::maybe(args.logprobs.as_deref())?;
    let place = |path: &Path| {
        OutputFile::open(path).with_context(|| format!("cannot write {}", path.display()))
    };
    let state_out = args.state_out.as_deref().map(place).transpose()?;
    let opened = args.model.open(args.tokens.is_empty())?.shared(party);
    let text = opened.text.as_ref();
    let own = own_settings(args.model.path())?;
    let sampler = args.sampling.over(&own);
    let max_new = args.max_new.or(own.max_new_tokens).unwrap_or(256);
    let mut state = args.state_in.as_deref().map(StateFile::open).transpose()?;
    let saved = state
        .as_ref()
        .map_or(Vec::new(), |s| s.positions().to_vec());
    let inputs = args.inputs(opened.config.vocab_size, text, saved.len())?;
    let longest = inputs.iter().map(|i| i.tokens.ids.len()).max().unwrap_or(0);
    let longest = longest
        .saturating_add(saved.iter().copied().max().unwrap_or(0))
        .saturating_add(max_new);
    let before = |i: usize| saved.get(i).or(saved.first()).copied().unwrap_or(0);
    // A fingerprint reads all weights, so it is made only where a state needs one.
    let weights = match state.is_some() || state_out.is_some() {
        true => opened.fingerprint()?,
        false => String::new(),
    };
    let each = inputs.iter().enumerate();
    let reading = Reading {
        sequences: each
            .map(|(i, input)| [before(i), input.tokens.ids.len()])
            .collect(),
        scored: false,
        new: max_new,
        segments_per_step: args.segments_per_step,
    };
    let model = opened.load(device, &[reading])?;
    let mut session = Session::new(&model, inputs.len(), longest, args.segments_per_step)?;
    let mut earlier = vec![Vec::new(); inputs.len()];
    if let Some(state) = &mut state {
        state.restore(&mut session, &weights)?;
        for (i, earlier) in earlier.iter_mut().enumerate() {
            *earlier = state.tokens(if saved.len() == 1 { 0 } else { i })?;
        }
    }
    let prompts: Vec<Prompt<'_>> = inputs
        .iter()
        .enumerate()
        .map(|(i, input)| Prompt {
            before: &earlier[i],
            tokens: &input.tokens.ids,
            breaks: &input.tokens.breaks,
            rereads: &input.tokens.rereads,
            stream: copies_before(&inputs, i),
        })
        .collect();
    let mut generator = Generator::new(
        &mut session,
        &prompts,
        args.settings(&model, sampler, max_new),
    )?;
    let started = Instant::now();
    read_prompts(&mut generator, quiet)?;
    let read = started.elapsed();
    if let Some(place) = &state_out {
        let all = earlier.iter().zip(&inputs);
        let tokens: Vec<Vec<u32>> = all
            .map(|(earlier, input)| [&earlier[..], &input.tokens.ids].concat())
            .collect();
        let origin = Origin {
            tokens: &tokens,
            weights: &weights,
            ..Origin::default()
        };
        save(generator.session(), origin, place)?;
    }
    let started = Instant::now();
    let generated = match text.filter(|_| args.tokens.is_empty()) {
        Some(text) => args.stream(&mut generator, text, &inputs, &earlier, quiet)?,
        None => print_tokens(&mut generator)?,
    };
    if !quiet {
        let prompt: usize = inputs.iter().map(|i| i.tokens.ids.len()).sum();
        let new: usize = generated.iter().map(|g| g.tokens.len()).sum();
        let rate = |tokens: usize, seconds: f64| tokens as f64 / seconds.max(1e-9);
        let seconds = [read.as_secs_f64(), started.elapsed().as_secs_f64()];
        note!(
            "prompt: {prompt} tokens, {:.1}/s; new: {new} tokens, {:.1}/s",
            rate(prompt, seconds[0]),
            rate(new, seconds[1])
        );
    }
    match &log_probabilities {
        Some(place) => write_log_probabilities(place, &generated),
        None => Ok(()),
    }
}

/// The model's own settings; warns of those that are not applied.
pub(super) fn own_settings(folder: &Path) -> Result<GenerationSettings> {
    let own = GenerationSettings::load(folder)?;
    if !own.ignored.is_empty() {
        tracing::warn!(
            "generation_config.json: not applied: {}",
            own.ignored.join(", ")
        );
    }
    Ok(own)
}

impl Args {
    fn settings<D: Device>(
        &self,
        model: &Decoder<D>,
        sampler: SamplerConfig,
        max_new: usize,
    ) -> GeneratorConfig {
        GeneratorConfig {
            sampler,
            max_new,
            end_tokens: if self.ignore_eos {
                Vec::new()
            } else {
                model.config.eos_token_id.clone()
            },
        }
    }

    /// The prompts. Those that follow a saved state may be left out.
    fn inputs(
        &self,
        vocab_size: usize,
        text: Option<&Tokenizer>,
        saved: usize,
    ) -> Result<Vec<Input>> {
        if !self.tokens.is_empty() {
            ensure!(
                self.prompt.is_empty() && self.prompt_file.is_empty(),
                "--tokens goes with neither --prompt nor --prompt-file"
            );
            ensure!(
                self.stop.is_empty(),
                "--stop needs text; it does not go with --tokens"
            );
            let read = |path: &PathBuf| {
                Ok(Input {
                    title: path.display().to_string(),
                    tokens: read_tokens(path, vocab_size)?,
                })
            };
            return self.tokens.iter().map(read).collect();
        }
        let mut texts = Vec::new();
        for prompt in &self.prompt {
            texts.push((summary(prompt), prompt.clone()));
        }
        for path in &self.prompt_file {
            texts.push((path.display().to_string(), read_prompt(path)?));
        }
        if texts.is_empty() && saved > 0 {
            let one = |i| Input {
                title: format!("saved sequence {i}"),
                tokens: Tokens::default(),
            };
            return Ok((1..=saved).map(one).collect());
        }
        if texts.is_empty() && !std::io::stdin().is_terminal() {
            let text = read_prompt(Path::new("-"))?;
            texts.push(("standard input".to_owned(), text));
        }
        let Some(tokenizer) = text else {
            bail!("the model has no tokenizer; give --tokens");
        };
        let encode = |(title, text): (String, String)| {
            // What goes on from a saved state has its beginning there.
            let ids = tokenizer.encode(&text, saved == 0)?;
            let tokens = Tokens {
                ids,
                ..Tokens::default()
            };
            Ok(Input { title, tokens })
        };
        let inputs = texts
            .into_iter()
            .map(encode)
            .collect::<Result<Vec<Input>>>()?;
        ensure!(
            !inputs.is_empty(),
            "nothing to continue; give --prompt TEXT, --prompt-file FILE or --tokens FILE"
        );
        Ok(inputs)
    }

    /// Prints text as it comes if there is one sequence, else each when all have ended.
    fn stream<D: Device>(
        &self,
        generator: &mut Generator<'_, '_, D>,
        text: &Tokenizer,
        inputs: &[Input],
        earlier: &[Vec<u32>],
        quiet: bool,
    ) -> Result<Vec<Generated>> {
        let mut streams = inputs
            .iter()
            .zip(earlier)
            .map(|(input, earlier)| {
                let before = [&earlier[..], &input.tokens.ids].concat();
                Ok::<_, anyhow::Error>(TextStream::new(self.stop.clone())?.after(&before))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut texts = vec![String::new(); inputs.len()];
        let alone = inputs.len() == 1;
        let bar = progress(
            !alone && !quiet,
            (generator.config().max_new as u64).saturating_mul(inputs.len() as u64),
            "new",
        );
        let mut out = std::io::stdout().lock();
        let terminal = out.is_terminal();
        let decode = |tokens: &[u32]| text.decode(tokens, true);
        let mut emit = |sequence: usize, part: &str| -> Result<()> {
            let part = if terminal {
                harmless(part)
            } else {
                part.into()
            };
            if alone {
                out.write_all(part.as_bytes())?;
                out.flush()?;
            } else {
                texts[sequence].push_str(&part);
            }
            Ok(())
        };
        loop {
            let chosen = generator.step()?;
            if chosen.is_empty() {
                break;
            }
            for token in chosen {
                bar.inc(1);
                let stream = &mut streams[token.sequence];
                if token.finish != Some(Finish::EndToken) {
                    let output = stream.push(token.token, decode)?;
                    emit(token.sequence, &output.text)?;
                }
                if stream.stopped().is_some() {
                    generator.stop(token.sequence);
                } else if token.finish.is_some() {
                    emit(token.sequence, &stream.finish(decode)?)?;
                }
            }
        }
        bar.finish_and_clear();
        if alone {
            writeln!(out)?;
        } else {
            for (i, (input, text)) in inputs.iter().zip(&texts).enumerate() {
                let title = harmless(&input.title);
                writeln!(out, "=== {} of {}: {title}", i + 1, inputs.len())?;
                writeln!(out, "{text}\n")?;
            }
        }
        Ok(generator.generated())
    }
}

/// How often the prompt stands earlier in the batch: the number of its random stream, so that it
/// draws the same alone and in any place of a batch, and copies of it draw something else.
fn copies_before(inputs: &[Input], i: usize) -> u64 {
    let same = |other: &&Input| other.tokens == inputs[i].tokens;
    inputs[..i].iter().filter(same).count() as u64
}

/// The beginning of a prompt, on one line.
fn summary(prompt: &str) -> String {
    const SHOWN: usize = 60;
    let line = prompt.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}...", &line[..at]),
        None => line,
    }
}

/// A text from a file, or from standard input for `-`.
pub(super) fn read_prompt(path: &Path) -> Result<String> {
    let limited: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        let opened = std::fs::File::open(path);
        Box::new(opened.with_context(|| format!("cannot open {}", path.display()))?)
    };
    let mut text = String::new();
    limited
        .take(MAX_PROMPT_FILE + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(
        text.len() as u64 <= MAX_PROMPT_FILE,
        "{}: expected at most {MAX_PROMPT_FILE} bytes",
        path.display()
    );
    Ok(text)
}

/// A bar on standard error that shows only on a terminal.
pub(super) fn progress(shown: bool, total: u64, what: &'static str) -> ProgressBar {
    if !shown {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    let style = "{prefix:8} [{bar:30}] {human_pos}/{human_len} {per_sec} {eta} left {msg}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(what);
    bar
}

pub(super) fn read_prompts<D: Device>(
    generator: &mut Generator<'_, '_, D>,
    quiet: bool,
) -> Result<()> {
    let total = generator.unread() as u64;
    let bar = progress(!quiet, total, "prompt");
    loop {
        let left = generator.read_prompts()?;
        bar.set_position(total - left as u64);
        if left == 0 {
            bar.finish_and_clear();
            return Ok(());
        }
    }
}

/// Generates without a tokenizer; prints the ids of each sequence as a JSON array on a line.
fn print_tokens<D: Device>(generator: &mut Generator<'_, '_, D>) -> Result<Vec<Generated>> {
    let generated = generator.run(|_| ControlFlow::Continue(()))?;
    let mut out = std::io::stdout().lock();
    for one in &generated {
        writeln!(out, "{}", serde_json::to_string(&one.tokens)?)?;
    }
    Ok(generated)
}

/// One object for one sequence, an array of them for several.
fn write_log_probabilities(place: &Results, generated: &[Generated]) -> Result<()> {
    let all: Vec<LogProbs<'_>> = generated
        .iter()
        .map(|g| LogProbs {
            tokens: &g.tokens,
            logprobs: g.log_probabilities.iter().map(|x| f64::from(*x)).collect(),
        })
        .collect();
    let json = match &all[..] {
        [one] => serde_json::to_vec(one)?,
        several => serde_json::to_vec(several)?,
    };
    place.write(&json)
}
