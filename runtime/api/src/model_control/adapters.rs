//! The adapters in a request to load a model.

use serde_json::{Map, Value};
use trustformers_proto::v1;

use super::{given, text};
use crate::error::ApiError;
use crate::json_body::{found, take};

const ADAPTER_FIELDS: &[&str] = &["name", "path", "sha256"];
/// Most adapters of one load: each is read whole before the model is put on its device.
const MAX_ADAPTERS: usize = 32;

/// An adapter (LoRA) to load with its model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadAdapter {
    /// The name that callers use, alone or behind the model's name and a colon.
    pub name: String,
    /// A folder on the server's machine with the adapter as PEFT writes it, or a `file://` URI.
    pub path: String,
    /// The digest that its files must have, 64 hex digits.
    pub sha256: Option<String>,
}

/// Those of a JSON body.
pub(super) fn of_json(load: &Map<String, Value>) -> Result<Vec<LoadAdapter>, ApiError> {
    let list = take(load, "adapters", "a list of objects", |value| value.as_array().cloned())?;
    let read = |(index, value): (usize, &Value)| {
        let place = format!("adapters[{index}]");
        let object = value.as_object().ok_or_else(|| {
            let why = format!("expected an object with a name and a path, found {}", found(value));
            ApiError::field(&place, why)
        })?;
        if let Some(field) = object.keys().find(|field| !ADAPTER_FIELDS.contains(&field.as_str())) {
            let why = format!("there is no such field; there are {}", ADAPTER_FIELDS.join(", "));
            return Err(ApiError::field(&format!("{place}.{field}"), why));
        }
        Ok(LoadAdapter {
            name: text(object, "name")?.unwrap_or_default(),
            path: text(object, "path")?.unwrap_or_default(),
            sha256: text(object, "sha256")?,
        })
    };
    list.unwrap_or_default().iter().enumerate().map(read).collect()
}

/// Those of a message.
pub(super) fn of_proto(adapters: Vec<v1::AdapterFiles>) -> Vec<LoadAdapter> {
    let read = |adapter: v1::AdapterFiles| {
        let v1::AdapterFiles { name, path, sha256 } = adapter;
        LoadAdapter { name, path, sha256: given(sha256) }
    };
    adapters.into_iter().map(read).collect()
}

/// # Errors
/// There are too many, or one has no name or no path. Which names can be used is the server's matter.
pub(super) fn check(adapters: &[LoadAdapter]) -> Result<(), ApiError> {
    if adapters.len() > MAX_ADAPTERS {
        let why = format!("{} are too many: give at most {MAX_ADAPTERS}", adapters.len());
        return Err(ApiError::field("adapters", why));
    }
    for (index, adapter) in adapters.iter().enumerate() {
        let missing = |field: &str, what: &str| {
            ApiError::field(&format!("adapters[{index}].{field}"), format!("is missing: give {what}"))
        };
        if adapter.name.is_empty() {
            return Err(missing("name", "the name that callers will use"));
        }
        if adapter.path.is_empty() {
            return Err(missing("path", "a folder with adapter_config.json and adapter_model.safetensors"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(adapters: &Value) -> Result<Vec<LoadAdapter>, String> {
        let Value::Object(load) = json!({"adapters": adapters}) else { unreachable!() };
        let adapters = of_json(&load).and_then(|adapters| check(&adapters).map(|()| adapters));
        adapters.map_err(|error| error.to_string())
    }

    #[test]
    fn a_wrong_adapter_is_refused_with_its_place() {
        let good = json!({"name": "sql", "path": "/a"});
        assert_eq!(read(&json!([good])).unwrap()[0].name, "sql");
        assert!(read(&Value::Null).unwrap().is_empty());
        for (adapters, says) in [
            (json!("sql"), "adapters"),
            (json!([good, 3]), "adapters[1]"),
            (json!([good, {"name": "a", "path": "/b", "rank": 4}]), "adapters[1].rank"),
            (json!([{"path": "/a"}]), "adapters[0].name"),
            (json!([{"name": "a"}]), "adapters[0].path"),
            (Value::Array(vec![good.clone(); MAX_ADAPTERS + 1]), "too many"),
        ] {
            let error = read(&adapters).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
