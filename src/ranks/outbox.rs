//! Messages that a thread sends to another rank, one after the other, while this one goes on.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::engine::ON_THEIR_WAY;
use super::error::{RankError, Result};
use super::link::Link;

type Message = (Vec<u8>, &'static str);

/// What waits to be sent on one connection.
#[derive(Debug, Default)]
pub(super) struct Outbox(Mutex<Option<Sending>>);

#[derive(Debug)]
struct Sending {
    messages: SyncSender<Message>,
    thread: JoinHandle<Result<()>>,
}

impl Outbox {
    /// Sends a message after those before. Waits only where too many are waiting.
    pub fn post(&self, link: &Arc<Link>, message: Vec<u8>, doing: &'static str) -> Result<()> {
        let mut outbox = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if outbox.is_none() {
            *outbox = Some(Sending::start(link.clone())?);
        }
        let sent = match &*outbox {
            Some(sending) => sending.messages.send((message, doing)).is_ok(),
            None => false,
        };
        match sent {
            true => Ok(()),
            // The thread ends early only where it could not send.
            false => outbox.take().map_or(Ok(()), Sending::finish),
        }
    }

    /// Waits until everything is sent.
    pub fn flush(&self) -> Result<()> {
        let mut outbox = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        outbox.take().map_or(Ok(()), Sending::finish)
    }
}

impl Sending {
    fn start(link: Arc<Link>) -> Result<Self> {
        let (messages, waiting) = sync_channel::<Message>(ON_THEIR_WAY);
        let send = move || {
            let mut waiting = waiting.into_iter();
            waiting.try_for_each(|(message, doing)| link.send(&[&message], doing))
        };
        let thread = std::thread::Builder::new().spawn(send);
        Ok(Self {
            messages,
            thread: thread.map_err(|e| RankError::io("start a thread", e))?,
        })
    }

    fn finish(self) -> Result<()> {
        drop(self.messages);
        let sent = self.thread.join();
        sent.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
