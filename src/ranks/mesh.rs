//! The ranks' connections: each has one to each other.
//!
//! Rank 0 listens at the address that all know. The others introduce themselves there and say where they listen
//! themselves; once all are there, rank 0 sends that list, and each connects to those of lower rank.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::{RankError, Result};
use super::link::Link;
use super::outbox::Outbox;
use super::place::Place;

/// What the ranks do while they meet.
const MEETING: &str = "the ranks meet";
/// First word of an introduction: protocol and its version.
const PROTOCOL: &str = "segattn ranks 1";
/// Longest introduction, in bytes.
const MAX_HELLO: usize = 1 << 12;
/// How long whoever connects may take to introduce itself.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// Between two tries to connect or to accept.
const PAUSE: Duration = Duration::from_millis(10);
/// Messages up to this size are written at once: a connection holds them whether the other one reads or not.
const SMALL: usize = 1 << 12;

/// How a rank introduces itself.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    protocol: String,
    run: String,
    rank: usize,
    world: usize,
    /// Where it listens for those of higher rank.
    port: u16,
}

/// This rank's connections to all others.
#[derive(Debug)]
pub struct Mesh {
    rank: usize,
    /// By rank; `None` at its own place.
    links: Vec<Option<Arc<Link>>>,
    /// What waits to be sent, by rank.
    outboxes: Vec<Outbox>,
    limit: Duration,
    /// Whether the others were told that the run has ended.
    ended: AtomicBool,
}

/// Longer limits are this one, which a clock's time can be added to.
const LONGEST: Duration = Duration::from_secs(1 << 32);

impl Mesh {
    /// Meets the other ranks. Whatever is exchanged later, too, must make some progress within `limit`.
    ///
    /// # Errors
    /// [`RankError::PortInUse`], [`RankError::Io`]; [`RankError::Missing`] for ranks that do not come in time;
    /// [`RankError::Differs`] for ranks of another number of ranks, and for two of the same rank.
    pub fn connect(place: &Place, limit: Duration) -> Result<Self> {
        let limit = limit.min(LONGEST);
        let meeting = Meeting {
            place,
            limit,
            deadline: Instant::now() + limit,
        };
        let links = match place.rank {
            _ if place.world == 1 => vec![None],
            0 => meeting.host()?,
            _ => meeting.join()?,
        };
        Ok(Self {
            rank: place.rank,
            outboxes: links.iter().map(|_| Outbox::default()).collect(),
            links: links.into_iter().map(|link| link.map(Arc::new)).collect(),
            limit,
            ended: AtomicBool::new(false),
        })
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.links.len()
    }

    /// How long an exchange may be without any progress.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Looks whether a rank has ended, without waiting for anything.
    ///
    /// # Errors
    /// [`RankError::Lost`], [`RankError::Told`].
    pub fn look(&self, doing: &'static str) -> Result<()> {
        self.others().try_for_each(|(_, link)| link.look(doing))
    }

    /// The messages of all ranks, by rank. No rank has this result before all have sent theirs.
    ///
    /// # Errors
    /// [`RankError::Lost`], [`RankError::Slow`], [`RankError::Told`], [`RankError::Message`].
    pub fn gather(&self, message: &[u8], doing: &'static str) -> Result<Vec<Vec<u8>>> {
        let sends: Vec<_> = self
            .others()
            .map(|(_, link)| (link, vec![message]))
            .collect();
        self.exchanged(&sends, doing, || {
            let mut all = self.each(|_, link| link.receive(doing))?;
            all.insert(self.rank, message.to_vec());
            Ok(all)
        })
    }

    /// The messages of all ranks, by rank, on rank 0; `None` on the others.
    ///
    /// # Errors
    /// As [`Mesh::gather`].
    pub fn collect(&self, message: &[u8], doing: &'static str) -> Result<Option<Vec<Vec<u8>>>> {
        match &self.links[0] {
            Some(first) => self.exchanged(&[(first, vec![message])], doing, || Ok(None)),
            None => self.exchanged(&[], doing, || {
                let mut all = self.each(|_, link| link.receive(doing))?;
                all.insert(0, message.to_vec());
                Ok(Some(all))
            }),
        }
    }

