//! The rotary keys of `config.json`, in both layouts: `rope_theta` with `rope_scaling`, and the
//! newer `rope_parameters` that holds both. Written back in the first, and in the second where the
//! file had it; kinds with keys of their own stay as the file had them.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::{MAX_HEAD_DIM, MAX_POSITIONS, RopeScaling, invalid};
use crate::model::error::ConfigError;
use crate::model::families::Family;

/// Keys of one of the two objects that every kind may have.
const COMMON_KEYS: [&str; 4] = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
pub(super) const ORIGINAL: &str = "original_max_position_embeddings";

/// Keys of a kind.
fn kind_keys(kind: &str) -> Option<&'static [&'static str]> {
    match kind {
        // The values of scaling may stay where it is switched off.
        "default" | "linear" | "llama3" => {
            Some(&["factor", "low_freq_factor", "high_freq_factor", ORIGINAL])
        }
        "yarn" => Some(&[
            "factor",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "beta_fast",
            "beta_slow",
            "truncate",
            ORIGINAL,
        ]),
        "dynamic" => Some(&["factor", ORIGINAL]),
        "longrope" => Some(&[
            "factor",
            "attention_factor",
            "short_factor",
            "long_factor",
            ORIGINAL,
        ]),
        _ => None,
    }
}

/// Base and scaling. `rope_theta` may stand in `rope_parameters`, in `rope_scaling` and beside them; where it stands
/// more than once, all must agree. `positions`: the context of the model.
pub(super) fn from_json(
    fields: &Fields<'_>,
    family: &Family,
    positions: usize,
) -> Result<(f64, RopeScaling), ConfigError> {
    let mut theta: Option<(String, f64)> = None;
    one_theta(&mut theta, fields)?;
    let mut found: Option<(&str, RopeScaling)> = None;
    for (name, object) in objects(fields)? {
        let prefix = format!("{name}.");
        let inner = Fields::new(object, &prefix);
        let scaling = scaling(&inner, fields, family, positions)?;
        if let Some((first, known)) = &found
            && *known != scaling
        {
            let got = format!("{scaling:?} beside {known:?}");
            return invalid(name, format!("the same as {first}"), got);
        }
        found = Some((name, scaling));
        one_theta(&mut theta, &inner)?;
    }
    Ok((
        theta.map_or(family.defaults.rope_theta, |(_, theta)| theta),
        found.map_or(RopeScaling::Default, |(_, scaling)| scaling),
    ))
}

/// An object of the configuration, with its name.
type Named<'a> = (&'static str, &'a Map<String, Value>);

/// The objects that are there.
fn objects<'a>(fields: &Fields<'a>) -> Result<Vec<Named<'a>>, ConfigError> {
    let mut found = Vec::new();
    for name in ["rope_parameters", "rope_scaling"] {
        if let Some(object) = fields.object(name)? {
            found.push((name, object));
        }
    }
    Ok(found)
}

/// Elements of a head that rotate, by `partial_rotary_factor`, which may stand in the objects and beside them.
pub(in crate::model) fn rotary_dim(
    fields: &Fields<'_>,
    head_dim: usize,
) -> Result<usize, ConfigError> {
    let key = "partial_rotary_factor";
    let mut part = fields.number(key)?;
    for (name, object) in objects(fields)? {
        let prefix = format!("{name}.");
        let inner = Fields::new(object, &prefix);
        match (part, inner.number(key)?) {
            (Some(outer), Some(inner)) if outer != inner => {
                return invalid(&format!("{prefix}{key}"), format!("{key} = {outer}"), inner);
            }
            (None, found) => part = found,
            _ => {}
        }
    }
    let part = part.unwrap_or(1.0);
    match part > 0.0 && part <= 1.0 {
        true => Ok((head_dim as f64 * part) as usize),
        false => invalid(key, "a number above 0 and at most 1", part),
    }
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
fn scaling(
    fields: &Fields<'_>,
    top: &Fields<'_>,
    family: &Family,
    positions: usize,
) -> Result<RopeScaling, ConfigError> {
    let kind = match fields.text("rope_type")? {
        Some(kind) => kind,
        None => fields.text("type")?.unwrap_or("default"),
    };
    let kind = family.rope_kind(kind);
    let Some(keys) = kind_keys(kind) else {
        let kinds = "default, linear, llama3, yarn, dynamic, longrope";
        return Err(fields.unsupported("rope_type", kinds, &json!(kind)));
    };
    fields.only(&[keys, &COMMON_KEYS].concat())?;
    if !family.keys.contains(&"partial_rotary_factor")
        && let Some(part) = fields.number("partial_rotary_factor")?
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
        "yarn" => yarn(fields, top, positions),
        "dynamic" => Ok(RopeScaling::Dynamic {
            factor: fields.required_number("factor")?,
            max_position_embeddings: positions,
        }),
        "longrope" => long_rope(fields, top, positions),
        _ => Ok(RopeScaling::Default),
    }
}

