//! The rotary keys of `config.json`, in both layouts: `rope_theta` with `rope_scaling`, and the
//! newer `rope_parameters` that holds both. Written back in the first, and in the second where the
//! file had it.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::{MAX_POSITIONS, invalid};
use crate::model::error::ConfigError;

pub(super) const DEFAULT_THETA: f64 = 10_000.0;

/// Change of the rotary frequencies for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Turns over the original context below which a frequency is divided.
        low_freq_factor: f64,
        /// Turns above which it is kept; more than `low_freq_factor`.
        high_freq_factor: f64,
        /// The original context in tokens.
        original_max_position_embeddings: usize,
    },
}

const SCALING_KEYS: [&str; 8] = [
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "partial_rotary_factor",
];

/// Base and scaling. `rope_theta` may stand in `rope_parameters`, in `rope_scaling` and beside them; where it stands
/// more than once, all must agree.
pub(super) fn from_json(fields: &Fields<'_>) -> Result<(f64, RopeScaling), ConfigError> {
    let mut theta: Option<(String, f64)> = None;
    one_theta(&mut theta, fields)?;
    let mut found: Option<(&str, RopeScaling)> = None;
    for name in ["rope_parameters", "rope_scaling"] {
        let Some(object) = fields.object(name)? else {
            continue;
        };
        let prefix = format!("{name}.");
        let inner = Fields::new(object, &prefix);
        let scaling = scaling(&inner, fields)?;
        if let Some((first, known)) = found
            && known != scaling
        {
            let got = format!("{scaling:?} beside {known:?}");
            return invalid(name, format!("the same as {first}"), got);
        }
        found = Some((name, scaling));
        one_theta(&mut theta, &inner)?;
    }
    Ok((
        theta.map_or(DEFAULT_THETA, |(_, theta)| theta),
        found.map_or(RopeScaling::Default, |(_, scaling)| scaling),
    ))
}

fn one_theta(known: &mut Option<(String, f64)>, fields: &Fields<'_>) -> Result<(), ConfigError> {
    let Some(theta) = fields.number("rope_theta")? else {
        return Ok(());
    };
    let key = fields.path("rope_theta");
    match known {
        Some((first, known)) if *known != theta => {
            invalid(&key, format!("{first} = {known}"), theta)
        }
        _ => {
            *known = Some((key, theta));
            Ok(())
        }
    }
}

/// The scaling of one of the two objects; `top` is the object around it.
fn scaling(fields: &Fields<'_>, top: &Fields<'_>) -> Result<RopeScaling, ConfigError> {
    let kind = match fields.text("rope_type")? {
        Some(kind) => kind,
        None => fields.text("type")?.unwrap_or("default"),
    };
    if !["default", "linear", "llama3"].contains(&kind) {
        return Err(fields.unsupported("rope_type", "default, linear, llama3", &json!(kind)));
    }
    fields.only(&SCALING_KEYS)?;
    if let Some(part) = fields.number("partial_rotary_factor")?
        && part != 1.0
    {
        let supported = "1.0 (all of a head rotates)";
        return Err(fields.unsupported("partial_rotary_factor", supported, &json!(part)));
    }
    match kind {
        "linear" => Ok(RopeScaling::Linear {
            factor: fields.required_number("factor")?,
        }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: fields.required_number("factor")?,
            low_freq_factor: fields.required_number("low_freq_factor")?,
            high_freq_factor: fields.required_number("high_freq_factor")?,
            original_max_position_embeddings: original_positions(fields, top)?,
        }),
        _ => Ok(RopeScaling::Default),
    }
}

/// The context that frequencies are scaled from, which may also stand beside the object.
fn original_positions(fields: &Fields<'_>, top: &Fields<'_>) -> Result<usize, ConfigError> {
    let key = "original_max_position_embeddings";
    let (inner, outer) = (
        fields.size(key, 1..=MAX_POSITIONS)?,
        top.size(key, 1..=MAX_POSITIONS)?,
    );
    match (inner, outer) {
        (Some(inner), Some(outer)) if inner != outer => invalid(
            &top.path(key),
            format!("{} = {inner}", fields.path(key)),
            outer,
        ),
        (Some(len), _) | (None, Some(len)) => Ok(len),
        (None, None) => Err(fields.missing(key)),
    }
}

pub(super) fn validate(theta: f64, scaling: &RopeScaling) -> Result<(), ConfigError> {
    if !(theta.is_finite() && theta >= 1.0) {
        return invalid("rope_theta", "a finite number, at least 1", theta);
    }
    let factor = match *scaling {
        RopeScaling::Default => 1.0,
        RopeScaling::Linear { factor } | RopeScaling::Llama3 { factor, .. } => factor,
    };
    if !(factor.is_finite() && factor >= 1.0) {
        return invalid("rope_scaling.factor", "a finite number, at least 1", factor);
    }
    let RopeScaling::Llama3 {
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
        ..
    } = *scaling
    else {
        return Ok(());
    };
    if !(low.is_finite() && low > 0.0) {
        return invalid(
            "rope_scaling.low_freq_factor",
            "a finite number above 0",
            low,
        );
    }
    if !(high.is_finite() && high > low) {
        let expected = format!("a finite number above low_freq_factor = {low}");
        return invalid("rope_scaling.high_freq_factor", expected, high);
    }
    if original == 0 || original > MAX_POSITIONS {
        let key = "rope_scaling.original_max_position_embeddings";
        return invalid(
            key,
            format!("an integer from 1 to {MAX_POSITIONS}"),
            original,
        );
    }
    Ok(())
}

/// Sets the rotary keys of `object`.
pub(super) fn write_json(object: &mut Map<String, Value>, theta: f64, scaling: &RopeScaling) {
    let legacy = match *scaling {
        RopeScaling::Default => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    };
    if object.get("rope_parameters").is_some_and(Value::is_object) {
        let mut newer = match &legacy {
            Value::Object(scaling) => scaling.clone(),
            _ => Map::from_iter([("rope_type".to_owned(), json!("default"))]),
        };
        newer.insert("rope_theta".into(), json!(theta));
        object.insert("rope_parameters".into(), Value::Object(newer));
    }
    object.insert("rope_theta".into(), json!(theta));
    object.insert("rope_scaling".into(), legacy);
}