    /// Sends to each rank the parts at its place, as one message, and reads meanwhile the messages of all ranks, of
    /// `lens` bytes each (0: none): `part` is called with a rank and with how to read the next bytes of its message.
    pub(super) fn swap(
        &self,
        parts: &[Vec<&[u8]>],
        lens: &[usize],
        doing: &'static str,
        mut part: impl FnMut(usize, &dyn Fn(&mut [u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let has_some = |parts: &Vec<&[u8]>| parts.iter().any(|part| !part.is_empty());
        let sends: Vec<_> = self
            .others()
            .filter(|(rank, _)| has_some(&parts[*rank]))
            .map(|(rank, link)| (link, parts[rank].clone()))
            .collect();
        self.exchanged(&sends, doing, || {
            self.each(|rank, link| {
                if lens[rank] == 0 {
                    return Ok(());
                }
                link.expect(lens[rank], doing)?;
                part(rank, &|bytes| link.part(bytes, doing))
            })?;
            Ok(())
        })
    }

    /// Sends a message to one rank, after all that were sent there before, and does not wait until it is read.
    ///
    /// # Errors
    /// [`RankError::Lost`], [`RankError::Slow`], also of a message before; [`RankError::Told`].
    pub fn post(&self, to: usize, message: Vec<u8>, doing: &'static str) -> Result<()> {
        self.alone(to, |link| self.outboxes[to].post(link, message, doing))
    }

    /// The next message of one rank, however long it does not come.
    ///
    /// # Errors
    /// As [`Mesh::gather`], but for [`RankError::Slow`].
    pub fn await_message(&self, from: usize, doing: &'static str) -> Result<Vec<u8>> {
        self.alone(from, |link| link.receive_at_last(doing))
    }

    /// Reads the next message of one rank, which must have as many bytes.
    pub(super) fn fill(&self, from: usize, bytes: &mut [u8], doing: &'static str) -> Result<()> {
        self.alone(from, |link| {
            link.expect(bytes.len(), doing)?;
            link.part(bytes, doing)
        })
    }

    /// Something with one rank alone. After an error the others are told of it.
    fn alone<T>(&self, peer: usize, work: impl FnOnce(&Arc<Link>) -> Result<T>) -> Result<T> {
        let link = self.links.get(peer).and_then(Option::as_ref);
        let link = link.expect("another rank of this run");
        let done = work(link).map_err(|error| self.with_others(link.explained(error)));
        if let Err(error) = &done {
            self.end(&error.to_string());
        }
        done
    }

    /// An error with what the other connections say of it: a rank that is lost takes others along, and whose connection
    /// breaks first is chance.
    fn with_others(&self, error: RankError) -> RankError {
        let RankError::Lost {
            rank,
            doing,
            reason,
        } = error
        else {
            return error;
        };
        let others = self.others().filter(|(other, _)| *other != rank);
        let said = others.filter_map(|(_, link)| link.look(doing).err());
        let said: Vec<String> = said.map(|error| error.to_string()).collect();
        RankError::Lost {
            rank,
            doing,
            reason: [vec![reason], said].concat().join("; "),
        }
    }

    /// Tells the others that this rank ends the run, and why. Later calls do nothing.
    pub fn end(&self, why: &str) {
        if !self.ended.swap(true, Ordering::SeqCst) {
            self.others().for_each(|(_, link)| link.farewell(why));
        }
    }

    fn others(&self) -> impl Iterator<Item = (usize, &Link)> {
        let links = self.links.iter().enumerate();
        links.filter_map(|(rank, link)| Some((rank, link.as_deref()?)))
    }

    /// What `receive` makes of each other rank, or the first error. The rest is read even then: a connection that is
    /// closed with something unread takes along what this rank has sent.
    fn each<T>(&self, mut receive: impl FnMut(usize, &Link) -> Result<T>) -> Result<Vec<T>> {
        let all: Vec<Result<T>> = self
            .others()
            .map(|(rank, link)| receive(rank, link))
            .collect();
        all.into_iter().collect()
    }

    /// Sends messages while `receive` reads. After an error the others are told of it.
    fn exchanged<T>(
        &self,
        sends: &[(&Link, Vec<&[u8]>)],
        doing: &'static str,
        receive: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let small = |parts: &[&[u8]]| parts.iter().map(|p| p.len()).sum::<usize>() <= SMALL;
        let done = std::thread::scope(|scope| {
            // Messages arrive in the order in which they were sent.
            self.outboxes.iter().try_for_each(Outbox::flush)?;
            let mut threads = Vec::new();
            for (link, parts) in sends {
                let send = move || link.send(parts, doing);
                match small(parts) {
                    true => send().map_err(|error| link.explained(error))?,
                    false => {
                        let thread = std::thread::Builder::new().spawn_scoped(scope, send);
                        let thread = thread.map_err(|e| RankError::io("start a thread", e))?;
                        threads.push((link, thread));
                    }
                }
            }
            let received = receive();
            // Also after an error the others have what they wait for: then they see for themselves who is lost.
            for (link, thread) in threads {
                let sent = thread.join();
                let sent = sent.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                if received.is_ok() {
                    sent.map_err(|error| link.explained(error))?;
                }
            }
            received
        });
        let done = done.map_err(|error| self.with_others(error));
        if let Err(error) = &done {
            self.end(&error.to_string());
        }
        done
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        // Who has an error has said so by now.
        self.outboxes.iter().for_each(|outbox| drop(outbox.flush()));
    }
}

/// The ranks on their way to each other.
struct Meeting<'a> {
    place: &'a Place,
    limit: Duration,
    deadline: Instant,
}

impl Meeting<'_> {
    /// Rank 0: waits for all others.
    fn host(&self) -> Result<Vec<Option<Link>>> {
        let Place {
            world,
            address,
            port,
            ..
        } = self.place;
        let resolved = resolve(address, *port)?;
        let any = match resolved.ip() {
            ip if ip.is_loopback() => ip,
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let listener = TcpListener::bind((any, *port)).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => RankError::PortInUse {
                address: address.clone(),
                port: *port,
            },
            _ => RankError::io(format!("listen on port {port} of {address}"), error),
        })?;
        let mut links: Vec<Option<Link>> = (0..*world).map(|_| None).collect();
        let mut table = vec![resolved; *world];
        let met = self.accept(&listener, &mut links, 1, |rank, hello, stream| {
            let peer = stream.peer_addr();
            let peer = peer.map_err(|e| RankError::io("tell where a rank is", e))?;
            table[rank] = SocketAddr::new(peer.ip(), hello.port);
            Ok(())
        });
        let table = met.map(|()| serde_json::to_vec(&table).expect("addresses"));
        for link in links.iter().flatten() {
            match &table {
                Ok(table) => link.send(&[table], MEETING)?,
                Err(error) => link.farewell(&error.to_string()),
            }
        }
        table.map(|_| links)
    }

