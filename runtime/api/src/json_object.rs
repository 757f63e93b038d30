//! An object inside a JSON body, with its path, so that errors about nested fields name them in full:
//! `tools[2].name`.

use serde_json::{Map, Value};

use crate::echo::echo;
use crate::error::ApiError;
use crate::json_body::found;
use crate::nearest;

/// A field of another server that this one refuses where it is given.
#[derive(Debug)]
pub(crate) struct UnsupportedField {
    /// Its name.
    pub(crate) name: &'static str,
    /// What to do instead.
    pub(crate) instead: &'static str,
}

/// An object of a body and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct ObjectAt<'a> {
    object: &'a Map<String, Value>,
    /// Empty for the body itself.
    path: String,
}

impl<'a> ObjectAt<'a> {
    /// The body.
    pub(crate) fn body(object: &'a Map<String, Value>) -> Self {
        Self { object, path: String::new() }
    }

    /// The object at `path`.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] where the value is no object.
    pub(crate) fn new(value: &'a Value, path: impl Into<String>) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(object) => Ok(Self { object, path }),
            other => Err(ApiError::field(&path, format!("expected an object, found {}", found(other)))),
        }
    }

    /// All of its fields.
    pub(crate) fn entries(&self) -> &'a Map<String, Value> {
        self.object
    }

    /// The full name of a field.
    pub(crate) fn field(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// An error about a field.
    pub(crate) fn error(&self, key: &str, message: impl std::fmt::Display) -> ApiError {
        ApiError::field(&self.field(key), message)
    }

    /// The value of a field; `null` is the same as leaving it out.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// The converted value of a field.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] that says what was expected and what was found.
    pub(crate) fn read<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || self.error(key, format!("expected {expected}, found {}", found(value)));
        convert(value).map(Some).ok_or_else(wrong)
    }

    /// A text.
    ///
    /// # Errors
    /// Another value than a string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ApiError> {
        self.read(key, "a string", Value::as_str)
    }

    /// A text that must be given.
    ///
    /// # Errors
    /// A missing field, or another value than a string.
    pub(crate) fn required_text(&self, key: &str) -> Result<&'a str, ApiError> {
        self.text(key)?.ok_or_else(|| self.error(key, "is missing: give a string"))
    }

    /// A flag.
    ///
    /// # Errors
    /// Another value than true or false.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, ApiError> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// A number of things.
    ///
    /// # Errors
    /// Another value than a whole number that 32 bits hold.
    pub(crate) fn count(&self, key: &str) -> Result<Option<u32>, ApiError> {
        self.read(key, "a whole number from 0 to 4294967295", |value| {
            value.as_u64().and_then(|count| u32::try_from(count).ok())
        })
    }

    /// A list.
    ///
    /// # Errors
    /// Another value than a list.
    pub(crate) fn list(&self, key: &str) -> Result<Option<&'a [Value]>, ApiError> {
        self.read(key, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    /// An object inside this one.
    ///
    /// # Errors
    /// Another value than an object.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>, ApiError> {
        self.get(key).map(|value| Self::new(value, self.field(key))).transpose()
    }

    /// One of some words.
    ///
    /// # Errors
    /// Another value than one of `words`.
    pub(crate) fn word(&self, key: &str, words: &[&str]) -> Result<Option<&'a str>, ApiError> {
        let Some(found) = self.text(key)? else { return Ok(None) };
        if words.contains(&found) {
            return Ok(Some(found));
        }
        Err(self.error(key, format!("there is no {:?}; {}", echo(found), nearest::hint(found, words))))
    }

    /// Refuses unsupported fields, unless they are null or an empty list.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] that names the field and says what to do instead.
    pub(crate) fn refuse(&self, fields: &[UnsupportedField]) -> Result<(), ApiError> {
        let asks = |value: &Value| !value.as_array().is_some_and(Vec::is_empty);
        match fields.iter().find(|field| self.get(field.name).is_some_and(asks)) {
            None => Ok(()),
            Some(UnsupportedField { name, instead }) => {
                Err(self.error(name, format!("is not supported: {instead}")))
            }
        }
    }

    /// Refuses keys that are not among the `known` ones.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] that names the key and the nearest known one.
    pub(crate) fn only(&self, known: &[&str]) -> Result<(), ApiError> {
        match self.object.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let hint = nearest::hint(key, known);
                Err(self.error(&echo(key), format!("there is no such field here; {hint}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_read_and_null_is_absent() {
        let value = json!({"a": "x", "b": null, "c": true, "d": [1], "e": {"f": "y"}, "g": 7, "h": []});
        let at = ObjectAt::new(&value, "list[1]").unwrap();
        assert_eq!(
            (at.text("a").unwrap(), at.text("b").unwrap(), at.text("z").unwrap()),
            (Some("x"), None, None)
        );
        assert_eq!((at.flag("c").unwrap(), at.count("g").unwrap()), (Some(true), Some(7)));
        assert_eq!(at.list("d").unwrap(), Some(&[json!(1)][..]));
        assert_eq!(at.object("e").unwrap().unwrap().required_text("f").unwrap(), "y");
        assert_eq!(at.word("a", &["x", "y"]).unwrap(), Some("x"));
        assert!(at.only(&["a", "b", "c", "d", "e", "g", "h"]).is_ok());
        let refused = |name| at.refuse(&[UnsupportedField { name, instead: "leave it out" }]);
        assert!(refused("b").is_ok() && refused("h").is_ok() && refused("z").is_ok());
        assert_eq!(refused("d").unwrap_err().to_string(), "list[1].d: is not supported: leave it out");
    }

    #[test]
    fn errors_name_the_whole_path() {
        let value = json!({"a": 7, "e": {"f": 1}, "w": "temprature"});
        let at = ObjectAt::new(&value, "list[1]").unwrap();
        let inner = at.object("e").unwrap().unwrap();
        for (error, text) in [
            (at.text("a").unwrap_err(), "list[1].a: expected a string, found 7"),
            (at.required_text("z").unwrap_err(), "list[1].z: is missing"),
            (inner.flag("f").unwrap_err(), "list[1].e.f: expected true or false"),
            (
                at.word("w", &["temperature"]).unwrap_err(),
                "list[1].w: there is no \"temprature\"; did you mean",
            ),
            (at.only(&["a", "w"]).unwrap_err(), "list[1].e: there is no such field here"),
            (ObjectAt::new(&json!([1]), "x").unwrap_err(), "x: expected an object, found [1]"),
        ] {
            assert!(error.to_string().starts_with(text), "{error}");
        }
    }
}
