//! Sessions of a model over several processes (`model::stage`). The rank with the last stage leads: before it reads
//! tokens it tells the others which, and they do the same with theirs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Feed, SelectedTokens, Session};
use crate::device::{Device, DeviceError, Result};
use crate::model::decoder::Decoder;
use crate::model::parameters::index;
use crate::model::segmentation::Tokens;
use crate::model::session_file::stages;
use crate::model::stage::DISMISSAL;
use crate::ranks::RankError;

/// While the others wait for the first rank's next command.
const WAITING: &str = "rank 0 says what to read next";
/// While it waits for what it has asked.
const ANSWERING: &str = "the stages answer rank 0";

/// What the other stages are to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Command {
    /// As [`Session::new`].
    Open {
        sequences: usize,
        longest: usize,
        segments_per_step: usize,
    },
    /// As [`Session::feed`], without targets: sequences, and their tokens.
    Feed(Vec<(usize, Tokens)>),
    /// As [`Session::decode`].
    Decode(Vec<(usize, u32)>),
    /// As [`Session::restart`].
    Restart(usize),
    /// As [`Session::selected`]; the others answer.
    Selected(usize),
    /// As [`Session::replace_selected`].
    Select(usize, Vec<SelectedTokens>),
    /// The others answer with their gates.
    Gates,
    /// The others send what a file of the state has of them.
    Save,
    /// The others restore their layers from this file.
    Restore(PathBuf),
    /// The session is not needed any more.
    Close,
}

/// A session's number, which all stages give it; on the rank that leads, dropping it ends the session on the others.
#[derive(Debug)]
pub(super) struct Told<'m, D: Device> {
    model: &'m Decoder<D>,
    number: u64,
}

impl<'m, D: Device> Told<'m, D> {
    pub fn open(model: &'m Decoder<D>, command: &Command) -> Result<Self> {
        let number = model.stage.next_session();
        let told = Self { model, number };
        told.tell(command)?;
        Ok(told)
    }

    /// Tells the other stages, where there are any and this one leads.
    pub fn tell(&self, command: &Command) -> Result<()> {
        let Some(mesh) = self.model.stage.followers() else {
            return Ok(());
        };
        let message = serde_json::to_vec(&(self.number, command)).expect("numbers and names");
        for rank in 1..mesh.world() {
            mesh.post(rank, message.clone(), WAITING)?;
        }
        Ok(())
    }

    /// What each of the other stages answers, where there are any and this one leads.
    pub fn answers<T: DeserializeOwned>(&self) -> Result<Vec<T>> {
        let Some(mesh) = self.model.stage.followers() else {
            return Ok(Vec::new());
        };
        let answer = |rank| -> Result<T> {
            let answer = mesh.await_message(rank, ANSWERING)?;
            let parsed = serde_json::from_slice(&answer);
            Ok(parsed.map_err(|error| RankError::Message {
                rank,
                doing: ANSWERING,
                expected: "an answer".into(),
                got: error.to_string(),
            })?)
        };
        (1..mesh.world()).map(answer).collect()
    }

    /// Ends the run of all stages after an error: the others are where this one is not.
    pub fn fail(&self, error: &DeviceError) {
        if let Some(mesh) = self.model.stage.mesh() {
            mesh.end(&error.to_string());
        }
    }
}

impl<D: Device> Drop for Told<'_, D> {
    fn drop(&mut self) {
        // Who has an error has told it.
        let _ = self.tell(&Command::Close);
    }
}

/// Reads `tokens` tokens with this stage alone, before it has neighbours. At first use a GPU loads kernels and compares
/// algorithms of products. All stages do so at the same time then; without a rehearsal each waits for the one before.
///
/// # Errors
/// Those of the device.
pub fn rehearse<D: Device>(model: &Decoder<D>, tokens: usize) -> Result<()> {
    super::score(model, &vec![0; tokens], 1).map(drop)
}

