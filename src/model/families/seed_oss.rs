//! Seed-OSS: biases of queries, keys and values, and of the output, by keys of their own.

use super::{Defaults, Family, Names, Sizes, flag};
use crate::model::config::fields::Fields;
use crate::model::error::ConfigError;
use crate::model::switches::Switches;

pub(super) const SEED_OSS: Family = Family {
    model_type: "seed_oss",
    architectures: ["SeedOssForCausalLM", "SeedOssModel"],
    keys: &["attention_bias", "attention_out_bias", "mlp_bias"],
    defaults: Defaults {
        head_dim: Some(128),
        positions: 524_288,
        ..Defaults::LLAMA
    },
    switches,
    rope_kinds: &[],
    names: Names::LLAMA,
};

fn switches(fields: &Fields<'_>, _: &Sizes) -> Result<Switches, ConfigError> {
    Ok(Switches {
        qkv_bias: fields.flag("attention_bias")?.unwrap_or(true),
        output_bias: flag(fields, "attention_out_bias")?,
        mlp_bias: flag(fields, "mlp_bias")?,
        ..Switches::PLAIN
    })
}
