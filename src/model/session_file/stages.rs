//! Sessions of a model over several processes (`model::stage`), saved to one file and restored from it. Rank 0 writes
//! what all stages have, in the order of one process; every stage reads its own layers.

use std::cmp::Reverse;
use std::path::Path;

use super::layout::{self, Part};
use super::{Origin, StateFile, StateFileError};
use crate::device::{Device, DeviceError, Result};
use crate::model::session::Session;
use crate::ranks::RankError;

/// While rank 0 writes what the others have.
const SAVING: &str = "rank 0 saves the state of all stages";

/// A tensor of a file.
pub(super) struct Saved {
    /// Who has it.
    rank: usize,
    pub sequence: usize,
    /// By the numbers of layers there.
    there: Part,
    /// By those of the whole model.
    pub part: Part,
    pub shape: Vec<usize>,
}

/// Tensors of a stage: sequence, part, shape; and the number of the stage's first layer.
type Listed = (usize, Vec<(usize, Part, Vec<usize>)>);

/// Every tensor of all stages, in the file's order. The others send theirs after it, in that order.
pub(super) fn all<D: Device>(session: &Session<'_, D>, origin: Origin<'_>) -> Result<Vec<Saved>> {
    let mut stages: Vec<Listed> = session.save_on_others()?;
    stages.insert(0, listed(session, origin));
    let mut all = Vec::new();
    for (rank, (first, parts)) in stages.into_iter().enumerate() {
        all.extend(parts.into_iter().map(|(sequence, there, shape)| Saved {
            rank,
            sequence,
            there,
            part: there.behind(first),
            shape,
        }));
    }
    // The highest rank has the first layers.
    all.sort_by_key(|saved| {
        let kind = match saved.part {
            Part::Logits | Part::Tokens => 0,
            Part::Selected(..) => 2,
            _ => 1,
        };
        (saved.sequence, kind, Reverse(saved.rank))
    });
    Ok(all)
}

fn listed<D: Device>(session: &Session<'_, D>, origin: Origin<'_>) -> Listed {
    let first = session.model.config.part.first_layer;
    (first, layout::parts(session, origin))
}

/// The values of the next tensor of [`all`], little endian.
pub(super) fn bytes<D: Device>(
    session: &Session<'_, D>,
    origin: Origin<'_>,
    saved: &Saved,
) -> Result<Vec<u8>> {
    match session.model.stage.mesh() {
        Some(mesh) if saved.rank > 0 => {
            let bytes = mesh.await_message(saved.rank, SAVING)?;
            let expected = saved.part.bytes(&saved.shape);
            if bytes.len() != expected {
                return Err(DeviceError::from(RankError::Message {
                    rank: saved.rank,
                    doing: SAVING,
                    expected: format!("{expected} bytes of {}", saved.part.name(saved.sequence)),
                    got: bytes.len().to_string(),
                }));
            }
            Ok(bytes)
        }
        _ => layout::bytes(session, origin, saved.sequence, saved.there),
    }
}

/// Sends rank 0 the tensors of this stage, after their list.
pub(in crate::model) fn send<D: Device>(session: &Session<'_, D>) -> Result<()> {
    let (origin, listed) = (Origin::default(), listed(session, Origin::default()));
    session.answer(&listed)?;
    let Some(mesh) = session.model.stage.mesh() else {
        return Ok(());
    };
    for (sequence, part, _) in listed.1 {
        let bytes = layout::bytes(session, origin, sequence, part)?;
        mesh.post(0, bytes, SAVING)?;
    }
    Ok(())
}

/// Restores this stage's layers of a file that rank 0 has found to fit.
pub(in crate::model) fn restore<D: Device>(
    session: &mut Session<'_, D>,
    path: &Path,
) -> Result<()> {
    let restored = StateFile::open(path).and_then(|mut file| file.restore_all(session));
    restored.map_err(|error| match error {
        StateFileError::Device(error) => error,
        error => DeviceError::argument("saved state", "the file that rank 0 has", error),
    })
}
