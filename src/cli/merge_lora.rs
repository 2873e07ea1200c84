//! `segattn merge-lora`: a model folder with adapters added to its weights.

use std::path::PathBuf;

use anyhow::Result;
use segattn::convert::merge::merge;
use segattn::model::config::WeightType;
use segattn::model::lora::folder::AdapterFolder;

use super::convert::Format;
use super::model::load_config;
use super::out::note;

/// Writes a model folder whose weights are those of MODEL plus the adapters' products. Merged weights are rounded to
/// the number format, so log-probabilities differ a little from those with --adapter; in f32 by rounding alone.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of the model
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Folder with the adapters, in PEFT's layout or as `train` saved it
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    /// Folder to make; one that holds weights already is refused
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the weights [default: the model's own]
    #[arg(long, value_enum, value_name = "FORMAT")]
    dtype: Option<Format>,
}

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    let mut config = load_config(&args.model)?;
    AdapterFolder::set_segments(&args.adapter, &mut config)?;
    let adapter = AdapterFolder::open(&args.adapter, &config)?;
    let own = config.dtype.unwrap_or(WeightType::F32);
    let dtype = args.dtype.map_or(own, Format::weights);
    merge(&args.model, &adapter, &args.out, &config, dtype)?;
    if !quiet {
        note!("{}: written as {}", args.out.display(), dtype.config_name());
    }
    Ok(())
}
