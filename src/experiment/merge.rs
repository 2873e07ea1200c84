//! Laying one TOML tree over another.

use toml::{Table, Value};

use super::error::{ExperimentError, Result};

/// Lays `over` over `tree`: tables key by key, everything else as a whole.
pub(super) fn lay_over(tree: &mut Table, over: &Table) {
    for (key, value) in over {
        match (tree.get_mut(key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => lay_over(below, above),
            _ => drop(tree.insert(key.clone(), value.clone())),
        }
    }
}

/// [`lay_over`], but a table over a list of tables goes over those of the names that are its keys.
///
/// # Errors
/// [`ExperimentError::Key`] for a name that is not in the list, under `path`.
pub(super) fn lay_over_named(tree: &mut Table, over: &Table, path: &str) -> Result<()> {
    for (key, value) in over {
        match (tree.get_mut(key), value) {
            (Some(Value::Array(list)), Value::Table(named)) => {
                for (name, above) in named {
                    let path = format!("{path}.{key}.{name}");
                    let Value::Table(above) = above else {
                        return Err(ExperimentError::key(path, "a table", above.type_str()));
                    };
                    lay_over(find(list, name, &path)?, above);
                }
            }
            (Some(Value::Table(below)), Value::Table(above)) => lay_over(below, above),
            _ => drop(tree.insert(key.clone(), value.clone())),
        }
    }
    Ok(())
}

/// The table of the list whose `name` is this.
fn find<'a>(list: &'a mut [Value], name: &str, path: &str) -> Result<&'a mut Table> {
    let name_of = |value: &Value| Some(value.get("name")?.as_str()?.to_owned());
    let names: Vec<String> = list.iter().filter_map(name_of).collect();
    let found = list
        .iter_mut()
        .filter(|value| name_of(value).as_deref() == Some(name))
        .find_map(Value::as_table_mut);
    found.ok_or_else(|| {
        let expected = format!("one of {}", names.join(", "));
        ExperimentError::key(path, expected, format!("`{name}`"))
    })
}

/// Sets the key with this dotted path, making the tables on the way. The text is TOML, or else a string.
///
/// # Errors
/// [`ExperimentError::Key`] where something on the way is no table.
pub(super) fn set(tree: &mut Table, path: &str, text: &str) -> Result<()> {
    let parsed = format!("x = {text}").parse::<Table>().ok();
    let value = parsed.and_then(|mut table| table.remove("x"));
    let value = value.unwrap_or_else(|| Value::String(text.to_owned()));
    let (folders, last) = path.rsplit_once('.').unwrap_or(("", path));
    let mut table = tree;
    for folder in folders.split('.').filter(|f| !f.is_empty()) {
        let entry = table.entry(folder).or_insert(Value::Table(Table::new()));
        let got = entry.type_str();
        table = entry
            .as_table_mut()
            .ok_or_else(|| ExperimentError::key(folder, "a table", got))?;
    }
    table.insert(last.to_owned(), value);
    Ok(())
}
