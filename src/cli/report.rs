//! `segattn report`: rows of experiments as tables and figures.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use segattn::experiment::report::report;
use segattn::experiment::{Definition, rows};

use super::figure;
use super::files::write_atomically;
use super::out::{harmless, out};
use super::reproduce::FOLDER;

/// Ending of files of rows.
const ROWS: &str = "jsonl";

/// Writes a page of tables and figures (SVG) for each experiment: means over seeds with their intervals, and
/// differences from the baseline that the definition names.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names of files in experiments/results/, or .jsonl files [default: all that are there]
    #[arg(value_name = "NAME|FILE")]
    names: Vec<PathBuf>,
    /// Folder for the pages
    #[arg(short, long, value_name = "DIR", default_value = "docs/results")]
    out: PathBuf,
}

pub fn run(args: &Args) -> Result<()> {
    let folder = Path::new(FOLDER).join("results");
    let files = match args.names.is_empty() {
        true => all(&folder)?,
        false => {
            let file = |name: &PathBuf| match name.extension() {
                Some(ending) if ending == ROWS => name.clone(),
                _ => folder.join(format!("{}.{ROWS}", name.display())),
            };
            args.names.iter().map(file).collect()
        }
    };
    for file in files {
        out!("{}", page(&file, &args.out)?.display())?;
    }
    Ok(())
}

/// Every file of rows in the folder.
fn all(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = || format!("cannot read {}", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        if path.extension().is_some_and(|ending| ending == ROWS) {
            files.push(path);
        }
    }
    ensure!(
        !files.is_empty(),
        "{}: expected files of rows, got none; make some with `segattn reproduce`",
        folder.display()
    );
    files.sort();
    Ok(files)
}

/// Writes the page of a file of rows and its figures, and returns the page's place.
fn page(file: &Path, out: &Path) -> Result<PathBuf> {
    let rows = rows::read(file)?;
    let name = file.file_stem().unwrap_or_default().to_string_lossy();
    let Some(first) = rows.first() else {
        anyhow::bail!("{}: expected rows, got none", file.display());
    };
    let definition = definition(&first.experiment)?;
    let stem = format!("experiment-{name}");
    let source = file.to_string_lossy();
    let report = report(&name, &stem, &source, &rows, definition.as_ref());
    for one in &report.figures {
        write_atomically(
            &out.join(&one.file),
            harmless(&figure::draw(one)?).as_bytes(),
        )?;
    }
    let page = out.join(format!("{stem}.md"));
    // Names come from whoever made the rows, and pages are read on terminals too.
    write_atomically(&page, harmless(&report.markdown).as_bytes())?;
    Ok(page)
}

/// The definition of an experiment, where there is one.
fn definition(name: &str) -> Result<Option<Definition>> {
    let path = Path::new(FOLDER).join(format!("{name}.toml"));
    match path.is_file() {
        true => Ok(Some(Definition::load(&path, false, &[])?)),
        false => Ok(None),
    }
}
