//! Rules of the repository that no compiler checks: which floor may use which, how code cites documents, how long lines
//! are, and that links lead somewhere.

use std::path::{Path, PathBuf};

/// Folders with text of ours.
const FOLDERS: &[&str] = &[
    ".ci",
    "benches",
    "candle",
    "capi",
    "configs",
    "docs",
    "examples",
    "experiments",
    "fuzz",
    "kernels",
    "prebuilt",
    "python",
    "sim/golden",
    "sim/include",
    "sim/src",
    "sim/tests",
    "src",
];
const MORE: [&str; 6] = [
    "tests",
    "sim/kernels",
    "build.rs",
    "Cargo.toml",
    "sim/Cargo.toml",
    "README.md",
];
const PAGES: [&str; 2] = ["CONTRIBUTING.md", "CHANGELOG.md"];
/// Endings of files that people write.
const WRITTEN: [&str; 10] = ["rs", "cu", "cuh", "h", "c", "md", "toml", "py", "sh", "run"];
const COLUMNS: usize = 120;

/// What each folder of `src/` may use of the others (docs/architecture.md).
const FLOORS: [(&str, &[&str]); 12] = [
    ("cuda", &[]),
    ("attention", &["cuda", "isa"]),
    ("device", &["attention", "cuda", "isa"]),
    ("ranks", &["device"]),
    ("model", &["device", "ranks"]),
    ("generate", &["device", "model"]),
    ("serve", &["device", "generate", "model"]),
    ("eval", &["device", "generate", "model"]),
    ("train", &["device", "model", "ranks"]),
    ("convert", &["model"]),
    ("experiment", &["eval", "train"]),
    (
        "cli",
        &[
            "attention",
            "convert",
            "cuda",
            "device",
            "eval",
            "experiment",
            "generate",
            "isa",
            "model",
            "ranks",
            "serve",
            "train",
        ],
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files under a path, or the file itself, that people write.
fn written(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        let entries =
            std::fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for entry in entries {
            let entry = entry.expect("an entry").path();
            if !entry.ends_with("target") && !entry.ends_with("corpus") {
                written(&entry, found);
            }
        }
        return;
    }
    let ending = path
        .extension()
        .or(path.file_name())
        .and_then(|name| name.to_str());
    if ending.is_some_and(|ending| WRITTEN.contains(&ending)) {
        found.push(path.to_owned());
    }
}

/// All written files: path from the root, and text.
fn files() -> Vec<(String, String)> {
    let mut paths = Vec::new();
    for place in FOLDERS.iter().chain(&MORE).chain(&PAGES) {
        let path = root().join(place);
        assert!(path.exists(), "{place} is not there");
        written(&path, &mut paths);
    }
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let name = path
            .strip_prefix(root())
            .expect("below the root")
            .display()
            .to_string();
        (name, text)
    };
    paths.into_iter().map(read).collect()
}

fn none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

/// The folder of `src/` that a file belongs to.
fn floor(file: &str) -> Option<&str> {
    let name = file.strip_prefix("src/")?.split('/').next()?;
    Some(name.trim_end_matches(".rs"))
}

/// Build folders and data that a commit has taken along by mistake.
#[test]
fn no_file_is_tracked_that_is_ignored() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !root.join(".git").exists() {
        return; // A package, not a clone.
    }
    let list = std::process::Command::new("git")
        .args(["ls-files", "--cached", "--ignored", "--exclude-standard"])
        .current_dir(root)
        .output()
        .expect("git");
    assert!(list.status.success(), "git: {}", list.status);
    let files = String::from_utf8_lossy(&list.stdout);
    assert!(files.is_empty(), "tracked, and ignored:\n{files}");
}

#[test]
fn a_floor_uses_only_those_below_it() {
    let mut wrong = Vec::new();
    for (file, text) in files() {
        let Some((from, allowed)) = FLOORS.iter().find(|(name, _)| floor(&file) == Some(name))
        else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for used in code.split("crate::").skip(1) {
                let used: String = used
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                let known = FLOORS.iter().any(|(name, _)| *name == used);
                if known && used != *from && !allowed.contains(&used.as_str()) {
                    wrong.push(format!("{file}:{}: {from} uses {used}", number + 1));
                }
            }
        }
    }
    none("see docs/architecture.md", &wrong);
}

/// Columns that a line takes.
fn columns(line: &str) -> usize {
    line.chars().count()
}

/// Lines that may be longer: rows of tables, one word such as a link, and what a program printed.
fn may_be_long(file: &str, line: &str) -> bool {
    let text = line
        .trim_start()
        .trim_start_matches(['/', '!'])
        .trim_start();
    let table = (file.ends_with(".md") || file.ends_with(".rs")) && text.starts_with('|');
    let printed = file.starts_with("docs/results/");
    let words = line
        .trim_start_matches(['/', '!', '#', ' ', '*', '-'])
        .split_whitespace()
        .count();
    table || printed || words <= 1
}

