//! NCCL between GPUs: device memory to device memory. The library is loaded at run time.
//!
//! Only sends and receives are used: NCCL's own reductions add in an order that depends on the number of ranks.

use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaEvent, CudaStream};
use libloading::Library;

use super::engine::{Engine, ON_THEIR_WAY, Piece};
use super::error::{RankError, Result};
use super::mesh::Mesh;
use crate::device::gpu::cuda_driver::Cuda;
use crate::device::gpu::{self, Gpu};

/// Names of the library; `SEGATTN_NCCL` names another file.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// Bytes of the name by which ranks find each other.
const ID: usize = 128;
/// NCCL's number of bytes among its types.
const UINT8: c_int = 1;
/// An exchange that is done within this time is awaited without pauses.
const SHORT: Duration = Duration::from_millis(2);
/// Then a pause between two looks whether it is done.
const PAUSE: Duration = Duration::from_micros(50);
/// So many pauses, and the other ranks are looked at too.
const LOOKS: usize = 100;

/// The name by which ranks find each other in NCCL.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; ID]);

type Communicator = *mut c_void;
type Stream = *mut c_void;

/// The functions that are used.
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut Communicator, c_int, UniqueId, c_int) -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Communicator, Stream) -> c_int,
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Communicator, Stream) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    abort: unsafe extern "C" fn(Communicator) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Keeps the functions loaded.
    _library: Library,
}

impl Functions {
    fn load() -> std::result::Result<Self, libloading::Error> {
        let named = std::env::var_os("SEGATTN_NCCL");
        // SAFETY: loading NCCL runs its constructors and nothing else.
        let open = |name: &std::ffi::OsStr| unsafe { Library::new(name) };
        let library = match named {
            Some(name) => open(&name)?,
            None => open(NAMES[0].as_ref()).or_else(|_| open(NAMES[1].as_ref()))?,
        };
        // SAFETY: the types are those of NCCL's interface, version 2, and the library stays loaded with them.
        unsafe {
            Ok(Self {
                get_unique_id: *library.get(b"ncclGetUniqueId\0")?,
                init_rank: *library.get(b"ncclCommInitRank\0")?,
                send: *library.get(b"ncclSend\0")?,
                receive: *library.get(b"ncclRecv\0")?,
                group_start: *library.get(b"ncclGroupStart\0")?,
                group_end: *library.get(b"ncclGroupEnd\0")?,
                abort: *library.get(b"ncclCommAbort\0")?,
                error_string: *library.get(b"ncclGetErrorString\0")?,
                _library: library,
            })
        }
    }

    fn check(&self, doing: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the function takes any number and returns a text that stays.
        let text = unsafe { CStr::from_ptr((self.error_string)(code)) };
        Err(RankError::Library {
            doing: doing.into(),
            reason: text.to_string_lossy().into_owned(),
        })
    }
}

/// Ranks on GPUs that exchange by NCCL. They meet by a [`Mesh`], by which a lost rank is noticed too.
pub struct Nccl {
    mesh: Arc<Mesh>,
    functions: Functions,
    /// One, or those of [`lane_of`]. What is queued on one waits for what was queued there before.
    lanes: Vec<Mutex<Lane>>,
}

/// A communicator of all ranks.
struct Lane {
    /// Null once an exchange has failed.
    communicator: Communicator,
    /// Of whole buffers, which go while the device computes.
    stream: Arc<CudaStream>,
    /// Buffers on their way to other ranks.
    sending: VecDeque<(CudaEvent, gpu::Buffer<Cuda>)>,
}

// SAFETY: NCCL ties a communicator to a device, not to a thread; the mutex lets one thread use it at a time.
unsafe impl Send for Lane {}

/// Device memory that goes to a rank or comes from there.
struct Transfer {
    address: u64,
    bytes: usize,
    peer: usize,
    sends: bool,
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Nccl({:?})", self.mesh)
    }
}

