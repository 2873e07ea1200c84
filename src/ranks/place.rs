//! Which rank this process is, read from the variables that launchers of processes set.

use super::error::{RankError, Result};

/// The port of the rendezvous where no variable names one.
pub const DEFAULT_PORT: u16 = 29500;

/// Most ranks: each has a connection to every other one.
const MOST_RANKS: usize = 1 << 16;

/// A process among those of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number, from 0.
    pub rank: usize,
    /// Its number among the ranks of its host, from 0: that of its GPU.
    pub local_rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// Host name or address of rank 0.
    pub address: String,
    /// Port on which rank 0 expects the others.
    pub port: u16,
    /// What the ranks of this run share and others do not, as far as the launcher says so.
    pub run: String,
}

/// The variables of a launcher that number the processes.
struct Names {
    rank: &'static str,
    world: &'static str,
    local: &'static str,
}

/// Those of torchrun and of `segattn train --ranks`, of Open MPI, and of SLURM's srun. A batch script of SLURM, which
/// is one process, has no number of tasks of a step.
const LAUNCHERS: [Names; 3] = [
    Names {
        rank: "RANK",
        world: "WORLD_SIZE",
        local: "LOCAL_RANK",
    },
    Names {
        rank: "OMPI_COMM_WORLD_RANK",
        world: "OMPI_COMM_WORLD_SIZE",
        local: "OMPI_COMM_WORLD_LOCAL_RANK",
    },
    Names {
        rank: "SLURM_PROCID",
        world: "SLURM_STEP_NUM_TASKS",
        local: "SLURM_LOCALID",
    },
];

impl Place {
    /// The place that this process's environment names; `None` where it names none.
    ///
    /// # Errors
    /// [`RankError::Environment`] for a variable that does not fit.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// [`Place::from_env`] on these variables.
    ///
    /// # Errors
    /// As [`Place::from_env`].
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let set = |names: &&Names| get(names.rank).is_some() && get(names.world).is_some();
        let Some(names) = LAUNCHERS.iter().find(set) else {
            return Ok(None);
        };
        let expected = format!("a number from 1 to {MOST_RANKS}");
        let world = number(&get, names.world, 1, MOST_RANKS, &expected)?;
        let world = world.unwrap_or(1);
        let below = format!("a number below {world}, which is {}", names.world);
        let rank = number(&get, names.rank, 0, world - 1, &below)?.unwrap_or(0);
        let local_rank = number(&get, names.local, 0, world - 1, &below)?.unwrap_or(rank);
        let port = number(&get, "MASTER_PORT", 1, u16::MAX.into(), "a port")?;
        let mut port = port.map_or(DEFAULT_PORT, |port| port as u16);
        // torchrun keeps the port for a store of its own; the next one is as good as free.
        if get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|used| used == "True") {
            port = port.checked_add(1).unwrap_or(port - 1);
        }
        let run = ["SEGATTN_RUN", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"];
        Ok(Some(Self {
            rank,
            local_rank,
            world,
            address: address(&get, names, world)?,
            port,
            run: run.into_iter().find_map(&get).unwrap_or_default(),
        }))
    }
}

/// Where rank 0 is.
fn address(get: &impl Fn(&str) -> Option<String>, names: &Names, world: usize) -> Result<String> {
    if let Some(address) = get("MASTER_ADDR").filter(|address| !address.is_empty()) {
        return Ok(address);
    }
    let nodes = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"];
    let slurm = names.rank.starts_with("SLURM");
    if let Some(nodes) = nodes.into_iter().find_map(get).filter(|_| slurm) {
        return Ok(first_host(&nodes));
    }
    let local = get("OMPI_COMM_WORLD_LOCAL_SIZE").and_then(|size| size.parse().ok());
    if world == 1 || local == Some(world) {
        return Ok("127.0.0.1".into());
    }
    Err(RankError::Environment {
        name: "MASTER_ADDR",
        expected: "the name or address of the host of rank 0".into(),
        got: "nothing".into(),
    })
}

