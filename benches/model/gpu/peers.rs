//! PyTorch on the same GPU, through a Python child that waits for questions: peers.py.

use std::path::PathBuf;

use serde_json::Value;

use super::super::python::Python;

/// The child.
pub struct Peers(Python);

impl Peers {
    /// Starts it, or says what is missing; `$SEGATTN_BENCH_PEERS` is the script where it lies elsewhere.
    pub fn start() -> Result<Self, String> {
        let script = match std::env::var_os("SEGATTN_BENCH_PEERS") {
            Some(path) => PathBuf::from(path),
            None => concat!(env!("CARGO_MANIFEST_DIR"), "/benches/model/gpu/peers.py").into(),
        };
        let python = Python::start(&script, &[]);
        if let Err(missing) = &python {
            println!("no peers are measured: {missing}");
        }
        Ok(Self(python?))
    }

    /// Versions.
    pub fn hello(&self) -> &Value {
        &self.0.hello
    }

    /// Its answer, with `failed` where it could not.
    pub fn ask(&mut self, question: &Value) -> Result<Value, String> {
        self.0.ask(question)
    }
}
