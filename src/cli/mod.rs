//! The command line: one file a command; this one parses, dispatches, and reports errors.

mod alloc;
mod chat;
mod convert;
mod demo;
mod device;
mod doctor;
mod documents;
mod eval;
mod events;
mod figure;
mod files;
mod generate;
mod grad;
mod inspect;
mod merge_lora;
mod metrics;
mod model;
mod op;
mod out;
mod overrides;
mod past_heads;
mod plan;
mod plot;
mod ranks;
mod report;
mod reproduce;
mod resume;
mod run;
mod score;
#[cfg(feature = "serve")]
mod serve;
mod signals;
mod stages;
mod teacher;
mod text;
mod threads;
mod train;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use out::{note, out_part};

/// Segment attention: train and generate over long sequences in memory that does not grow.
#[derive(Debug, Parser)]
#[command(
    name = "segattn",
    version,
    arg_required_else_help = true,
    max_term_width = 100
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags of every command.
#[derive(Debug, clap::Args)]
struct Global {
    /// Threads to compute with; results do not depend on it [default: one for each core]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<std::num::NonZeroUsize>,
    /// More log messages: -v for info, -vv for debug
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// No progress bars, only errors and results
    #[arg(short, long, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a small model here and now, and see what this crate promises
    Demo(demo::Args),
    /// Train a model: a new one, or one from a folder
    Train(train::Args),
    /// Go on with a run from its newest checkpoint, to the same bits
    Resume(resume::Args),
    /// Continue prompts, one or several in a batch
    Generate(generate::Args),
    /// Talk with a model by its chat template
    Chat(chat::Args),
    /// Serve a model over HTTP, by OpenAI's interface
    #[cfg(feature = "serve")]
    Serve(serve::Args),
    /// Log-probability of each token of a text, and its perplexity
    Score(score::Args),
    /// Gradient of the mean next-token loss, for comparison with other programs
    Grad(grad::Args),
    /// Measure perplexity and synthetic long-context tasks
    Eval(eval::Args),
    /// Run the arms of an experiment, and go on with it
    Reproduce(reproduce::Args),
    /// Tables and figures of experiments' rows
    Report(report::Args),
    /// Make a model folder of a GGUF file or of another folder, with segments if asked for
    Convert(convert::Args),
    /// Make a model folder whose weights have adapters added
    MergeLora(merge_lora::Args),
    /// What a model folder holds, and how much memory it takes at which length
    Inspect(inspect::Args),
    /// What this machine offers, what is missing, and what to do
    Doctor(doctor::Args),
    /// Completions for a shell, to be put where it looks for them
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Run the attention operation, forward and backward, on tensors in a file
    Op(op::Args),
}

/// Parses the arguments, runs the command, and turns its result into an exit code: 0 done, 1 failed,
/// 2 wrong usage.
pub fn main() -> ExitCode {
    alloc::keep_freed_memory();
    signals::let_large_writes_fail();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and versions come this way too.
        Err(shown) => {
            let code = u8::try_from(shown.exit_code()).unwrap_or(2);
            return ended(shown.print().map_err(Into::into), code);
        }
    };
    start_logging(&cli.global);
    let done = threads::start(cli.global.threads);
    ended(done.and_then(|()| run(cli.command, cli.global.quiet)), 0)
}

/// The exit code: `code` where all went well, or where the reader of the output has left.
fn ended(done: Result<()>, code: u8) -> ExitCode {
    match done {
        Ok(()) => ExitCode::from(code),
        Err(error) if reader_left(&error) => ExitCode::SUCCESS,
        Err(error) => {
            note!("error: {}", explain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, quiet: bool) -> Result<()> {
    match command {
        Command::Demo(args) => demo::run(&args, quiet),
        Command::Train(args) => train::run(&args, quiet),
        Command::Resume(args) => resume::run(&args, quiet),
        Command::Generate(args) => generate::run(&args, quiet),
        Command::Chat(args) => chat::run(&args, quiet),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(&args, quiet),
        Command::Score(args) => score::run(&args, quiet),
        Command::Grad(args) => grad::run(&args),
        Command::Eval(args) => eval::run(&args, quiet),
        Command::Reproduce(args) => reproduce::run(&args, quiet),
        Command::Report(args) => report::run(&args),
        Command::Convert(args) => convert::run(&args, quiet),
        Command::MergeLora(args) => merge_lora::run(&args, quiet),
        Command::Inspect(args) => inspect::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "segattn", &mut script);
            Ok(out_part!("{}", String::from_utf8_lossy(&script))?)
        }
        Command::Op(args) => op::run(&args),
    }
}

/// The error and its causes in one line. Some errors' own text ends with their cause's: it is not said twice.
fn explain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Whether the output went into a pipe whose reader has seen enough (`segattn ... | head`).
fn reader_left(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Messages go to stderr; `RUST_LOG` overrides the flags.
fn start_logging(global: &Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "segattn=info,warn",
        (false, _) => "segattn=debug,info",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Colours are for terminals, and nothing is said of messages that nobody can read.
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .log_internal_errors(false)
        .without_time()
        .with_target(false)
        .init();
}