impl Nccl {
    /// Makes a communicator of all ranks, each on its own GPU. All ranks call it together. NCCL itself waits here for
    /// all of them, without a time limit. `both_ways`: neighbours send buffers to each other at a time, as stages in
    /// training do; then each way has a communicator of its own, since two that wait for each other on one would wait
    /// for ever.
    ///
    /// # Errors
    /// [`RankError::Library`] where NCCL is not there or refuses; [`RankError::SameDevice`]; as [`Mesh::gather`].
    pub fn new(mesh: Arc<Mesh>, gpu: &Gpu<Cuda>, both_ways: bool) -> Result<Self> {
        let functions = Functions::load().map_err(|e| library("loading NCCL", e))?;
        bind(gpu)?;
        let context = gpu.driver().stream().context();
        let uuid = context.uuid().map_err(|e| library("telling the GPU", e))?;
        let gpus = mesh.gather(&uuid.bytes.map(|c| c as u8), "NCCL is started")?;
        if let Some(ranks) = sharing(&gpus) {
            return Err(RankError::SameDevice { ranks });
        }
        let lanes = match both_ways {
            true => mesh.world().min(LANES),
            false => 1,
        };
        let lane = |_| -> Result<Mutex<Lane>> {
            let stream = context.new_stream();
            Ok(Mutex::new(Lane {
                communicator: functions.communicator(&mesh)?,
                stream: stream.map_err(|e| library("making a stream", e))?,
                sending: VecDeque::new(),
            }))
        };
        Ok(Self {
            lanes: (0..lanes).map(lane).collect::<Result<_>>()?,
            mesh,
            functions,
        })
    }

    /// The lane of buffers from one rank to another.
    fn lane(&self, from: usize, to: usize) -> Result<MutexGuard<'_, Lane>> {
        let lane = &self.lanes[lane_of(from, to).min(self.lanes.len() - 1)];
        let lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        match lane.communicator.is_null() {
            false => Ok(lane),
            true => Err(library("exchanging", "an exchange before has failed")),
        }
    }

    /// Waits until an event has come, and looks at the other ranks meanwhile.
    fn wait(&self, event: &CudaEvent, doing: &'static str) -> Result<()> {
        let began = Instant::now();
        for pauses in 1.. {
            while began.elapsed() < SHORT && !event.is_complete() {
                std::thread::yield_now();
            }
            let is_complete = event.try_is_complete();
            if is_complete.map_err(|e| library(doing, e))? {
                break;
            }
            sleep(PAUSE);
            if pauses % LOOKS == 0 {
                self.mesh.look(doing)?;
            }
            if began.elapsed() > self.mesh.limit() {
                // The others have the same trouble, and this one's name is as good as any.
                return Err(RankError::Slow {
                    rank: (self.mesh.rank() + 1) % self.mesh.world(),
                    doing,
                    seconds: self.mesh.limit().as_secs(),
                });
            }
        }
        Ok(())
    }

    /// After an error of `work` the others are told of it, and the lane is not used again.
    fn ended_on_error<T>(
        &self,
        lane: &mut Lane,
        work: impl FnOnce(&mut Lane) -> Result<T>,
    ) -> Result<T> {
        let done = work(lane);
        if let Err(error) = &done {
            self.mesh.end(&error.to_string());
            self.abort(lane);
        }
        done
    }

    fn abort(&self, lane: &mut Lane) {
        let communicator = std::mem::replace(&mut lane.communicator, ptr::null_mut());
        if !communicator.is_null() {
            // SAFETY: the communicator is this lane's, and not used again.
            unsafe { (self.functions.abort)(communicator) };
        }
    }

    /// Frees buffers that are sent, and waits until at most `most` are on their way.
    fn free_sent(&self, lane: &mut Lane, most: usize, doing: &'static str) -> Result<()> {
        while let Some((event, _)) = lane.sending.front() {
            if lane.sending.len() > most {
                self.wait(event, doing)?;
            } else if !event.is_complete() {
                break;
            }
            lane.sending.pop_front();
        }
        Ok(())
    }
}

