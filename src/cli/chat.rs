//! `segattn chat`: talks with a model, turn by turn, without reading anything twice.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use indicatif::ProgressBar;
use segattn::generate::dialogue::{Dialogue, DialogueError, Progress};
use segattn::generate::dry_run::Reading;
use segattn::generate::{Finish, GenerateError, GeneratorConfig};
use segattn::model::chat::Chat;
use segattn::model::files::OutputFile;
use segattn::model::tokenizer::Tokenizer;

use super::device::{Planned, on_device};
use super::files::read_text;
use super::generate::{SamplingArgs, own_settings, progress};
use super::model::{ModelArgs, Opened};
use super::out::{harmless, note};
use super::signals;
use super::text::MAX_TEMPLATE;

/// Context of a model without segments where no other is asked for: its keys and values take memory at once.
const CONTEXT: usize = 16384;
/// What can be said beside messages.
const COMMANDS: &str = "/save FILE  keep the chat and the model's state, for /load\n\
                        /load FILE  go on with a saved chat\n\
                        /reset      begin anew\n\
                        /exit       end; so does the end of the input\n\
                        A line that ends with \\ goes on in the next; // begins a message with /.";

/// Every line of standard input is a message, or a command: /save FILE, /load FILE, /reset, /exit, /help. Answers go to
/// standard output, everything else to standard error. What a message needs is read after the state that the model has,
/// which `--execution` and segments keep small for a chat of any length.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// System message
    #[arg(short, long, value_name = "TEXT")]
    system: Option<String>,
    /// File with the chat template [default: the model's own]
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Most tokens of an answer [default: that of generation_config.json, else 2048]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_new: Option<u32>,
    /// Most tokens of the chat, of a model without segments [default: what the model can, at most 16384]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// End an answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Segments of a message computed side by side: faster, more memory, the same bits
    #[arg(long, value_name = "N", default_value_t = 1)]
    segments_per_step: usize,
}

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    on_device!(args.model.device(), device => run_on(device, args, quiet))
}

fn run_on<D: Planned>(device: D, args: &Args, quiet: bool) -> Result<()> {
    let opened = args.model.open(true)?;
    let tokenizer = opened.text.as_ref().context("the model has no tokenizer")?;
    let chat = args.chat(tokenizer)?;
    let own = own_settings(args.model.path())?;
    let sampler = args.sampling.over(&own);
    sampler.validate()?;
    let max_new = args.max_new.map(|n| n as usize).or(own.max_new_tokens);
    let max_new = max_new.filter(|n| *n > 0).unwrap_or(2048);
    let longest = match (&opened.config.segment, args.context) {
        (_, Some(context)) => context,
        (Some(_), None) => opened.config.max_position_embeddings,
        (None, None) => opened.config.max_position_embeddings.min(CONTEXT),
    };
    let longest = longest.max(opened.config.segment.as_ref().map_or(1, |s| s.segment_len));
    let reading = Reading {
        sequences: vec![[0, longest.saturating_sub(max_new).max(1)]],
        scored: false,
        new: max_new.min(longest),
        segments_per_step: args.segments_per_step,
    };
    let model = opened.load(device, &[reading])?;
    let system = args.system.clone();
    let sizes = (longest, args.segments_per_step);
    let dialogue = Dialogue::new(&model, &chat, tokenizer, system, sizes)?;
    let mut talk = Talk {
        dialogue: dialogue.stop_at(args.stop.clone()),
        config: GeneratorConfig {
            sampler,
            max_new,
            end_tokens: model.config.eos_token_id.clone(),
        },
        opened: &opened,
        weights: None,
        quiet,
    };
    signals::note_interrupts(None);
    talk.listen()
}

impl Args {
    fn chat(&self, tokenizer: &Tokenizer) -> Result<Chat> {
        let folder = self.model.path();
        if let Some(path) = &self.template {
            let chat = Chat::of_template(&read_text(path, MAX_TEMPLATE)?, tokenizer);
            let chat = chat.with_context(|| path.display().to_string())?;
            return Ok(chat.with_tokens_of(folder)?);
        }
        Chat::open(folder, tokenizer)?.ok_or_else(|| {
            anyhow!(
                "{}: has no chat template (chat_template.jinja, or `chat_template` in tokenizer_config.json); \
                 give one by --template FILE, or use `segattn generate`",
                folder.display()
            )
        })
    }
}

/// What a line of the input asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Message(&'a str),
    Save(&'a Path),
    Load(&'a Path),
    Reset,
    Exit,
    Help,
    Nothing,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Result<Self> {
        let Some(command) = line.strip_prefix('/') else {
            return Ok(match line.trim().is_empty() {
                true => Self::Nothing,
                false => Self::Message(line),
            });
        };
        if command.starts_with('/') {
            return Ok(Self::Message(command));
        }
        let (word, rest) = command
            .split_once(char::is_whitespace)
            .unwrap_or((command, ""));
        match (word, rest.trim()) {
            ("save" | "load", "") => bail!("/{word}: expected the name of a file"),
            ("save", file) => Ok(Self::Save(Path::new(file))),
            ("load", file) => Ok(Self::Load(Path::new(file))),
            ("reset", "") => Ok(Self::Reset),
            ("exit" | "quit", "") => Ok(Self::Exit),
            ("help", "") => Ok(Self::Help),
            _ => bail!("/{word}: no such command; /help names them, // begins a message with /"),
        }
    }
}

struct Talk<'m, D: Planned> {
    dialogue: Dialogue<'m, D>,
    config: GeneratorConfig,
    opened: &'m Opened,
    /// Digest of the weights, made where it is first needed: it reads all of them.
    weights: Option<String>,
    quiet: bool,
}

