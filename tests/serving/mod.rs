//! `segattn serve` as a process, and a client of it.

// Every test program uses a part of this.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A server on a port of its own; ended with the value.
pub struct Serving {
    pub process: Child,
    pub address: String,
}

impl Serving {
    /// Of the model in `folder`.
    pub fn start(folder: &Path, args: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_segattn"))
            .current_dir(folder)
            .args(["serve", "-m", ".", "--port", "0", "--name", "tiny"])
            .args(args)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut address = None;
        while address.is_none() {
            let mut line = String::new();
            assert!(log.read_line(&mut line).unwrap() > 0, "the server ended");
            address = line
                .trim()
                .strip_prefix("tiny at http://")
                .map(str::to_owned);
        }
        // Its log goes on, and must be read.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::stderr()));
        Self {
            process,
            address: address.unwrap(),
        }
    }

    /// Sends a request, and returns the open connection.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server that refuses a large body closes before it has read all.
        let _ = stream.write_all(body);
        stream
    }

    /// Status and body of an answer.
    pub fn text(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String) {
        read(self.send(method, path, headers, body))
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        self.text("GET", path, "", b"")
    }

    /// Status and object of an answer to an object.
    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.text("POST", path, "", body.to_string().as_bytes());
        let json = serde_json::from_str(&text);
        (
            status,
            json.unwrap_or_else(|error| panic!("{error}: {text}")),
        )
    }

    /// The object of an answer that must be a good one.
    pub fn good(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body);
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// The objects of a stream that must end well.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let (status, text) = self.text("POST", path, "", body.to_string().as_bytes());
        assert_eq!(status, 200, "{text}");
        let mut data: Vec<&str> = text.split("\n\n").filter(|part| !part.is_empty()).collect();
        assert_eq!(data.pop(), Some("data: [DONE]"), "{text}");
        let object = |part: &str| serde_json::from_str(part.strip_prefix("data: ").unwrap());
        data.into_iter().map(|part| object(part).unwrap()).collect()
    }

    /// A number of `/metrics`.
    pub fn metric(&self, name: &str) -> u64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value
            .unwrap_or_else(|| panic!("{name}: {text}"))
            .parse()
            .unwrap()
    }

    /// Waits until a number of `/metrics` is so.
    pub fn wait_for(&self, name: &str, value: u64) {
        let started = Instant::now();
        while self.metric(name) != value {
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "{name} never was {value}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends SIGTERM.
    #[cfg(unix)]
    pub fn terminate(&self) {
        // SAFETY: the process is a child that has not been waited for.
        let sent = unsafe { libc::kill(self.process.id() as i32, libc::SIGTERM) };
        assert_eq!(sent, 0);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Status and body of the answer on a connection.
pub fn read(mut stream: TcpStream) -> (u16, String) {
    let mut bytes = Vec::new();
    // A connection that is reset has still said what it has.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let chunked = head
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked");
    let body = if chunked {
        joined(body)
    } else {
        body.to_owned()
    };
    (status, body)
}

/// The chunks of a body that comes in chunks.
fn joined(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole.push_str(&rest[..size]);
        body = rest[size..].strip_prefix("\r\n").unwrap();
    }
    whole
}