fn yarn(
    fields: &Fields<'_>,
    top: &Fields<'_>,
    positions: usize,
) -> Result<RopeScaling, ConfigError> {
    let original = original_positions(fields, top)?;
    let factor = fields
        .number("factor")?
        .unwrap_or(positions as f64 / original as f64);
    let length = |scale: f64| match factor > 1.0 {
        true => 0.1 * scale * factor.ln() + 1.0,
        false => 1.0,
    };
    let on = |key| -> Result<Option<f64>, ConfigError> {
        Ok(fields.number(key)?.filter(|number| *number != 0.0))
    };
    let attention_factor = match fields.number("attention_factor")? {
        Some(factor) => factor,
        None => match (on("mscale")?, on("mscale_all_dim")?) {
            (Some(mscale), Some(all)) => length(mscale) / length(all),
            _ => length(1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        attention_factor,
        beta_fast: on("beta_fast")?.unwrap_or(32.0),
        beta_slow: on("beta_slow")?.unwrap_or(1.0),
        truncate: fields.flag("truncate")?.unwrap_or(true),
    })
}

fn long_rope(
    fields: &Fields<'_>,
    top: &Fields<'_>,
    positions: usize,
) -> Result<RopeScaling, ConfigError> {
    let original = original_positions(fields, top)?;
    let factor = fields
        .number("factor")?
        .unwrap_or(positions as f64 / original as f64);
    let attention_factor = match fields.number("attention_factor")? {
        Some(factor) => factor,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    Ok(RopeScaling::LongRope {
        short_factor: divisors(fields, "short_factor")?,
        long_factor: divisors(fields, "long_factor")?,
        original_max_position_embeddings: original,
        attention_factor,
    })
}

/// A list of divisors of frequencies.
fn divisors(fields: &Fields<'_>, key: &str) -> Result<Vec<f64>, ConfigError> {
    let list = fields.list(key)?.ok_or_else(|| fields.missing(key))?;
    let number = |value: &Value| value.as_f64().filter(|x| x.is_finite() && *x > 0.0);
    let numbers: Option<Vec<f64>> = match list.len() <= MAX_HEAD_DIM {
        true => list.iter().map(number).collect(),
        false => None,
    };
    numbers.ok_or_else(|| {
        let expected = "a list of finite numbers above 0, one a rotated pair";
        fields.invalid(key, expected, &Value::Array(list.to_vec()))
    })
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

/// Puts `scaling` in place of both objects. What rotates of a head stays.
pub(super) fn replace(object: &mut Map<String, Value>, mut scaling: Map<String, Value>) {
    let part = "partial_rotary_factor";
    for name in ["rope_parameters", "rope_scaling"] {
        let old = object.remove(name);
        if let Some(share) = old.as_ref().and_then(|old| old.get(part)) {
            scaling.entry(part).or_insert_with(|| share.clone());
        }
    }
    if scaling.contains_key("rope_theta") {
        object.remove("rope_theta");
    }
    object.insert("rope_scaling".into(), Value::Object(scaling));
}

/// Sets the rotary keys of `object`. Kinds with keys of their own are left as they are where they say the same.
pub(super) fn write_json(
    object: &mut Map<String, Value>,
    family: &Family,
    positions: usize,
    (theta, scaling): (f64, &RopeScaling),
) {
    let older = matches!(
        scaling,
        RopeScaling::Default | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. }
    );
    if !older {
        let known = from_json(&Fields::new(object, ""), family, positions);
        if known.is_ok_and(|known| known == (theta, scaling.clone())) {
            return;
        }
    }
    let mut legacy = keys(scaling);
    let part = |object: &Map<String, Value>, name: &str| {
        let inner = object.get(name)?.as_object()?;
        inner.get("partial_rotary_factor").cloned()
    };
    if let (Value::Object(scaling), Some(part)) = (&mut legacy, part(object, "rope_scaling")) {
        scaling.insert("partial_rotary_factor".into(), part);
    }
    if object.get("rope_parameters").is_some_and(Value::is_object) {
        let mut newer = match &legacy {
            Value::Object(scaling) => scaling.clone(),
            _ => Map::from_iter([("rope_type".to_owned(), json!("default"))]),
        };
        newer.insert("rope_theta".into(), json!(theta));
        if let Some(part) = part(object, "rope_parameters") {
            newer.insert("partial_rotary_factor".into(), part);
        }
        object.insert("rope_parameters".into(), Value::Object(newer));
    }
    object.insert("rope_theta".into(), json!(theta));
    object.insert("rope_scaling".into(), legacy);
}

/// The object of a scaling; null for none.
fn keys(scaling: &RopeScaling) -> Value {
    match scaling {
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
            ORIGINAL: original_max_position_embeddings,
        }),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            ORIGINAL: original_max_position_embeddings,
            "attention_factor": attention_factor,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "truncate": truncate,
        }),
        RopeScaling::Dynamic { factor, .. } => json!({"rope_type": "dynamic", "factor": factor}),
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_max_position_embeddings,
            attention_factor,
        } => json!({
            "rope_type": "longrope",
            "short_factor": short_factor,
            "long_factor": long_factor,
            ORIGINAL: original_max_position_embeddings,
            "attention_factor": attention_factor,
        }),
    }
}