/// Reads what rank 0 reads, with this rank's stage of the model, until rank 0 says that nothing more comes.
///
/// # Errors
/// [`DeviceError::Exchange`] where another rank is lost, or what the device says.
pub fn follow<D: Device>(model: &Decoder<D>) -> Result<()> {
    let mut sessions: HashMap<u64, Session<'_, D>> = HashMap::new();
    let Some(mesh) = model.stage.mesh() else {
        return Ok(());
    };
    loop {
        let message = mesh.await_message(0, WAITING)?;
        if message == DISMISSAL {
            return Ok(());
        }
        let wrong = |got: String| RankError::Message {
            rank: 0,
            doing: WAITING,
            expected: "a command for one of its sessions".into(),
            got,
        };
        let (number, command): (u64, Command) =
            serde_json::from_slice(&message).map_err(|e| wrong(e.to_string()))?;
        let done = obey(model, &mut sessions, number, &command);
        if let Err(error) = &done {
            mesh.end(&error.to_string());
        }
        if !done? {
            return Err(wrong(format!("session {number}")).into());
        }
    }
}

/// Whether the session was known.
fn obey<'m, D: Device>(
    model: &'m Decoder<D>,
    sessions: &mut HashMap<u64, Session<'m, D>>,
    number: u64,
    command: &Command,
) -> Result<bool> {
    if let Command::Open {
        sequences,
        longest,
        segments_per_step,
    } = *command
    {
        let session = Session::new(model, sequences, longest, segments_per_step)?;
        sessions.insert(number, session);
        return Ok(true);
    }
    let Some(session) = sessions.get_mut(&number) else {
        return Ok(false);
    };
    match command {
        Command::Open { .. } => {}
        Command::Feed(feeds) => {
            let feeds = feeds.iter().map(|(sequence, tokens)| Feed {
                sequence: *sequence,
                tokens: &tokens.ids,
                targets: &[],
                breaks: &tokens.breaks,
                rereads: &tokens.rereads,
            });
            session.feed(&feeds.collect::<Vec<_>>())?;
        }
        Command::Decode(next) => session.pass_on_decoding(next)?,
        Command::Restart(sequence) => session.restart(*sequence)?,
        Command::Selected(sequence) => session.answer(&session.own_selected(*sequence)?)?,
        Command::Select(sequence, selected) => {
            session.replace_own_selected(*sequence, selected)?;
        }
        Command::Gates => session.answer(&session.own_gates())?,
        Command::Save => stages::send(session)?,
        Command::Restore(path) => stages::restore(session, path)?,
        Command::Close => drop(sessions.remove(&number)),
    }
    Ok(true)
}

impl<D: Device> Session<'_, D> {
    /// Answers what rank 0 has asked.
    pub(in crate::model) fn answer(&self, answer: &impl Serialize) -> Result<()> {
        let message = serde_json::to_vec(answer).expect("numbers and names");
        match self.model.stage.mesh() {
            Some(mesh) => Ok(mesh.post(0, message, ANSWERING)?),
            None => Ok(()),
        }
    }

    /// The past gates of all layers, in their order, also where other stages have them.
    pub(in crate::model) fn all_gates(&self) -> Result<Vec<f32>> {
        self.told.tell(&Command::Gates)?;
        let mut stages: Vec<Vec<u32>> = self.told.answers()?;
        stages.insert(0, self.own_gates());
        // The highest rank has the first layers.
        let bits = stages.iter().rev().flatten();
        Ok(bits.map(|bits| f32::from_bits(*bits)).collect())
    }

    /// Bits of the gates that are here.
    fn own_gates(&self) -> Vec<u32> {
        let layers = 0..self.model.config.num_hidden_layers;
        let gates = layers.flat_map(|l| self.model.weights.gate(index::past_gate(l)));
        gates.map(|gate| gate.to_bits()).collect()
    }

    /// What the other stages have for a file of the state, by rank; they send it after that.
    pub(in crate::model) fn save_on_others<T: DeserializeOwned>(&self) -> Result<Vec<T>> {
        self.told.tell(&Command::Save)?;
        self.told.answers()
    }

    /// The other stages restore their layers from a file.
    pub(in crate::model) fn restore_on_others(&self, path: &Path) -> Result<()> {
        if path.to_str().is_none() && self.model.stage.followers().is_some() {
            let expected = "a name in UTF-8 where several processes read it";
            return Err(DeviceError::argument(
                "saved state",
                expected,
                path.display(),
            ));
        }
        self.told.tell(&Command::Restore(path.to_owned()))
    }
}
