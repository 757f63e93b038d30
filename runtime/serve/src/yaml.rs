//! Reads one section of a YAML file by name, so that every error carries the path of the key at fault.
//!
//! Deriving would be shorter, but its errors name neither the path nor the nearest known key, and cannot tell a key that
//! is not known from one that is promised and not built yet.

use serde::de::DeserializeOwned;
use serde_yaml::{Mapping, Value};
use trustformers_api::nearest;

use crate::config::ConfigError;

/// A mapping whose keys are all known.
#[derive(Debug)]
pub(crate) struct Section {
    path: String,
    entries: Mapping,
}

/// The keys that a section may have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keys {
    /// Keys that are honoured.
    pub(crate) known: &'static [&'static str],
    /// Keys that are promised and not built yet, each with what to do meanwhile.
    pub(crate) later: &'static [(&'static str, &'static str)],
}

impl Section {
    /// Checks every key of the mapping at `path`. Nothing at all is an empty section.
    pub(crate) fn read(path: &str, value: Value, keys: Keys) -> Result<Self, ConfigError> {
        let entries = match value {
            Value::Mapping(entries) => entries,
            Value::Null => Mapping::new(),
            other => return Err(wrong(path, format!("expected keys and values, found {}", kind(&other)))),
        };
        for key in entries.keys() {
            let Value::String(name) = key else {
                return Err(wrong(path, format!("a key must be a name, found {}", kind(key))));
            };
            if keys.known.contains(&name.as_str()) {
                continue;
            }
            let path = join(path, name);
            if let Some((_, advice)) = keys.later.iter().find(|(later, _)| later == name) {
                return Err(ConfigError::NotAvailable { path, advice: (*advice).to_owned() });
            }
            let all: Vec<&str> =
                keys.known.iter().copied().chain(keys.later.iter().map(|(name, _)| *name)).collect();
            return Err(ConfigError::UnknownKey { path, hint: nearest::hint(name, &all) });
        }
        Ok(Self { path: path.to_owned(), entries })
    }

    /// The path of a key of this section.
    pub(crate) fn path_of(&self, key: &str) -> String {
        join(&self.path, key)
    }

    /// Takes a value out; `null` is the same as leaving it out.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>, ConfigError> {
        match self.take_raw(key) {
            None => Ok(None),
            Some(value) => {
                let path = self.path_of(key);
                serde_yaml::from_value(value).map(Some).map_err(|error| wrong(&path, error))
            }
        }
    }

    /// Takes a value out that must be there.
    pub(crate) fn need<T: DeserializeOwned>(&mut self, key: &str, what: &str) -> Result<T, ConfigError> {
        self.take(key)?.ok_or_else(|| wrong(&self.path_of(key), format!("is missing: give {what}")))
    }

    /// Takes a section of this section out.
    pub(crate) fn section(&mut self, key: &str, keys: Keys) -> Result<Option<Self>, ConfigError> {
        let path = self.path_of(key);
        self.take_raw(key).map(|value| Self::read(&path, value, keys)).transpose()
    }

    fn take_raw(&mut self, key: &str) -> Option<Value> {
        self.entries.remove(key).filter(|value| !value.is_null())
    }
}

/// A wrong value at a path.
pub(crate) fn wrong(path: &str, message: impl std::fmt::Display) -> ConfigError {
    ConfigError::Value { path: path.to_owned(), message: message.to_string() }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Sequence(_) => "a list",
        Value::Mapping(_) => "keys and values",
        Value::Tagged(_) => "a tagged value",
    }
}