/// The first host of a list such as `gpu-a[07-09,12],gpu-b3`.
fn first_host(list: &str) -> String {
    let Some(at) = list.find(['[', ',']) else {
        return list.to_owned();
    };
    let (name, rest) = list.split_at(at);
    let Some(numbers) = rest.strip_prefix('[') else {
        return name.to_owned();
    };
    let first: String = numbers.chars().take_while(char::is_ascii_digit).collect();
    format!("{name}{first}")
}

/// The number in a variable, if it is set.
fn number(
    get: &impl Fn(&str) -> Option<String>,
    name: &'static str,
    least: usize,
    most: usize,
    expected: &str,
) -> Result<Option<usize>> {
    let Some(text) = get(name) else {
        return Ok(None);
    };
    match text.trim().parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(Some(number)),
        _ => Err(RankError::Environment {
            name,
            expected: expected.into(),
            got: format!("`{text}`"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{DEFAULT_PORT, Place, first_host};
    use crate::ranks::RankError;

    fn place(variables: &[(&str, &str)]) -> super::Result<Option<Place>> {
        Place::from_variables(|name| {
            let found = variables.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    fn of(rank: usize, local_rank: usize, world: usize, address: &str, port: u16) -> Place {
        Place {
            rank,
            local_rank,
            world,
            address: address.into(),
            port,
            run: String::new(),
        }
    }

    #[test]
    fn each_launcher_says_which_rank_a_process_is() {
        assert_eq!(place(&[]).unwrap(), None);
        assert_eq!(place(&[("RANK", "3")]).unwrap(), None);
        let torchrun = [
            ("RANK", "5"),
            ("LOCAL_RANK", "1"),
            ("WORLD_SIZE", "8"),
            ("MASTER_ADDR", "node-a"),
            ("MASTER_PORT", "1234"),
        ];
        let expected = of(5, 1, 8, "node-a", 1234);
        assert_eq!(place(&torchrun).unwrap(), Some(expected.clone()));
        let agent = [&torchrun[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        let port = 1235;
        assert_eq!(place(&agent).unwrap(), Some(Place { port, ..expected }));

        let mpirun = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let expected = of(1, 1, 2, "127.0.0.1", DEFAULT_PORT);
        assert_eq!(place(&mpirun).unwrap(), Some(expected));

        let srun = [
            ("SLURM_PROCID", "2"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_STEP_NUM_TASKS", "4"),
            ("SLURM_JOB_ID", "77"),
            ("SLURM_STEP_NODELIST", "gpu-a[07-09,12],gpu-b3"),
        ];
        let expected = Place {
            run: "77".into(),
            ..of(2, 0, 4, "gpu-a07", DEFAULT_PORT)
        };
        assert_eq!(place(&srun).unwrap(), Some(expected));
        let script = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")];
        assert_eq!(place(&script).unwrap(), None);
    }

    #[test]
    fn variables_that_do_not_fit_are_named() {
        for (variables, named) in [
            (&[("RANK", "2"), ("WORLD_SIZE", "2")][..], "RANK"),
            (&[("RANK", "-1"), ("WORLD_SIZE", "2")], "RANK"),
            (&[("RANK", "0"), ("WORLD_SIZE", "0")], "WORLD_SIZE"),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "18446744073709551615")],
                "WORLD_SIZE",
            ),
            (&[("RANK", "0"), ("WORLD_SIZE", "2")], "MASTER_ADDR"),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "70000")],
                "MASTER_PORT",
            ),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "x")],
                "LOCAL_RANK",
            ),
        ] {
            let error = place(variables).unwrap_err();
            let RankError::Environment { name, .. } = error else {
                panic!("{error}");
            };
            assert_eq!(name, named);
        }
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (list, first) in [
            ("a", "a"),
            ("a,b", "a"),
            ("n[3]", "n3"),
            ("n[003-7],m1", "n003"),
        ] {
            assert_eq!(first_host(list), first);
        }
    }
}
