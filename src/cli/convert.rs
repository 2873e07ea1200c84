//! `segattn convert`: a GGUF file or a model folder as a model folder, with segments if asked for.

mod past_heads;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ArgGroup;
use segattn::convert::folder;
use segattn::convert::gguf::Gguf;
use segattn::model::config::{ModelConfig, WeightType};
use segattn::train::config::{ModelSection, SegmentSection};

use super::device::DeviceName;
use past_heads::PastHeads;

/// Writes a model folder in the Hugging Face layout: `config.json`, `model.safetensors`, `tokenizer.json` and what
/// stands beside them. Without segment flags the model runs as full attention.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// GGUF file, or a model folder
    #[arg(value_name = "FILE|DIR")]
    input: PathBuf,
    /// Folder to make; one that holds weights already is refused
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the weights [default: the file's own, f32 where it is quantised]
    #[arg(long, value_enum, value_name = "FORMAT")]
    dtype: Option<Format>,
    /// `tokenizer.json` to use in place of the file's vocabulary
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    segments: Segments,
    /// Where heads are measured
    #[arg(long, value_enum, default_value_t)]
    device: DeviceName,
}

/// Number formats of a safetensors file.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Format {
    F32,
    F16,
    Bf16,
}

impl Format {
    pub fn weights(self) -> WeightType {
        match self {
            Self::F32 => WeightType::F32,
            Self::F16 => WeightType::F16,
            Self::Bf16 => WeightType::Bf16,
        }
    }
}

/// Sinks of a model that gets segments.
const SINKS: usize = 4;

/// How the model reads segments.
#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("segments").multiple(true)),
    group(ArgGroup::new("past").multiple(true)),
    group(ArgGroup::new("breaks").multiple(true)),
    group(ArgGroup::new("suffix").multiple(true))
)]
struct Segments {
    /// Segments as they were measured best for long texts (docs/models.md); flags beside it count more
    #[arg(long, groups = ["segments", "past", "breaks", "suffix"])]
    long: bool,
    /// Tokens of a segment; without it and --long the model has no segments
    #[arg(long, value_name = "N", group = "segments")]
    segment_len: Option<usize>,
    /// Rows of keys and values carried over from the segment before
    #[arg(long, value_name = "N", requires = "segments")]
    prior_len: Option<usize>,
    /// Rows retrieved from all earlier segments
    #[arg(long, value_name = "N", requires = "segments", group = "past")]
    past_len: Option<usize>,
    /// First rows of the sequence that every head of every later segment reads [default: 4 for a model without
    /// segments of its own]
    #[arg(long, value_name = "N")]
    sink_len: Option<usize>,
    /// Bits an element that are kept of the keys and values that the past is retrieved from: 16, 8 or 4
    #[arg(long, value_name = "BITS", requires = "segments")]
    pool_bits: Option<usize>,
    /// Most tokens of which these keys and values are held between segments, so that memory does not grow with the
    /// text; 0: of all
    #[arg(long, value_name = "N", requires = "segments")]
    pool_len: Option<usize>,
    /// Consecutive tokens that are retrieved together
    #[arg(long, value_name = "N", requires = "segments")]
    block_len: Option<usize>,
    /// Last tokens of a segment whose queries choose the past, by the second rule of retrieval
    #[arg(long, value_name = "N", requires = "segments")]
    queries: Option<usize>,
    /// Tokens that the second rule of retrieval takes around a token
    #[arg(long, value_name = "N", requires = "segments")]
    window_len: Option<usize>,
    /// Tokens of such a window that come before that token [default: half of them]
    #[arg(long, value_name = "N", requires = "segments")]
    window_before: Option<usize>,
    /// KV heads that read the past beside the prior tail, which all read: LAYER.HEAD,..., LAYER.* or `all`; or the N
    /// heads that most often find what is asked for (mass:N by attention, copy:N by copied tokens, gate:N by learned
    /// gates)
    #[arg(long, value_name = "HEADS", requires = "past")]
    past_heads: Option<PastHeads>,
    /// Tokens that end their segment early
    #[arg(
        long,
        value_name = "ID,...",
        value_delimiter = ',',
        requires = "segments"
    )]
    break_ids: Option<Vec<u32>>,
    /// Let the end of a prompt end its segment, so that what the prompt asks for is retrieved before the answer
    #[arg(long, requires = "segments", group = "breaks")]
    break_after_prompt: bool,
    /// Tokens of a prompt's end that are read after its break, with what the prompt has retrieved [default: 1 with
    /// --break-after-prompt]
    #[arg(long, value_name = "TOKENS", requires = "breaks", group = "suffix")]
    prompt_suffix_len: Option<usize>,
    /// How often to read these tokens again, each time with what they have retrieved themselves
    #[arg(long, value_name = "TIMES", requires = "suffix")]
    reread_suffix: Option<usize>,
}

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    ensure!(
        args.tokenizer.is_none() || !args.input.is_dir(),
        "--tokenizer: expected a GGUF file to convert, got a model folder, whose tokenizer goes along"
    );
    let tokenizer = args.tokenizer.as_deref().map(read_tokenizer).transpose()?;
    let gguf = match args.input.is_dir() {
        true => None,
        false => Some(Gguf::open(&args.input)?),
    };
    let mut config = match &gguf {
        Some(gguf) => gguf.config().clone(),
        None => ModelConfig::load(&args.input)?,
    };
    args.segments.apply(&mut config)?;
    let own = config.dtype.unwrap_or(WeightType::F32);
    let dtype = args.dtype.map_or(own, Format::weights);
    match gguf {
        Some(gguf) => gguf.save(&args.out, &config, dtype, tokenizer)?,
        None => folder::convert(&args.input, &args.out, &config, dtype)?,
    }
    if !quiet {
        super::out::note!("{}: written as {}", args.out.display(), dtype.config_name());
    }
    match &args.segments.past_heads {
        Some(heads) => heads.measure(&args.out, args.device, quiet),
        None => Ok(()),
    }
}

