//! How ranks meet and exchange, and what they say of one that is missing, lost or slow.

mod meeting;

use std::time::{Duration, Instant};

use meeting::{free_port, on_ranks, place};
use segattn::device::cpu::Cpu;
use segattn::device::{Device, Kind};
use segattn::ranks::{Agreement, Engine, Mesh, Piece, RankError};

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn messages_of_all_sizes_arrive_by_rank() {
    for world in [1, 2, 4] {
        on_ranks(world, LIMIT, |rank, mesh| {
            let mesh = mesh.unwrap();
            assert_eq!((mesh.rank(), mesh.world()), (rank, world));
            for len in [0, 1, 5000, 3_000_000] {
                let message = |rank: usize| vec![rank as u8 + 1; len + rank];
                let expected: Vec<_> = (0..world).map(message).collect();
                assert!(mesh.gather(&message(rank), "test").unwrap() == expected);
                let collected = mesh.collect(&message(rank), "test").unwrap();
                assert!(collected == (rank == 0).then_some(expected));
            }
        });
    }
}

#[test]
fn whole_buffers_of_both_kinds_arrive_in_order_while_the_others_are_looked_at() {
    // More than a connection holds.
    const LEN: usize = 5_000_000;
    on_ranks(2, LIMIT, |rank, mesh| {
        let mesh = mesh.unwrap();
        let doing = "test";
        for (turn, kind) in [Kind::Exact, Kind::Activation, Kind::Exact]
            .into_iter()
            .enumerate()
        {
            let values: Vec<f32> = (0..LEN + turn).map(|i| (i * (turn + 1)) as f32).collect();
            let mut buffer = Cpu.zeros(kind, values.len()).unwrap();
            if rank == 1 {
                Cpu.write(&mut buffer, 0, &values).unwrap();
                mesh.send(&Cpu, buffer, 0, doing).unwrap();
                for _ in 0..50 {
                    mesh.look(doing).unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                }
            } else {
                // The sender has to wait.
                std::thread::sleep(Duration::from_millis(100));
                mesh.receive(&Cpu, &mut buffer, 1, doing).unwrap();
                assert!(Cpu.read(&buffer, 0..values.len()).unwrap() == values);
            }
        }
        mesh.gather(&[], doing).unwrap();
    });
}

#[test]
fn pieces_of_buffers_go_where_they_belong_to_the_bit() {
    const LEN: usize = 100_000;
    on_ranks(3, LIMIT, |rank, mesh| {
        let mesh = mesh.unwrap();
        // A NaN with a payload is moved like any other number.
        let value = |rank: usize, i: usize| f32::from_bits(0x7fc0_0000 + (rank * LEN + i) as u32);
        let mut own = Cpu.zeros(Kind::Exact, LEN).unwrap();
        let values: Vec<f32> = (0..LEN).map(|i| value(rank, i)).collect();
        Cpu.write(&mut own, 0, &values).unwrap();
        let mut others = Cpu.zeros(Kind::Exact, 3 * LEN).unwrap();
        let peers: Vec<usize> = (0..3).filter(|peer| *peer != rank).collect();
        let piece = |peer, buffer, start: usize, len| Piece {
            peer,
            buffer,
            range: start..start + len,
        };
        let sends: Vec<_> = peers
            .iter()
            .flat_map(|p| [piece(*p, 0, 7 * p, 11), piece(*p, 0, 50, LEN - 50)])
            .collect();
        let receives: Vec<_> = peers
            .iter()
            .flat_map(|p| {
                [
                    piece(*p, 1, p * LEN, 11),
                    piece(*p, 1, p * LEN + 11, LEN - 50),
                ]
            })
            .collect();
        let mut buffers = [&mut own, &mut others];
        mesh.exchange(&Cpu, &mut buffers, &sends, &receives, "test")
            .unwrap();
        for peer in peers {
            let got = Cpu
                .read(&others, peer * LEN..peer * LEN + LEN - 39)
                .unwrap();
            let sent = (7 * rank..7 * rank + 11).chain(50..LEN);
            let expected = sent.map(|i| value(peer, i).to_bits());
            assert!(got.into_iter().map(f32::to_bits).eq(expected));
        }
    });
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let port = free_port();
    let limit = Duration::from_millis(600);
    std::thread::scope(|scope| {
        let join = |rank| scope.spawn(move || Mesh::connect(&place(rank, 4, port), limit));
        let threads = [0, 1, 3].map(join);
        let errors = threads.map(|thread| thread.join().unwrap().unwrap_err().to_string());
        let [first, others @ ..] = errors;
        assert!(
            first.contains("rank 2") && first.contains("all 4 ranks"),
            "{first}"
        );
        for error in others {
            assert!(error.contains("rank 0"), "{error}");
        }
    });
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = Mesh::connect(&place(0, 2, port), LIMIT).unwrap_err();
    assert!(
        matches!(error, RankError::PortInUse { port: p, .. } if p == port),
        "{error}"
    );
    assert!(error.to_string().contains("MASTER_PORT"), "{error}");
}

