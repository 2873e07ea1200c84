//! Every key of the training configuration as a flag, made from the configuration itself.

use std::sync::OnceLock;

use clap::{Arg, ArgMatches, Command, error::Error};
use segattn::train::config::{Flag, flags};

/// Keys given as flags, with their values.
#[derive(Debug, Clone, Default)]
pub struct Overrides(pub Vec<(String, String)>);

/// The flags, and their names with dashes.
fn known() -> &'static [(Flag, String, String)] {
    static FLAGS: OnceLock<Vec<(Flag, String, String)>> = OnceLock::new();
    FLAGS.get_or_init(|| {
        let with_names = |flag: Flag| {
            let dashed = flag.key.replace('_', "-");
            let heading = flag.key.rsplit_once('.').map_or("", |(section, _)| section);
            let heading = format!("[{heading}]");
            (flag, dashed, heading)
        };
        flags().into_iter().map(with_names).collect()
    })
}

impl clap::Args for Overrides {
    fn augment_args(command: Command) -> Command {
        known()
            .iter()
            .fold(command, |command, (flag, dashed, heading)| {
                let help = format!("{} [{}]", flag.help, flag.default);
                let mut arg = Arg::new(flag.key.as_str())
                    .long(dashed.as_str())
                    .value_name("VALUE")
                    .allow_hyphen_values(true)
                    .help_heading(heading.as_str())
                    .help(help);
                if flag.key != *dashed {
                    arg = arg.alias(flag.key.as_str());
                }
                command.arg(arg)
            })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Overrides {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let given = known().iter().filter_map(|(flag, ..)| {
            let value = matches.get_one::<String>(&flag.key)?;
            Some((flag.key.clone(), value.clone()))
        });
        Ok(Self(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
