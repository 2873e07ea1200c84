//! `segattn-sim op`: the operation on the simulated GPU, on the files of `segattn op`.

mod op;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use half::{bf16, f16};

const USAGE: &str = "usage: segattn-sim op --case IN.safetensors --out OUT.safetensors [--dtype bf16|f16] [--seed N]

Runs the attention kernels of kernels/ on a simulated GPU under every check: races, bounds, memory never
written. The files are those of `segattn op`; tensors are rounded to the element type and summed in f32.
The seed decides the order of threads, and no bit of the results.";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut words = std::env::args().skip(1);
    match words.next().as_deref() {
        Some("op") => {}
        Some("--help" | "-h") => {
            println!("{USAGE}");
            return Ok(());
        }
        _ => bail!("{USAGE}"),
    }
    let (mut case, mut out, mut dtype, mut seed) = (None, None, "bf16".to_string(), 1);
    while let Some(flag) = words.next() {
        let value = words
            .next()
            .with_context(|| format!("{flag}: expected a value\n{USAGE}"))?;
        match flag.as_str() {
            "--case" => case = Some(PathBuf::from(value)),
            "--out" => out = Some(PathBuf::from(value)),
            "--dtype" => dtype = value,
            "--seed" => {
                seed = value
                    .parse()
                    .with_context(|| format!("--seed: expected a number, got {value:?}"))?
            }
            _ => bail!("unknown flag {flag}\n{USAGE}"),
        }
    }
    let (Some(case), Some(out)) = (case, out) else {
        bail!("expected --case and --out\n{USAGE}");
    };
    let bytes = std::fs::read(&case).with_context(|| format!("cannot read {}", case.display()))?;
    let results = match dtype.as_str() {
        "bf16" => op::run::<bf16>(&bytes, seed),
        "f16" => op::run::<f16>(&bytes, seed),
        other => bail!("--dtype: expected bf16 or f16, got {other:?}"),
    };
    let results = results.with_context(|| case.display().to_string())?;
    std::fs::write(&out, results).with_context(|| format!("cannot write {}", out.display()))
}