impl Functions {
    /// A communicator of all ranks, which call it together.
    fn communicator(&self, mesh: &Mesh) -> Result<Communicator> {
        let mut id = UniqueId([0; ID]);
        if mesh.rank() == 0 {
            // SAFETY: the function writes an id.
            let code = unsafe { (self.get_unique_id)(&mut id) };
            self.check("naming the ranks", code)?;
        }
        let all = mesh.gather(&id.0.map(|c| c as u8), "NCCL is started")?;
        for (to, from) in id.0.iter_mut().zip(&all[0]) {
            *to = *from as c_char;
        }
        let mut communicator = ptr::null_mut();
        let [world, rank] = [mesh.world(), mesh.rank()].map(|n| n as c_int);
        // SAFETY: the function writes a communicator; this thread's device is the rank's GPU.
        let code = unsafe { (self.init_rank)(&mut communicator, world, id, rank) };
        self.check("starting NCCL", code)?;
        Ok(communicator)
    }

    /// Queues sends and receives on a stream.
    fn queue(
        &self,
        communicator: Communicator,
        stream: &CudaStream,
        transfers: &[Transfer],
    ) -> Result<()> {
        let stream = stream.cu_stream().cast();
        // SAFETY: the function only begins a group.
        self.check("starting a group", unsafe { (self.group_start)() })?;
        let mut done = Ok(());
        for transfer in transfers {
            let Transfer { address, bytes, .. } = *transfer;
            let peer = transfer.peer as c_int;
            // SAFETY: so many bytes of this GPU's memory, which outlive the exchange.
            let code = unsafe {
                match transfer.sends {
                    true => {
                        let from = address as *const c_void;
                        (self.send)(from, bytes, UINT8, peer, communicator, stream)
                    }
                    false => {
                        let to = address as *mut c_void;
                        (self.receive)(to, bytes, UINT8, peer, communicator, stream)
                    }
                }
            };
            done = done.and_then(|()| self.check("sending or receiving", code));
        }
        // SAFETY: the group was begun above.
        let ended = self.check("ending a group", unsafe { (self.group_end)() });
        done.and(ended)
    }
}

impl Engine<Gpu<Cuda>> for Nccl {
    fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    fn exchange(
        &self,
        gpu: &Gpu<Cuda>,
        buffers: &mut [&mut gpu::Buffer<Cuda>],
        sends: &[Piece],
        receives: &[Piece],
        doing: &'static str,
    ) -> Result<()> {
        let mut lane = self.lane(1, 0)?;
        bind(gpu)?;
        let located = |piece: &Piece, sends| -> Result<Transfer> {
            let range = piece.range.clone();
            Ok(Transfer {
                bytes: range.len() * size_of::<f32>(),
                address: gpu.exact_address(buffers[piece.buffer], range)?,
                peer: piece.peer,
                sends,
            })
        };
        let sends = sends.iter().map(|piece| located(piece, true));
        let transfers = sends.chain(receives.iter().map(|piece| located(piece, false)));
        let transfers = transfers.collect::<Result<Vec<_>>>()?;
        let stream = gpu.driver().stream();
        self.ended_on_error(&mut lane, |lane| {
            // What this communicator sends on its own stream comes first.
            let before = stream.join(&lane.stream);
            before.map_err(|e| library(doing, e))?;
            self.functions
                .queue(lane.communicator, stream, &transfers)?;
            let event = stream.record_event(None);
            self.wait(&event.map_err(|e| library(doing, e))?, doing)
        })
    }

