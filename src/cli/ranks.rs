//! `--ranks`: several processes that train one model together. They are started here, or by torchrun, mpirun or srun.

use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::num::{NonZeroU64, NonZeroUsize};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use segattn::device::Device;
use segattn::ranks::{Mesh, Place, Ranks};

use super::device::Planned;
use super::signals::{interrupted, note_interrupts};

/// Most processes that are started on one machine.
const MOST: usize = 256;
/// Between two looks at the processes.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the others may take to say what they have seen, after one of them has failed.
const GRACE: Duration = Duration::from_secs(10);

/// How many processes train together.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct RanksArgs {
    /// Starts so many processes on this machine, which train together; changes no bit. Under torchrun, mpirun or srun,
    /// which start the processes themselves, it may be left out
    #[arg(long, value_name = "N")]
    ranks: Option<NonZeroUsize>,
    /// Starts so many processes on this machine, each with a part of the model's layers, which train together; changes
    /// no bit. For models that do not fit one GPU, and for long sequences: the parts work on different segments at a
    /// time. Under a launcher it says that its processes are stages
    #[arg(long, value_name = "N")]
    stages: Option<NonZeroUsize>,
    #[command(flatten)]
    links: LinkArgs,
}

/// How processes meet and exchange.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct LinkArgs {
    /// Seconds that a process may keep the others waiting: then the run ends
    #[arg(long, value_name = "S", default_value = "600")]
    rank_timeout: NonZeroU64,
    /// How processes exchange what lies on GPUs
    #[arg(long, value_enum, default_value_t)]
    rank_engine: EngineName,
}

/// What moves buffers between processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineName {
    /// By way of host memory.
    #[default]
    Host,
    /// From GPU to GPU by NCCL, which is loaded from the system's folders or from SEGATTN_NCCL.
    Nccl,
}

/// This process among those of a run.
#[derive(Debug, Clone)]
pub struct Party {
    mesh: Option<Arc<Mesh>>,
    engine: EngineName,
    local_rank: usize,
    /// Whether each process has a part of the layers, instead of sequences of its own.
    stages: bool,
}

impl RanksArgs {
    /// What this process is to do: its part in the run, or, if it started the others, what has become of them.
    pub fn start(&self) -> Result<Option<Party>> {
        match (self.ranks, self.stages) {
            (Some(ranks), Some(stages)) => bail!(
                "--ranks, --stages: expected one of them, since a run is spread by sequences or by layers, not yet by \
                 both; got {ranks} and {stages}"
            ),
            (ranks, None) => self.links.start("--ranks", ranks),
            (None, stages) => {
                let party = self.links.start("--stages", stages)?;
                Ok(party.map(|party| Party {
                    stages: party.mesh.is_some(),
                    ..party
                }))
            }
        }
    }
}

impl LinkArgs {
    /// What this process is to do where `flag` asks for so many processes: its part, or, if it started the others, what
    /// has become of them.
    pub fn start(&self, flag: &str, wanted: Option<NonZeroUsize>) -> Result<Option<Party>> {
        let place = Place::from_env()?;
        let wanted = wanted.map(NonZeroUsize::get);
        match (place, wanted) {
            (Some(place), _) => {
                ensure!(
                    wanted.is_none_or(|wanted| wanted == place.world),
                    "{flag}: expected {}, the number of processes that the launcher has started, got {}",
                    place.world,
                    wanted.unwrap_or_default()
                );
                let limit = Duration::from_secs(self.rank_timeout.get());
                let mesh = Mesh::connect(&place, limit);
                let mesh = mesh.with_context(|| format!("rank {}", place.rank))?;
                Ok(Some(Party {
                    mesh: (place.world > 1).then(|| Arc::new(mesh)),
                    engine: self.rank_engine,
                    local_rank: place.local_rank,
                    stages: false,
                }))
            }
            (None, None | Some(1)) => Ok(Some(Party::alone())),
            (None, Some(wanted)) => {
                ensure!(
                    wanted <= MOST,
                    "{flag}: expected at most {MOST}, got {wanted}"
                );
                launch(wanted)?;
                Ok(None)
            }
        }
    }
}

impl Party {
    /// One process.
    pub fn alone() -> Self {
        Self {
            mesh: None,
            engine: EngineName::Host,
            local_rank: 0,
            stages: false,
        }
    }

    /// Whether this process writes, reports and asks for all.
    pub fn leads(&self) -> bool {
        self.mesh.as_ref().is_none_or(|mesh| mesh.rank() == 0)
    }