impl<D: Planned> Talk<'_, D> {
    fn listen(&mut self) -> Result<()> {
        let asked = std::io::stdin().is_terminal();
        let mut input = std::io::stdin().lock();
        if asked && !self.quiet {
            note!("/help names the commands");
        }
        loop {
            signals::idle(true);
            let Some(line) = next_line(&mut input, asked)? else {
                return Ok(());
            };
            signals::idle(false);
            let done = match Line::parse(&line) {
                Ok(Line::Exit) => return Ok(()),
                Ok(line) => self.follow(line),
                Err(error) => Err(error),
            };
            match done {
                // A script must not go on as if the line had worked.
                Err(error) if !asked || !can_go_on(&error) => return Err(error),
                Err(error) => note!("error: {error:#}"),
                Ok(()) => {}
            }
        }
    }

    fn follow(&mut self, line: Line<'_>) -> Result<()> {
        match line {
            Line::Message(message) => self.turn(message),
            Line::Save(path) => {
                let place = OutputFile::open(path);
                let place = place.with_context(|| format!("cannot write {}", path.display()))?;
                let weights = self.weights()?;
                self.dialogue.save(&weights, &place)?;
                self.say(&format!("saved {} tokens", self.dialogue.tokens().len()));
                Ok(())
            }
            Line::Load(path) => {
                let weights = self.weights()?;
                self.dialogue.load(path, &weights)?;
                self.say(&format!("loaded {} tokens", self.dialogue.tokens().len()));
                Ok(())
            }
            Line::Reset => Ok(self.dialogue.reset()?),
            Line::Help => {
                note!("{COMMANDS}");
                Ok(())
            }
            Line::Exit | Line::Nothing => Ok(()),
        }
    }

    fn turn(&mut self, message: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        let (terminal, mut failed) = (out.is_terminal(), None);
        let mut bar: Option<ProgressBar> = None;
        let quiet = self.quiet;
        let answer = self
            .dialogue
            .turn(message, self.config.clone(), |progress_of| {
                match progress_of {
                    Progress::Reading(left) => {
                        let bar =
                            bar.get_or_insert_with(|| progress(!quiet, left as u64, "message"));
                        bar.set_position(bar.length().unwrap_or(0).saturating_sub(left as u64));
                        if left == 0 {
                            bar.finish_and_clear();
                        }
                    }
                    Progress::Text(text) => {
                        let text = if terminal {
                            harmless(text)
                        } else {
                            text.into()
                        };
                        let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
                        failed = written.err();
                    }
                }
                match failed.is_some() || signals::interrupted() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        writeln!(out)?;
        out.flush()?;
        if answer.generated.finish == Some(Finish::Length) {
            self.say("the answer has all the tokens that it may have (--max-new)");
        }
        Ok(())
    }

    fn weights(&mut self) -> Result<String> {
        if self.weights.is_none() {
            self.weights = Some(self.opened.fingerprint()?);
        }
        Ok(self.weights.clone().unwrap_or_default())
    }

    fn say(&self, text: &str) {
        if !self.quiet {
            note!("{text}");
        }
    }
}

/// Whether the chat is what it was before the error.
fn can_go_on(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<DialogueError>() {
        Some(DialogueError::Generate(error)) => !matches!(error, GenerateError::Device(_)),
        _ => error.downcast_ref::<std::io::Error>().is_none(),
    }
}

/// The next line, and those that it goes on in; `None` at the end.
fn next_line(input: &mut impl BufRead, asked: bool) -> Result<Option<String>> {
    let mut whole = String::new();
    loop {
        if asked {
            let mut out = std::io::stdout().lock();
            out.write_all(if whole.is_empty() { b"> " } else { b". " })?;
            out.flush()?;
        }
        let mut line = String::new();
        let read = input
            .read_line(&mut line)
            .context("cannot read standard input as UTF-8 text")?;
        if read == 0 {
            return Ok((!whole.is_empty()).then_some(whole));
        }
        let line = line.strip_suffix('\n').unwrap_or(&line);
        let line = line.strip_suffix('\r').unwrap_or(line);
        match line.strip_suffix('\\') {
            Some(line) => whole = whole + line + "\n",
            None => return Ok(Some(whole + line)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        let parsed = |line| Line::parse(line).unwrap();
        assert_eq!(parsed("hello /exit"), Line::Message("hello /exit"));
        assert_eq!(parsed("//exit"), Line::Message("/exit"));
        assert_eq!(parsed("  "), Line::Nothing);
        assert_eq!(parsed("/save a b"), Line::Save(Path::new("a b")));
        assert_eq!(parsed("/exit "), Line::Exit);
        for wrong in ["/save", "/load ", "/exit now", "/other", "/"] {
            assert!(Line::parse(wrong).is_err(), "{wrong}");
        }
        let mut input = &b"one\r\ntwo\\\nlines\n\\\nlast"[..];
        let mut next = || next_line(&mut input, false).unwrap();
        assert_eq!(next().unwrap(), "one");
        assert_eq!(next().unwrap(), "two\nlines");
        assert_eq!(next().unwrap(), "\nlast");
        assert_eq!(next(), None);
    }
}