    /// The other ranks: go to rank 0, then to those of lower rank, and wait for those of higher rank.
    fn join(&self) -> Result<Vec<Option<Link>>> {
        let Place {
            rank,
            world,
            address,
            port,
            ..
        } = self.place;
        let stream = self.reach(|| resolve(address, *port), 0)?;
        let here = stream.local_addr();
        let here = here.map_err(|e| RankError::io("tell this rank's address", e))?;
        let listener = TcpListener::bind((here.ip(), 0))
            .map_err(|e| RankError::io(format!("listen on {}", here.ip()), e))?;
        let mine = listener.local_addr();
        let mine = mine.map_err(|e| RankError::io("tell this rank's address", e))?;
        let mut links: Vec<Option<Link>> = (0..*world).map(|_| None).collect();
        let first = self.introduce(0, stream, mine.port())?;
        let table = first.receive(MEETING)?;
        let table: Vec<SocketAddr> =
            serde_json::from_slice(&table).map_err(|error| RankError::Message {
                rank: 0,
                doing: MEETING,
                expected: "a list of addresses".into(),
                got: error.to_string(),
            })?;
        links[0] = Some(first);
        for (peer, at) in table.iter().enumerate().take(*rank).skip(1) {
            let stream = self.reach(|| Ok(*at), peer)?;
            links[peer] = Some(self.introduce(peer, stream, 0)?);
        }
        self.accept(&listener, &mut links, rank + 1, |_, _, _| Ok(()))?;
        Ok(links)
    }