    /// The number of its GPU.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// Number of processes.
    pub fn world(&self) -> usize {
        self.mesh().map_or(1, Mesh::world)
    }

    /// Whether each process has a part of the model's layers, instead of sequences of its own.
    pub fn shares_layers(&self) -> bool {
        self.stages
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.mesh().map_or(0, Mesh::rank)
    }

    /// The connections to the others, if there are any.
    pub fn mesh(&self) -> Option<&Mesh> {
        self.mesh.as_deref()
    }

    /// The ranks for this device.
    pub fn ranks<D: Planned>(&self, device: &D) -> Result<Ranks<D>> {
        match &self.mesh {
            Some(mesh) => device.ranks(mesh, self.engine, self.stages),
            None => Ok(Ranks::alone()),
        }
    }

    /// The ranks for a trainer that only plans.
    pub fn planned<D: Device>(&self) -> Ranks<D> {
        Ranks::planned(self.rank(), self.world())
    }

    /// Returns once all processes are here.
    pub fn wait(&self, doing: &'static str) -> Result<()> {
        self.mesh()
            .map_or(Ok(()), |mesh| Ok(mesh.gather(&[], doing).map(drop)?))
    }

    /// Does this process's part of the run. If it fails, the others learn why, and the error says whose it is.
    pub fn take_part<T>(&self, part: impl FnOnce() -> Result<T>) -> Result<T> {
        let done = part();
        let (Err(error), Some(mesh)) = (&done, self.mesh()) else {
            return done;
        };
        mesh.end(&format!("{error:#}"));
        done.with_context(|| format!("rank {}", mesh.rank()))
    }
}

/// Starts `count` processes with this one's arguments and waits for them.
fn launch(count: usize) -> Result<()> {
    note_interrupts(None);
    // Free now, and hardly anybody else's a moment later.
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let run = format!("{:016x}", RandomState::new().hash_one(std::process::id()));
    let cores = available_parallelism().map_or(1, usize::from);
    let mut started = Vec::new();
    for rank in 0..count {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1));
        for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)] {
            command.env(name, value.to_string());
        }
        command.env("MASTER_ADDR", "127.0.0.1");
        command.env("MASTER_PORT", port.to_string());
        command.env("SEGATTN_RUN", &run);
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            command.env("RAYON_NUM_THREADS", (cores / count).max(1).to_string());
        }
        if rank > 0 {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        }
        apart(&mut command);
        match command.spawn() {
            Ok(child) => started.push(Some(child)),
            Err(error) => {
                end(&mut started);
                return Err(error).with_context(|| format!("cannot start rank {rank}"));
            }
        }
    }
    watch(started)
}

/// Waits for the processes. Once one has failed the others may say what they have seen, then they are ended.
fn watch(mut started: Vec<Option<Child>>) -> Result<()> {
    let (mut failed, mut told): (Option<(usize, ExitStatus, Instant)>, bool) = (None, false);
    while started.iter().any(Option::is_some) {
        for (rank, child) in started.iter_mut().enumerate() {
            let Some(status) = child.as_mut().map(Child::try_wait).transpose()?.flatten() else {
                continue;
            };
            *child = None;
            if !status.success() && failed.is_none() {
                failed = Some((rank, status, Instant::now()));
            }
        }
        if interrupted() && !told {
            told = true;
            started.iter().flatten().for_each(interrupt);
        }
        if failed.is_some_and(|(_, _, when)| when.elapsed() > GRACE) {
            end(&mut started);
        }
        sleep(PAUSE);
    }
    match failed {
        Some((rank, status, _)) => bail!("rank {rank} has failed first: {status}"),
        None => Ok(()),
    }
}

fn end(started: &mut [Option<Child>]) {
    for mut child in started.iter_mut().filter_map(Option::take) {
        // One that has ended by itself is as good.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Ctrl-C at a terminal goes to this process, which hands it on once; and the processes end with this one.
#[cfg(unix)]
fn apart(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    #[cfg(target_os = "linux")]
    {
        let follow = || {
            // SAFETY: prctl with these arguments only sets a number of the calling process.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) };
            Ok(())
        };
        // SAFETY: the closure makes one async-signal-safe call and takes no memory.
        unsafe { command.pre_exec(follow) };
    }
}

#[cfg(not(unix))]
fn apart(_: &mut Command) {}

#[cfg(unix)]
fn interrupt(child: &Child) {
    // SAFETY: the process is this one's child and has not been waited for.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
}

#[cfg(not(unix))]
fn interrupt(_: &Child) {}
