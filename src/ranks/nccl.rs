//! NCCL between GPUs: device memory to device memory. The library is loaded at run time.
//!
//! Only sends and receives are used: NCCL's own reductions add in an order that depends on the number of ranks.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use libloading::Library;

use super::engine::{Engine, Piece};
use super::error::{RankError, Result};
use super::mesh::Mesh;
use crate::device::gpu::cuda_driver::Cuda;
use crate::device::gpu::{self, Gpu};

/// Names of the library; `SEGATTN_NCCL` names another file.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// Bytes of the name by which ranks find each other.
const ID: usize = 128;
/// NCCL's number of f32 among its types.
const FLOAT32: c_int = 7;
/// Between two looks whether an exchange is done: short at first, then longer.
const PAUSES: [Duration; 2] = [Duration::from_micros(20), Duration::from_millis(5)];
/// Looks after which the pauses are long, and other ranks are looked at too.
const SHORT: usize = 500;

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
    /// Null once an exchange has failed.
    communicator: Mutex<Handle>,
}

struct Handle(Communicator);

// SAFETY: NCCL ties a communicator to a device, not to a thread; the mutex lets one thread use it at a time.
unsafe impl Send for Handle {}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Nccl({:?})", self.mesh)
    }
}

impl Nccl {
    /// Makes a communicator of all ranks, each on its own GPU. All ranks call it together. NCCL itself waits here for
    /// all of them, without a time limit.
    ///
    /// # Errors
    /// [`RankError::Library`] where NCCL is not there or refuses; [`RankError::SameDevice`]; as [`Mesh::gather`].
    pub fn new(mesh: Arc<Mesh>, gpu: &Gpu<Cuda>) -> Result<Self> {
        let functions = Functions::load().map_err(|error| RankError::Library {
            doing: "loading NCCL".into(),
            reason: error.to_string(),
        })?;
        bind(gpu)?;
        let mut id = UniqueId([0; ID]);
        if mesh.rank() == 0 {
            // SAFETY: the function writes an id.
            let code = unsafe { (functions.get_unique_id)(&mut id) };
            functions.check("naming the ranks", code)?;
        }
        let uuid = gpu.driver().stream().context().uuid();
        let uuid = uuid.map_err(|error| RankError::Library {
            doing: "telling the GPU".into(),
            reason: error.to_string(),
        })?;
        let mut message = id.0.map(|c| c as u8).to_vec();
        message.extend(uuid.bytes.map(|c| c as u8));
        let all = mesh.gather(&message, "NCCL is started")?;
        let gpus: Vec<&[u8]> = all
            .iter()
            .map(|message| &message[ID.min(message.len())..])
            .collect();
        if let Some(ranks) = sharing(&gpus) {
            return Err(RankError::SameDevice { ranks });
        }
        for (to, from) in id.0.iter_mut().zip(&all[0]) {
            *to = *from as c_char;
        }
        let mut communicator = ptr::null_mut();
        let [world, rank] = [mesh.world(), mesh.rank()].map(|n| n as c_int);
        // SAFETY: the function writes a communicator; this thread's device is the rank's GPU.
        let code = unsafe { (functions.init_rank)(&mut communicator, world, id, rank) };
        functions.check("starting NCCL", code)?;
        Ok(Self {
            mesh,
            functions,
            communicator: Mutex::new(Handle(communicator)),
        })
    }

    /// Queues the sends and receives of an exchange.
    fn queue(
        &self,
        communicator: Communicator,
        gpu: &Gpu<Cuda>,
        pieces: &[(u64, &Piece, bool)],
    ) -> Result<()> {
        let stream = gpu.driver().stream().cu_stream().cast();
        let functions = &self.functions;
        // SAFETY: the function only begins a group.
        functions.check("starting a group", unsafe { (functions.group_start)() })?;
        let mut done = Ok(());
        for (address, piece, sends) in pieces {
            let (len, peer) = (piece.range.len(), piece.peer as c_int);
            // SAFETY: the address is that of `len` f32 in a buffer of this GPU, which outlives the exchange.
            let code = unsafe {
                match sends {
                    true => (functions.send)(
                        *address as *const c_void,
                        len,
                        FLOAT32,
                        peer,
                        communicator,
                        stream,
                    ),
                    false => (functions.receive)(
                        *address as *mut c_void,
                        len,
                        FLOAT32,
                        peer,
                        communicator,
                        stream,
                    ),
                }
            };
            done = done.and_then(|()| functions.check("sending or receiving", code));
        }
        // SAFETY: the group was begun above.
        let ended = functions.check("ending a group", unsafe { (functions.group_end)() });
        done.and(ended)
    }

    /// Waits until the stream has done what is queued, and looks at the other ranks meanwhile.
    fn wait(&self, gpu: &Gpu<Cuda>, doing: &'static str) -> Result<()> {
        let (stream, began) = (gpu.driver().stream(), Instant::now());
        let event = stream
            .record_event(None)
            .map_err(|error| RankError::Library {
                doing: "recording an event".into(),
                reason: error.to_string(),
            })?;
        for look in 0.. {
            if event.is_complete() {
                break;
            }
            sleep(PAUSES[usize::from(look > SHORT)]);
            if look > SHORT {
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
        let mut handle = self
            .communicator
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if handle.0.is_null() {
            return Err(RankError::Library {
                doing: doing.into(),
                reason: "an exchange before has failed".into(),
            });
        }
        bind(gpu)?;
        let located = |piece, sends| -> Result<_> {
            let Piece { buffer, range, .. }: &Piece = piece;
            let address = gpu.exact_address(buffers[*buffer], range.clone())?;
            Ok((address, piece, sends))
        };
        let sends = sends.iter().map(|piece| located(piece, true));
        let pieces = sends.chain(receives.iter().map(|piece| located(piece, false)));
        let pieces = pieces.collect::<Result<Vec<_>>>()?;
        let done = self
            .queue(handle.0, gpu, &pieces)
            .and_then(|()| self.wait(gpu, doing));
        if let Err(error) = &done {
            self.mesh.end(&error.to_string());
            // SAFETY: the communicator is this one's, and not used again.
            unsafe { (self.functions.abort)(std::mem::replace(&mut handle.0, ptr::null_mut())) };
        }
        done
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        let handle = self
            .communicator
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if !handle.0.is_null() {
            // SAFETY: as above. All exchanges have ended, so nothing is lost.
            unsafe { (self.functions.abort)(handle.0) };
        }
    }
}

/// The first ranks that have the same one of these, which are given by rank.
fn sharing(devices: &[&[u8]]) -> Option<Vec<usize>> {
    let same = |device: &&[u8]| {
        let ranks = (0..devices.len()).filter(|rank| devices[*rank] == *device);
        Some(ranks.collect::<Vec<_>>()).filter(|ranks| ranks.len() > 1)
    };
    devices.iter().find_map(same)
}

fn bind(gpu: &Gpu<Cuda>) -> Result<()> {
    let bound = gpu.driver().stream().context().bind_to_thread();
    bound.map_err(|error| RankError::Library {
        doing: "choosing the GPU".into(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::sharing;

    #[test]
    fn ranks_on_one_gpu_are_found() {
        assert_eq!(sharing(&[b"a", b"b", b"c"]), None);
        assert_eq!(sharing(&[b"a", b"b", b"a", b"b"]), Some(vec![0, 2]));
    }
}
