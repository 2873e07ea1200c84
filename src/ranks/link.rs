//! A connection to one other rank, which carries messages one after the other.
//!
//! A message has a head of 9 bytes: what it is, and the number of its bytes (little endian).

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::error::{RankError, Result};

/// A message's head: its kind and length.
const HEAD: usize = 9;
/// Content for the one who reads it next.
const CONTENT: u8 = 0;
/// Why the sender ends the run.
const FAREWELL: u8 = 1;
/// Longest text of a farewell that is read.
const MAX_FAREWELL: u64 = 1 << 16;
/// How long a farewell may take to go out.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// A connection.
#[derive(Debug)]
pub(super) struct Link {
    /// The other rank.
    peer: usize,
    stream: TcpStream,
    limit: Duration,
    /// Held while a message is sent: a farewell must not get into it.
    sending: Mutex<()>,
    /// Bytes of the message that was begun and is not read yet.
    unread: AtomicU64,
}

impl Link {
    /// A connection to rank `peer`, on which nothing may take longer than `limit` without any progress.
    pub fn new(peer: usize, stream: TcpStream, limit: Duration) -> Result<Self> {
        let set = || {
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(limit))?;
            stream.set_write_timeout(Some(limit))
        };
        set().map_err(|e| RankError::io(format!("set up the connection to rank {peer}"), e))?;
        Ok(Self {
            peer,
            stream,
            limit,
            sending: Mutex::new(()),
            unread: AtomicU64::new(0),
        })
    }

    /// Sends a message of these parts, one after the other.
    pub fn send(&self, parts: &[&[u8]], doing: &'static str) -> Result<()> {
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let sent = self
            .write(&head(CONTENT, len))
            .and_then(|()| parts.iter().try_for_each(|part| self.write(part)));
        sent.map_err(|error| self.failed(error, doing))
    }

    /// The next message.
    pub fn receive(&self, doing: &'static str) -> Result<Vec<u8>> {
        self.receive_at_most(usize::MAX, doing)
    }

    /// The next message, however long it does not come.
    pub fn receive_at_last(&self, doing: &'static str) -> Result<Vec<u8>> {
        loop {
            let came = self.stream.peek(&mut [0]);
            match came {
                Err(error) if is_late(&error) || error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error, doing)),
                Ok(_) => return self.receive(doing),
            }
        }
    }

    /// The next message, which may have `most` bytes.
    pub fn receive_at_most(&self, most: usize, doing: &'static str) -> Result<Vec<u8>> {
        let len = self.next(doing)?;
        if len > most as u64 {
            return Err(RankError::Message {
                rank: self.peer,
                doing,
                expected: format!("at most {most} bytes"),
                got: len.to_string(),
            });
        }
        let mut message = Vec::new();
        // Grows as bytes come: a length alone takes no memory.
        let read = (&self.stream).take(len).read_to_end(&mut message);
        read.map_err(|error| self.failed(error, doing))?;
        self.unread.store(0, Relaxed);
        if message.len() as u64 != len {
            return Err(self.failed(ErrorKind::UnexpectedEof.into(), doing));
        }
        Ok(message)
    }

    /// Begins to read the next message, which must have `len` bytes.
    pub fn expect(&self, len: usize, doing: &'static str) -> Result<()> {
        let got = self.next(doing)?;
        if got == len as u64 {
            return Ok(());
        }
        Err(RankError::Message {
            rank: self.peer,
            doing,
            expected: format!("{len} bytes"),
            got: got.to_string(),
        })
    }

    /// Reads a part of the message that was begun.
    pub fn part(&self, bytes: &mut [u8], doing: &'static str) -> Result<()> {
        self.read(bytes)
            .map_err(|error| self.failed(error, doing))?;
        self.unread.fetch_sub(bytes.len() as u64, Relaxed);
        Ok(())
    }

    /// Looks whether the other rank has ended, without waiting.
    pub fn look(&self, doing: &'static str) -> Result<()> {
        // Whoever sends waits by the same settings of the connection, and sees for itself.
        let Ok(_sending) = self.sending.try_lock() else {
            return Ok(());
        };
        let peek = || {
            self.stream.set_nonblocking(true)?;
            let seen = self.stream.peek(&mut [0]);
            self.stream.set_nonblocking(false)?;
            seen
        };
        let mut kind = [0];
        match peek() {
            Ok(0) => Err(self.failed(ErrorKind::UnexpectedEof.into(), doing)),
            // In the middle of a message any byte may come.
            Ok(_) if self.unread.load(Relaxed) > 0 => Ok(()),
            Ok(_) => match self.stream.peek(&mut kind) {
                Ok(_) if kind[0] == FAREWELL => self.next(doing).map(drop),
                _ => Ok(()),
            },
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(self.failed(error, doing)),
        }
    }

    /// Why a message could not be sent: what the other rank has said before it ended, if it has. Nobody reads from this
    /// connection meanwhile or later.
    pub fn explained(&self, error: RankError) -> RankError {
        let is_lost = matches!(error, RankError::Lost { .. });
        let said = is_lost.then(|| self.last_words()).flatten();
        said.unwrap_or(error)
    }

    fn last_words(&self) -> Option<RankError> {
        self.stream.set_read_timeout(Some(FAREWELL_LIMIT)).ok()?;
        loop {
            let rest = self.unread.swap(0, Relaxed);
            let skipped = io::copy(&mut (&self.stream).take(rest), &mut io::sink());
            skipped.ok().filter(|skipped| *skipped == rest)?;
            match self.next("") {
                Ok(_) => {}
                Err(error @ RankError::Told { .. }) => return Some(error),
                Err(_) => return None,
            }
        }
    }

    /// Says why this rank ends the run, if that can still be said, and closes the connection.
    pub fn farewell(&self, why: &str) {
        if let Ok(_sending) = self.sending.try_lock() {
            let _ = self.stream.set_write_timeout(Some(FAREWELL_LIMIT));
            let _ = self
                .write(&head(FAREWELL, why.len()))
                .and_then(|()| self.write(why.as_bytes()));
        }
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Reads the head of the next message: its length.
    fn next(&self, doing: &'static str) -> Result<u64> {
        let mut bytes = [0; HEAD];
        self.read(&mut bytes)
            .map_err(|error| self.failed(error, doing))?;
        let [kind, len @ ..] = bytes;
        let len = u64::from_le_bytes(len);
        match kind {
            CONTENT => {
                self.unread.store(len, Relaxed);
                Ok(len)
            }
            FAREWELL => {
                let mut text = Vec::new();
                // What cannot be read is not said.
                let _ = (&self.stream)
                    .take(len.min(MAX_FAREWELL))
                    .read_to_end(&mut text);
                Err(RankError::Told {
                    rank: self.peer,
                    message: String::from_utf8_lossy(&text).escape_debug().to_string(),
                })
            }
            kind => Err(RankError::Message {
                rank: self.peer,
                doing,
                expected: "a message".into(),
                got: format!("one of kind {kind}"),
            }),
        }
    }

    fn read(&self, bytes: &mut [u8]) -> io::Result<()> {
        (&self.stream).read_exact(bytes)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.stream).write_all(bytes)
    }

    fn failed(&self, error: io::Error, doing: &'static str) -> RankError {
        let rank = self.peer;
        match error.kind() {
            _ if is_late(&error) => RankError::Slow {
                rank,
                doing,
                seconds: self.limit.as_secs(),
            },
            ErrorKind::UnexpectedEof => RankError::Lost {
                rank,
                doing,
                reason: "it has ended, or its connection has".into(),
            },
            _ => RankError::Lost {
                rank,
                doing,
                reason: error.to_string(),
            },
        }
    }
}

/// Whether the time limit has passed.
fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn head(kind: u8, len: usize) -> [u8; HEAD] {
    let mut head = [kind; HEAD];
    head[1..].copy_from_slice(&(len as u64).to_le_bytes());
    head
}