#[test]
fn lines_have_at_most_120_columns() {
    let mut long = Vec::new();
    for (file, text) in files() {
        for (number, line) in text.lines().enumerate() {
            if columns(line) > COLUMNS && !may_be_long(&file, line) {
                long.push(format!("{file}:{}: {} columns", number + 1, columns(line)));
            }
        }
    }
    none("lines longer than 120 columns", &long);
}

/// The text of a file with comment marks and line breaks taken out, so that a citation is found across lines.
fn flowing(text: &str) -> String {
    let words = text
        .split_whitespace()
        .filter(|word| !["//", "///", "//!", "/*", "*/", "*", "#"].contains(word));
    words.collect::<Vec<_>>().join(" ")
}

/// Citations in a text that are not of the form "docs/PAGE.md" or "docs/contract.md, section N".
fn bad_citations(text: &str) -> Vec<String> {
    let text = flowing(text);
    let mut bad = Vec::new();
    let around = |at: usize| {
        let start = text[..at]
            .char_indices()
            .rev()
            .nth(30)
            .map_or(0, |(i, _)| i);
        let end = text[at..]
            .char_indices()
            .nth(40)
            .map_or(text.len(), |(i, _)| at + i);
        text[start..end].to_owned()
    };
    // Pages that were never part of the repository, or are cited by their bare name.
    for (at, _) in text.match_indices(".md") {
        let name: String = text[..at]
            .chars()
            .rev()
            .take_while(|c| c.is_alphanumeric() || "-_/.".contains(*c))
            .collect();
        let name: String = name.chars().rev().collect();
        let page = ["contract", "architecture", "kernels", "gpu", "log"].contains(&name.as_str());
        if page
            || name.ends_with("segment-attention")
            || name.ends_with("testing")
            || name.ends_with("house")
        {
            bad.push(around(at));
        }
    }
    for (at, _) in text.match_indices("ontract") {
        let rest = &text[at + "ontract".len()..];
        let near = rest
            .trim_start_matches("'s")
            .trim_start_matches([',', ' ', '(']);
        if near.starts_with("section ") {
            bad.push(around(at));
        }
    }
    bad
}

#[test]
fn code_cites_documents_by_path_and_section() {
    let mut bad = Vec::new();
    for (file, text) in files() {
        if !file.ends_with(".md") && file != "tests/repository.rs" {
            bad.extend(
                bad_citations(&text)
                    .into_iter()
                    .map(|cited| format!("{file}: ... {cited}")),
            );
        }
    }
    none(
        "cite as `docs/contract.md, section N` or docs/PAGE.md",
        &bad,
    );
}

#[test]
fn other_forms_of_citations_are_found() {
    let good = "// Order of sums (docs/contract.md,\n// section 4), docs/kernels.md; the contract of `part`.";
    assert!(bad_citations(good).is_empty(), "{:?}", bad_citations(good));
    for text in [
        "(contract section 4)",
        "segment-attention.md, section 1",
        "see kernels.md",
        "contract,\n//! section 3",
    ] {
        assert_eq!(bad_citations(text).len(), 1, "{text}");
    }
}

#[test]
fn sections_that_code_cites_exist() {
    let contract =
        std::fs::read_to_string(root().join("docs/contract.md")).expect("docs/contract.md");
    let mut cited = 0;
    for (file, text) in files() {
        let text = flowing(&text);
        for rest in text.split("docs/contract.md, section ").skip(1) {
            let Some(number) = rest
                .split(|c: char| !c.is_ascii_digit())
                .next()
                .filter(|n| !n.is_empty())
            else {
                continue;
            };
            assert!(
                contract.contains(&format!("\n## {number}. ")),
                "{file}: section {number}"
            );
            cited += 1;
        }
    }
    assert!(cited > 5, "only {cited} citations were found");
}

/// The targets of links in a page: what stands in parentheses after brackets.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', ' ']).next())
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut broken = Vec::new();
    for (file, text) in files().iter().filter(|(file, _)| file.ends_with(".md")) {
        let folder = root().join(file).parent().expect("a folder").to_owned();
        for link in links(text).filter(|link| !link.contains("://") && !link.starts_with('#')) {
            let path = link.split('#').next().unwrap_or_default();
            if !folder.join(path).exists() {
                broken.push(format!("{file}: {link}"));
            }
        }
    }
    none("broken links", &broken);
}

#[test]
fn readme_has_less_than_150_lines() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    assert!(readme.lines().count() < 150);
}
