//! A peer in Python, in a process of its own on the same machine in the same run: one JSON line in, one out.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

/// The child; it ends when this is dropped.
pub struct Python {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    /// What it said first.
    pub hello: Value,
}

impl Drop for Python {
    fn drop(&mut self) {
        // End of input ends the child.
        self.to = None;
        let _ = self.child.wait();
    }
}

/// `$SEGATTN_PYTHON`, `$PYTHON` or `python3`.
pub fn interpreter() -> std::ffi::OsString {
    let named = std::env::var_os("SEGATTN_PYTHON").or_else(|| std::env::var_os("PYTHON"));
    named.unwrap_or("python3".into())
}

impl Python {
    /// Starts a script and waits for its first line, which says `missing` where it lacks something.
    ///
    /// # Errors
    /// What is missing, in words.
    pub fn start(script: &Path, arguments: &[&OsStr]) -> Result<Self, String> {
        let spawned = Command::new(interpreter())
            .arg(script)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = spawned.map_err(|error| format!("{:?}: {error}", interpreter()))?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let mut python = Python {
            child,
            to,
            from: BufReader::new(from.ok_or("no output of the child")?),
            hello: Value::Null,
        };
        python.hello = python.answer()?;
        match python.hello.get("missing") {
            Some(missing) => Err(missing.as_str().unwrap_or("something").to_owned()),
            None => Ok(python),
        }
    }

    fn answer(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        match self.from.read_line(&mut line) {
            Ok(0) => Err("the Python child ended; its error is above".into()),
            Ok(_) => serde_json::from_str(&line).map_err(|error| format!("{error}: {line}")),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The answer to a question.
    ///
    /// # Errors
    /// The child has ended or does not answer in JSON.
    pub fn ask(&mut self, question: &Value) -> Result<Value, String> {
        let to = self.to.as_mut().ok_or("the Python child ended")?;
        let sent = writeln!(to, "{question}").and_then(|()| to.flush());
        sent.map_err(|error| error.to_string())?;
        self.answer()
    }
}