#[test]
fn ranks_of_another_number_of_ranks_and_two_of_one_rank_are_refused_and_strangers_are_not_heeded() {
    for (other, said) in [((1, 3), "3"), ((0, 2), "another one")] {
        let port = free_port();
        std::thread::scope(|scope| {
            let first = scope.spawn(move || Mesh::connect(&place(0, 2, port), LIMIT));
            let stranger = scope.spawn(move || {
                let (rank, world) = other;
                let mut place = place(rank.max(1), world, port);
                place.run = "another run".into();
                Mesh::connect(&place, Duration::from_millis(300))
            });
            assert!(stranger.join().unwrap().is_err());
            // Whoever says so must look like a joining rank: one that is 0 itself would listen.
            let hello = |rank: usize, world: usize| {
                format!(
                    "{{\"protocol\":\"segattn ranks 1\",\"run\":\"test\",\"rank\":{rank},\"world\":{world},\"port\":1}}"
                )
            };
            use std::io::Write;
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
            let text = hello(other.0, other.1);
            stream.write_all(&[0]).unwrap();
            stream
                .write_all(&(text.len() as u64).to_le_bytes())
                .unwrap();
            stream.write_all(text.as_bytes()).unwrap();
            let error = first.join().unwrap().unwrap_err();
            assert!(matches!(error, RankError::Differs { .. }), "{error}");
            assert!(error.to_string().contains(said), "{error}");
        });
    }
}

#[test]
fn whoever_disagrees_is_named_on_every_rank() {
    let errors = on_ranks(3, LIMIT, |rank, mesh| {
        let batch = if rank == 2 { 4 } else { 8 };
        let agreement = Agreement::new()
            .on("version", 1)
            .on("training.batch", batch);
        agreement.check(&mesh.unwrap()).unwrap_err().to_string()
    });
    for error in errors {
        let expected = "rank 2: training.batch: expected 8 as on rank 0, got 4";
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_rank_that_is_lost_or_silent_ends_the_exchange_of_all_and_is_named() {
    for silent in [false, true] {
        let limit = Duration::from_secs(if silent { 1 } else { 20 });
        let began = Instant::now();
        let errors = on_ranks(4, limit, |rank, mesh| {
            let mesh = mesh.unwrap();
            mesh.gather(b"here", "test").unwrap();
            if rank == 2 {
                if silent {
                    std::thread::sleep(Duration::from_secs(3));
                }
                return None;
            }
            // More than a connection holds.
            Some(
                mesh.gather(&vec![0; 20_000_000], "test")
                    .unwrap_err()
                    .to_string(),
            )
        });
        for error in errors.into_iter().flatten() {
            assert!(error.contains("rank 2"), "{error}");
        }
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}
