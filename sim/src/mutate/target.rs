//! A kernel file into which bugs are planted: a copy of the kernels, compiled without loading, and the tests that run
//! it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::trial::{self, Allowance, Outcome};
use super::{Mutant, Rule, mutants};
use crate::host::module::Source;

/// How bugs in one kernel file are tried.
pub struct Target<'a> {
    /// The folder of the kernels.
    pub kernels: &'a Path,
    /// The file in it.
    pub file: &'a str,
    /// The folder for copies.
    pub scratch: &'a Path,
    /// What is done to the text of every file of a copy.
    pub adapt: &'a (dyn Fn(&str) -> String + Sync),
    /// The kernels of a folder that hold the file.
    pub sources: &'a (dyn Fn(&Path) -> Vec<Source> + Sync),
    /// The tests that run the kernels of a folder.
    pub tests: &'a (dyn Fn(&Path) -> Command + Sync),
    /// What they may take.
    pub allowance: Allowance,
}

/// A target of which everything has been compiled without a bug.
pub struct Prepared<'a> {
    target: Target<'a>,
    /// What was compiled, for the next trials to use.
    objects: HashSet<PathBuf>,
}

impl<'a> Prepared<'a> {
    /// Compiles the target's kernels. Panics where they do not compile.
    pub fn new(target: Target<'a>) -> Prepared<'a> {
        let copy = target.copy(None, &format!("{}-compiled", target.file));
        let objects = target.compile(&copy).into_iter().collect();
        Prepared { target, objects }
    }

    /// Every bug that rules plant. Panics where a rule finds nothing: it is out of date then.
    pub fn mutants(&self, rules: &[Rule]) -> Vec<Mutant> {
        let (path, file) = (self.target.kernels.join(self.target.file), self.target.file);
        let text = std::fs::read_to_string(&path);
        let text = text.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let all = mutants(&text, rules);
        for Rule { find, .. } in rules {
            let found = all.iter().any(|mutant| mutant.find == *find);
            assert!(
                found,
                "{file}: {find:?} occurs nowhere; bring the rule up to date"
            );
        }
        all
    }

    /// Whether the tests see a bug, or fail without one. Panics where the kernels do not compile.
    pub fn attempt(&self, bug: Option<&Mutant>, name: &str) -> Outcome {
        let Target {
            file,
            tests,
            allowance,
            ..
        } = self.target;
        let copy = self.target.copy(bug, name);
        let objects = self.target.compile(&copy);
        let outcome = trial::run(&mut tests(&copy.0), allowance);
        let planted = objects
            .iter()
            .filter(|object| !self.objects.contains(*object));
        planted.for_each(|object| drop(std::fs::remove_file(object)));
        outcome.unwrap_or_else(|e| panic!("{file}: {e}"))
    }
}

impl Target<'_> {
    fn copy(&self, bug: Option<&Mutant>, name: &str) -> Copy {
        let to = Copy(self.scratch.join(name));
        let copy = || -> std::io::Result<()> {
            std::fs::create_dir_all(&to.0)?;
            for entry in std::fs::read_dir(self.kernels)? {
                let path = entry?.path();
                let file = path.file_name().unwrap_or_default();
                let text = match bug {
                    Some(bug) if file == self.file => bug.text.clone(),
                    _ => std::fs::read_to_string(&path)?,
                };
                std::fs::write(to.0.join(file), (self.adapt)(&text))?;
            }
            Ok(())
        };
        copy().unwrap_or_else(|e| panic!("{}: {e}", to.0.display()));
        to
    }

    fn compile(&self, folder: &Copy) -> Vec<PathBuf> {
        let compile = |source: Source| source.object().unwrap_or_else(|e| panic!("{e}"));
        (self.sources)(&folder.0).into_iter().map(compile).collect()
    }
}

/// A copy of the kernels, gone when dropped.
struct Copy(PathBuf);

impl Drop for Copy {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}
