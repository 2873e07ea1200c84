//! What moves parts of device buffers between ranks.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::error::Result;
use super::mesh::Mesh;
use crate::device::Device;

/// A part of a buffer that goes to another rank or comes from there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The other rank.
    pub peer: usize,
    /// Index of the buffer in the list of an exchange.
    pub buffer: usize,
    /// Its elements.
    pub range: Range<usize>,
}

/// Buffers on their way to a rank before a further one waits: enough for a neighbour that is busy for a while.
pub const ON_THEIR_WAY: usize = 2;

/// Moves buffers, and parts of those of f32 ([`Kind::Exact`](crate::device::Kind::Exact)), between ranks.
pub trait Engine<D: Device>: Debug + Send + Sync {
    /// The connections by which the ranks have met.
    fn mesh(&self) -> &Mesh;

    /// Sends and receives pieces of `buffers`, without changing a bit. All ranks call it together. The pieces that one
    /// rank sends to another are, in order, those that the other one receives from it. No piece that is received
    /// overlaps another piece.
    ///
    /// # Errors
    /// As [`Mesh::gather`], and what the device says.
    fn exchange(
        &self,
        device: &D,
        buffers: &mut [&mut D::Buffer],
        sends: &[Piece],
        receives: &[Piece],
        doing: &'static str,
    ) -> Result<()>;

    /// Sends a buffer of any kind to one rank, after those before. Does not wait until it is there, but while more than
    /// [`ON_THEIR_WAY`] are on their way.
    ///
    /// # Errors
    /// As [`Mesh::post`], and what the device says.
    fn send(&self, device: &D, buffer: D::Buffer, to: usize, doing: &'static str) -> Result<()>;

    /// Fills a buffer with the next one that a rank has sent, of the same kind and length, without changing a bit.
    ///
    /// # Errors
    /// As [`Mesh::gather`], and what the device says.
    fn receive(
        &self,
        device: &D,
        buffer: &mut D::Buffer,
        from: usize,
        doing: &'static str,
    ) -> Result<()>;

    /// Waits until no buffer that was sent takes memory of the device any more.
    ///
    /// # Errors
    /// As [`Mesh::gather`], and what the device says.
    fn finish(&self, _doing: &'static str) -> Result<()> {
        Ok(())
    }
}

/// By way of host memory: for every device whose exact elements are f32.
impl<D: Device> Engine<D> for Mesh {
    fn mesh(&self) -> &Mesh {
        self
    }

    fn exchange(
        &self,
        device: &D,
        buffers: &mut [&mut D::Buffer],
        sends: &[Piece],
        receives: &[Piece],
        doing: &'static str,
    ) -> Result<()> {
        let read = |piece: &Piece| Ok(device.read(buffers[piece.buffer], piece.range.clone())?);
        let values: Vec<Vec<f32>> = sends.iter().map(read).collect::<Result<_>>()?;
        let mut parts: Vec<Vec<&[u8]>> = vec![Vec::new(); self.world()];
        for (piece, values) in sends.iter().zip(&values) {
            parts[piece.peer].push(bytemuck::cast_slice(values));
        }
        let mut lens = vec![0; self.world()];
        for piece in receives {
            lens[piece.peer] += piece.range.len() * size_of::<f32>();
        }
        self.swap(&parts, &lens, doing, |rank, next| {
            for piece in receives.iter().filter(|piece| piece.peer == rank) {
                let mut values = vec![0f32; piece.range.len()];
                next(bytemuck::cast_slice_mut(&mut values))?;
                device.write(buffers[piece.buffer], piece.range.start, &values)?;
            }
            Ok(())
        })
    }

    fn send(&self, device: &D, buffer: D::Buffer, to: usize, doing: &'static str) -> Result<()> {
        // f32 holds every number of a device of 16 or 32 bits.
        let values = device.read(&buffer, 0..device.len(&buffer))?;
        self.post(to, bytemuck::cast_slice(&values).to_vec(), doing)
    }

    fn receive(
        &self,
        device: &D,
        buffer: &mut D::Buffer,
        from: usize,
        doing: &'static str,
    ) -> Result<()> {
        let mut values = vec![0f32; device.len(buffer)];
        self.fill(from, bytemuck::cast_slice_mut(&mut values), doing)?;
        Ok(device.write(buffer, 0, &values)?)
    }
}

impl<D: Device> Engine<D> for Arc<Mesh> {
    fn mesh(&self) -> &Mesh {
        self
    }

    fn exchange(
        &self,
        device: &D,
        buffers: &mut [&mut D::Buffer],
        sends: &[Piece],
        receives: &[Piece],
        doing: &'static str,
    ) -> Result<()> {
        Engine::exchange(&**self, device, buffers, sends, receives, doing)
    }

    fn send(&self, device: &D, buffer: D::Buffer, to: usize, doing: &'static str) -> Result<()> {
        Engine::send(&**self, device, buffer, to, doing)
    }

