//! Places in compiled kernels, and their source lines by the debug information (`addr2line`).

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

/// A place in the code: an offset from the program's load address, 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Site(pub u32);

/// Files whose frames say nothing about the kernel: the simulated instructions themselves.
const VOCABULARY: [&str; 2] = ["ptx.cuh", "simulator.h"];

/// `file:line` of every site, with the lines it was inlined into, innermost first.
pub(crate) fn locations(image: &Path, mut sites: Vec<Site>) -> HashMap<Site, String> {
    sites.retain(|site| site.0 != 0);
    sites.sort_unstable_by_key(|site| site.0);
    sites.dedup();
    if sites.is_empty() {
        return HashMap::new();
    }
    let addresses = sites.iter().map(|site| format!("{:#x}", site.0));
    let output = Command::new("addr2line")
        .args(["-a", "-i", "-e"])
        .arg(image)
        .args(addresses)
        .output();
    let text = output
        .map(|out| String::from_utf8_lossy(&out.stdout).into_owned())
        .unwrap_or_default();
    let mut found = parse(&text).into_iter();
    let mut name = |site: Site| {
        let frames = found.next().filter(|frames| !frames.is_empty());
        (
            site,
            frames.unwrap_or_else(|| format!("code offset {:#x}", site.0)),
        )
    };
    sites.into_iter().map(&mut name).collect()
}

/// One location an address: its frames outside the vocabulary, innermost first.
fn parse(text: &str) -> Vec<String> {
    let mut all: Vec<Vec<String>> = Vec::new();
    for line in text.lines() {
        if line.starts_with("0x") {
            all.push(Vec::new());
        } else if let (Some(frames), Some(file_and_line)) =
            (all.last_mut(), line.rsplit('/').next())
        {
            let line_only = file_and_line.split(" (").next().unwrap_or_default();
            if !VOCABULARY.iter().any(|file| line_only.starts_with(file))
                && !line_only.starts_with('?')
            {
                frames.push(line_only.to_string());
            }
        }
    }
    all.into_iter().map(|frames| frames.join(" < ")).collect()
}