    fn send(
        &self,
        gpu: &Gpu<Cuda>,
        buffer: gpu::Buffer<Cuda>,
        to: usize,
        doing: &'static str,
    ) -> Result<()> {
        let mut lane = self.lane(self.mesh.rank(), to)?;
        bind(gpu)?;
        let (address, bytes) = gpu.bytes_of(&buffer)?;
        self.ended_on_error(&mut lane, |lane| {
            let ready = lane.stream.join(gpu.driver().stream());
            ready.map_err(|e| library(doing, e))?;
            let transfer = Transfer {
                address,
                bytes,
                peer: to,
                sends: true,
            };
            self.functions
                .queue(lane.communicator, &lane.stream, &[transfer])?;
            let event = lane.stream.record_event(None);
            lane.sending
                .push_back((event.map_err(|e| library(doing, e))?, buffer));
            self.free_sent(lane, ON_THEIR_WAY, doing)
        })
    }

    fn receive(
        &self,
        gpu: &Gpu<Cuda>,
        buffer: &mut gpu::Buffer<Cuda>,
        from: usize,
        doing: &'static str,
    ) -> Result<()> {
        let mut lane = self.lane(from, self.mesh.rank())?;
        bind(gpu)?;
        let (address, bytes) = gpu.bytes_of(buffer)?;
        self.ended_on_error(&mut lane, |lane| {
            // The memory may have been another buffer's, which queued calls still use.
            let free = lane.stream.join(gpu.driver().stream());
            free.map_err(|e| library(doing, e))?;
            let transfer = Transfer {
                address,
                bytes,
                peer: from,
                sends: false,
            };
            self.functions
                .queue(lane.communicator, &lane.stream, &[transfer])?;
            let event = lane.stream.record_event(None);
            let event = event.map_err(|e| library(doing, e))?;
            let ordered = gpu.driver().stream().wait(&event);
            ordered.map_err(|e| library(doing, e))?;
            self.wait(&event, doing)
        })
    }

    fn finish(&self, doing: &'static str) -> Result<()> {
        for lane in &self.lanes {
            let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
            self.ended_on_error(&mut lane, |lane| self.free_sent(lane, 0, doing))?;
        }
        Ok(())
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        for lane in &self.lanes {
            let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
            if !lane.communicator.is_null() {
                // What does not arrive is seen by the rank that waits for it.
                let _ = self.free_sent(&mut lane, 0, "the last buffers are sent");
                self.abort(&mut lane);
            }
        }
    }
}

/// Most lanes of a rank.
const LANES: usize = 3;

/// The lane of buffers from one rank to another: to the next lower one, to the next higher one, or elsewhere.
fn lane_of(from: usize, to: usize) -> usize {
    match (from, to) {
        _ if from == to + 1 => 0,
        _ if from + 1 == to => 1,
        _ => 2,
    }
}

fn library(doing: &str, reason: impl ToString) -> RankError {
    RankError::Library {
        doing: doing.into(),
        reason: reason.to_string(),
    }
}

/// The first ranks that have the same one of these, which are given by rank.
fn sharing(devices: &[Vec<u8>]) -> Option<Vec<usize>> {
    let same = |device: &Vec<u8>| {
        let ranks = (0..devices.len()).filter(|rank| devices[*rank] == *device);
        Some(ranks.collect::<Vec<_>>()).filter(|ranks| ranks.len() > 1)
    };
    devices.iter().find_map(same)
}

fn bind(gpu: &Gpu<Cuda>) -> Result<()> {
    let bound = gpu.driver().stream().context().bind_to_thread();
    bound.map_err(|error| library("choosing the GPU", error))
}

#[cfg(test)]
mod tests {
    use super::sharing;

    #[test]
    fn ranks_on_one_gpu_are_found() {
        let gpus = |names: &[&str]| {
            sharing(
                &names
                    .iter()
                    .map(|n| n.as_bytes().to_vec())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(gpus(&["a", "b", "c"]), None);
        assert_eq!(gpus(&["a", "b", "a", "b"]), Some(vec![0, 2]));
    }
}