    fn receive(
        &self,
        device: &D,
        buffer: &mut D::Buffer,
        from: usize,
        doing: &'static str,
    ) -> Result<()> {
        Engine::receive(&**self, device, buffer, from, doing)
    }
}

/// The ranks of a run, as one of them sees them.
#[derive(Debug)]
pub struct Ranks<D: Device> {
    rank: usize,
    world: usize,
    /// `None` for one rank alone, and for a plan of several.
    engine: Option<Box<dyn Engine<D>>>,
}

impl<D: Device> Ranks<D> {
    /// One rank alone.
    pub fn alone() -> Self {
        Self::planned(0, 1)
    }

    /// Rank `rank` of `world`, for dry runs: nothing is exchanged.
    pub fn planned(rank: usize, world: usize) -> Self {
        Self {
            rank,
            world,
            engine: None,
        }
    }

    /// Ranks that have met.
    pub fn new(engine: impl Engine<D> + 'static) -> Self {
        let (rank, world) = (engine.mesh().rank(), engine.mesh().world());
        Self {
            rank,
            world,
            engine: (world > 1).then(|| Box::new(engine) as Box<dyn Engine<D>>),
        }
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.world
    }

    /// The connections to the other ranks, if there are any.
    pub fn mesh(&self) -> Option<&Mesh> {
        self.engine.as_ref().map(|engine| engine.mesh())
    }

    /// The numbers of all ranks, in the order of the ranks.
    ///
    /// # Errors
    /// As [`Mesh::gather`].
    pub fn concat(&self, mine: Vec<f64>, doing: &'static str) -> Result<Vec<f64>> {
        Ok(self.lists(mine, doing)?.concat())
    }

    /// The numbers of each rank, by rank; of a plan this rank's alone.
    ///
    /// # Errors
    /// As [`Mesh::gather`].
    pub fn lists(&self, mine: Vec<f64>, doing: &'static str) -> Result<Vec<Vec<f64>>> {
        let Some(mesh) = self.mesh() else {
            return Ok(vec![mine]);
        };
        let all = mesh.gather(bytemuck::cast_slice(&mine), doing)?;
        // Messages lie at any address.
        let numbers = |bytes: Vec<u8>| bytemuck::pod_collect_to_vec::<u8, f64>(&bytes);
        Ok(all.into_iter().map(numbers).collect())
    }

    /// As [`Engine::exchange`]; nothing for one rank and for a plan.
    ///
    /// # Errors
    /// As [`Engine::exchange`].
    pub fn exchange(
        &self,
        device: &D,
        buffers: &mut [&mut D::Buffer],
        sends: &[Piece],
        receives: &[Piece],
        doing: &'static str,
    ) -> Result<()> {
        match &self.engine {
            Some(engine) => engine.exchange(device, buffers, sends, receives, doing),
            None => Ok(()),
        }
    }

    /// As [`Engine::send`]; the buffer is dropped where there is no other rank.
    ///
    /// # Errors
    /// As [`Engine::send`].
    pub fn send(
        &self,
        device: &D,
        buffer: D::Buffer,
        to: usize,
        doing: &'static str,
    ) -> Result<()> {
        match &self.engine {
            Some(engine) => engine.send(device, buffer, to, doing),
            None => Ok(()),
        }
    }

    /// As [`Engine::finish`].
    ///
    /// # Errors
    /// As [`Engine::finish`].
    pub fn finish(&self, doing: &'static str) -> Result<()> {
        match &self.engine {
            Some(engine) => engine.finish(doing),
            None => Ok(()),
        }
    }

    /// Says yes or no to one rank, after what was said and sent there before.
    ///
    /// # Errors
    /// As [`Mesh::post`].
    pub fn tell(&self, to: usize, yes: bool, doing: &'static str) -> Result<()> {
        match self.mesh() {
            Some(mesh) => mesh.post(to, vec![u8::from(yes)], doing),
            None => Ok(()),
        }
    }

    /// What a rank has said by [`Ranks::tell`]; yes where there is no other rank.
    ///
    /// # Errors
    /// As [`Mesh::gather`].
    pub fn hear(&self, from: usize, doing: &'static str) -> Result<bool> {
        let mut said = [1];
        if let Some(mesh) = self.mesh() {
            mesh.fill(from, &mut said, doing)?;
        }
        Ok(said != [0])
    }

    /// As [`Engine::receive`]; nothing where there is no other rank.
    ///
    /// # Errors
    /// As [`Engine::receive`].
    pub fn receive(
        &self,
        device: &D,
        buffer: &mut D::Buffer,
        from: usize,
        doing: &'static str,
    ) -> Result<()> {
        match &self.engine {
            Some(engine) => engine.receive(device, buffer, from, doing),
            None => Ok(()),
        }
    }
}
