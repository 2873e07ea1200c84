//! Ranks as threads of one process, shared by tests.

#![allow(dead_code)]

use std::net::TcpListener;
use std::time::Duration;

use segattn::ranks::{Mesh, Place, Result};

/// A port that is free now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

pub fn place(rank: usize, world: usize, port: u16) -> Place {
    Place {
        rank,
        local_rank: rank,
        world,
        address: "127.0.0.1".into(),
        port,
        run: "test".into(),
    }
}

/// What `work` makes of each rank, by rank. The ranks are threads.
pub fn on_ranks<T: Send>(
    world: usize,
    limit: Duration,
    work: impl Fn(usize, Result<Mesh>) -> T + Sync,
) -> Vec<T> {
    let port = free_port();
    std::thread::scope(|scope| {
        let start = |rank| {
            let (place, work) = (place(rank, world, port), &work);
            scope.spawn(move || work(rank, Mesh::connect(&place, limit)))
        };
        let threads: Vec<_> = (0..world).map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}