    /// Waits for all ranks from `first` on.
    fn accept(
        &self,
        listener: &TcpListener,
        links: &mut [Option<Link>],
        first: usize,
        mut met: impl FnMut(usize, &Hello, &TcpStream) -> Result<()>,
    ) -> Result<()> {
        let set = listener.set_nonblocking(true);
        set.map_err(|e| RankError::io("set up a listener", e))?;
        while links[first..].iter().any(Option::is_none) {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(_) if Instant::now() < self.deadline => {
                    sleep(PAUSE);
                    continue;
                }
                Err(_) => {
                    let missing = (first..links.len()).filter(|rank| links[*rank].is_none());
                    return Err(RankError::Missing {
                        ranks: missing.collect(),
                        world: links.len(),
                        seconds: self.limit.as_secs(),
                    });
                }
            };
            let Some(hello) = self.hello(&stream) else {
                continue;
            };
            let rank = hello.rank;
            if hello.world != links.len() {
                let expected = format!("{} ranks", links.len());
                return Err(differs(rank, expected, hello.world));
            }
            if rank < first || rank >= links.len() || links[rank].is_some() {
                let expected = "one process of this rank".to_owned();
                return Err(differs(rank, expected, "another one"));
            }
            met(rank, &hello, &stream)?;
            links[rank] = Some(Link::new(rank, stream, self.limit)?);
        }
        Ok(())
    }

    /// How whoever has connected introduces itself; `None` for a stranger.
    fn hello(&self, stream: &TcpStream) -> Option<Hello> {
        let clone = stream.try_clone().ok()?;
        let link = Link::new(self.place.world, clone, HELLO_LIMIT).ok()?;
        let bytes = link.receive_at_most(MAX_HELLO, MEETING).ok()?;
        let hello: Hello = serde_json::from_slice(&bytes).ok()?;
        let ours = hello.protocol == PROTOCOL && hello.run == self.place.run;
        ours.then_some(hello)
    }

    fn introduce(&self, peer: usize, stream: TcpStream, port: u16) -> Result<Link> {
        let hello = Hello {
            protocol: PROTOCOL.into(),
            run: self.place.run.clone(),
            rank: self.place.rank,
            world: self.place.world,
            port,
        };
        let hello = serde_json::to_vec(&hello).expect("texts and numbers");
        let link = Link::new(peer, stream, self.limit)?;
        link.send(&[&hello], MEETING)?;
        Ok(link)
    }

    /// Connects, again and again until the time limit: the other one may not listen yet.
    fn reach(&self, to: impl Fn() -> Result<SocketAddr>, rank: usize) -> Result<TcpStream> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let reached = to().and_then(|at| {
                let reached = TcpStream::connect_timeout(&at, left.max(PAUSE));
                reached.map_err(|e| RankError::io(format!("reach rank {rank} at {at}"), e))
            });
            match reached {
                Err(_) if left > PAUSE => sleep(PAUSE),
                reached => return reached,
            }
        }
    }
}

fn differs(rank: usize, expected: String, got: impl ToString) -> RankError {
    RankError::Differs {
        rank,
        what: "world".into(),
        expected,
        got: got.to_string(),
    }
}

fn resolve(address: &str, port: u16) -> Result<SocketAddr> {
    let failed = |error| RankError::io(format!("find the host `{address}` of rank 0"), error);
    let mut found = (address, port).to_socket_addrs().map_err(failed)?;
    found
        .next()
        .ok_or_else(|| failed(ErrorKind::NotFound.into()))
}
