//! Other attention kernels on the same GPU in the same run, through a Python child: PyTorch's, cuDNN's own call and
//! FlashAttention-3.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

use super::case::Case;

/// Peers of a row, in the order of its columns.
pub const NAMES: [&str; 5] = ["flash", "cudnn", "cudnn1", "fa3", "flex"];

/// The child, which waits for cases; it ends when this is dropped.
pub struct Peers {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    /// What the child said first: versions, and the measured peak in operations a second.
    pub hello: Value,
}

impl Drop for Peers {
    fn drop(&mut self) {
        // End of input ends the child.
        self.to = None;
        let _ = self.child.wait();
    }
}

impl Peers {
    /// Starts the child, or says what is missing.
    pub fn start() -> Result<Self, String> {
        let script = match std::env::var_os("SEGATTN_BENCH_PEERS") {
            Some(path) => PathBuf::from(path),
            None => PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/benches/attention_gpu/peers.py"
            )),
        };
        let python = std::env::var_os("PYTHON").unwrap_or("python3".into());
        let spawned = Command::new(python)
            .arg(&script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = spawned.map_err(|error| format!("python3: {error}"))?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let from = from.ok_or("no output of the child")?;
        let mut peers = Peers {
            child,
            to,
            from: BufReader::new(from),
            hello: Value::Null,
        };
        peers.hello = peers.answer()?;
        match peers.hello.get("missing") {
            Some(missing) => Err(missing.to_string()),
            None => Ok(peers),
        }
    }

    fn answer(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        match self.from.read_line(&mut line) {
            Ok(0) => Err("the Python child ended".into()),
            Ok(_) => serde_json::from_str(&line).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Seconds of each peer on a case, or why not.
    pub fn time(&mut self, case: &Case, backward: bool, flex: bool) -> Result<Value, String> {
        let group = case.q_heads / case.kv_heads;
        let question = json!({
            "name": case.name(),
            "batch": case.batch,
            "heads": case.q_heads,
            "head_dim": case.head_dim,
            "rows": case.rows,
            "current": case.segment,
            "prior": case.prior,
            "past": case.past,
            "past_heads": case.reading_heads * group,
            "backward": backward,
            "flex": flex,
        });
        let to = self.to.as_mut().ok_or("the Python child ended")?;
        writeln!(to, "{question}")
            .and_then(|()| to.flush())
            .map_err(|error| error.to_string())?;
        self.answer()
    }
}