/// The text of another tokenizer, if it is one.
fn read_tokenizer(path: &Path) -> Result<String> {
    let tokenizer = segattn::model::tokenizer::Tokenizer::from_file(path)?;
    drop(tokenizer);
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

impl Segments {
    /// What docs/results/experiment-whole.md ran with, `aligned with 64 queries`.
    fn for_long_texts() -> SegmentSection {
        SegmentSection {
            segment_len: Some(1024),
            prior_len: Some(1024),
            past_len: Some(2048),
            sink_len: Some(SINKS),
            queries: Some(64),
            window_len: Some(64),
            window_before: Some(16),
            past_heads: Some(vec!["all".into()]),
            break_after_prompt: Some(true),
            prompt_suffix_len: Some(64),
            reread_suffix: Some(1),
            ..SegmentSection::default()
        }
    }

    fn apply(&self, config: &mut ModelConfig) -> Result<()> {
        let long = match self.long {
            true => Self::for_long_texts(),
            false => SegmentSection::default(),
        };
        let segment_len = self.segment_len.or(long.segment_len);
        // A pretrained model leans on the first tokens of the sequence.
        let new_sinks = match &config.segment {
            None => segment_len.map(|len| len.min(SINKS)),
            Some(_) => None,
        };
        let past_heads = self.past_heads.as_ref();
        // It predicts the first token of the answer.
        let last_token = self.break_after_prompt.then_some(1);
        let segment = SegmentSection {
            segment_len,
            prior_len: self.prior_len.or(long.prior_len.min(segment_len)),
            past_len: self.past_len.or(long.past_len),
            sink_len: self.sink_len.or(long.sink_len).or(new_sinks),
            pool_bits: self.pool_bits,
            pool_len: self.pool_len,
            block_len: self.block_len,
            queries: self.queries.or(long.queries),
            window_len: self.window_len.or(long.window_len),
            window_before: self.window_before.or(long.window_before),
            past_heads: past_heads.map_or(long.past_heads, PastHeads::names),
            break_ids: self.break_ids.clone(),
            break_after_prompt: self
                .break_after_prompt
                .then_some(true)
                .or(long.break_after_prompt),
            prompt_suffix_len: self
                .prompt_suffix_len
                .or(long.prompt_suffix_len)
                .or(last_token),
            reread_suffix: self.reread_suffix.or(long.reread_suffix),
            ..SegmentSection::default()
        };
        let section = ModelSection {
            segment,
            ..ModelSection::default()
        };
        if let Some(heads) = &self.past_heads {
            heads.check(config)?;
        }
        Ok(section.apply(config)?)
    }
}
