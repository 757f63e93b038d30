//! Reads and writes YAML. The only module that names the YAML library: `serde_yaml` is no longer maintained,
//! and another library takes its place here.

use serde::de::value::Error as ListError;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use serde::{Deserialize, Serialize, forward_to_deserialize_any};
use serde_ignored::Path;

/// Why a text could not be read, with the place in it.
#[derive(Debug, thiserror::Error)]
pub enum YamlError {
    /// The text is not YAML.
    #[error("it is not valid YAML: {0}")]
    Syntax(String),
    /// A value does not fit.
    #[error("{path}: {message}")]
    Value {
        /// The path of the key, such as `models[0].name`; `.` is the whole text.
        path: String,
        /// What was found and what was expected.
        message: String,
    },
    /// A value could not be written.
    #[error("it cannot be written as YAML: {0}")]
    Write(String),
}

/// A key that the type does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownKey {
    /// The path of the section that holds it, such as `models[0]`; empty for the whole text.
    pub section: String,
    /// The key.
    pub key: String,
}

impl UnknownKey {
    /// The path of the key.
    #[must_use]
    pub fn path(&self) -> String {
        if self.section.is_empty() { self.key.clone() } else { format!("{}.{}", self.section, self.key) }
    }
}

/// One document of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Document(serde_yaml::Value);

/// The documents of a text, without empty ones.
///
/// # Errors
/// A text that is no YAML.
pub fn documents(text: &str) -> Result<Vec<Document>, YamlError> {
    let mut found = Vec::new();
    for document in serde_yaml::Deserializer::from_str(text) {
        let value = serde_yaml::Value::deserialize(document);
        match value.map_err(|error| YamlError::Syntax(error.to_string()))? {
            serde_yaml::Value::Null => {}
            value => found.push(Document(value)),
        }
    }
    Ok(found)
}

impl Document {
    /// The text at a key of the document.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.as_str()
    }

    /// Whether the document has this key.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.0.get(key).is_some()
    }

    /// As [`read`].
    ///
    /// # Errors
    /// A value that does not fit, with its path.
    pub fn read<T: DeserializeOwned>(self, mut unknown: impl FnMut(UnknownKey)) -> Result<T, YamlError> {
        let mut track = serde_path_to_error::Track::new();
        let deserializer = serde_path_to_error::Deserializer::new(self.0, &mut track);
        let read = serde_ignored::deserialize(deserializer, |path| {
            if let Path::Map { parent, key } = &path {
                unknown(UnknownKey { section: path_text(parent), key: key.clone() });
            }
        });
        read.map_err(|error: serde_yaml::Error| {
            let path = track.path().to_string();
            YamlError::Value { path, message: error.to_string() }
        })
    }
}

/// Reads a value, and calls `unknown` with each key that its type does not have, before any error is
/// returned.
///
/// # Errors
/// A text that is no YAML, or a value that does not fit, with its path.
pub fn read<T: DeserializeOwned>(text: &str, unknown: impl FnMut(UnknownKey)) -> Result<T, YamlError> {
    // An empty text is an empty section: every key is left out.
    let value = match serde_yaml::from_str(text) {
        Ok(serde_yaml::Value::Null) => serde_yaml::Value::Mapping(serde_yaml::Mapping::new()),
        Ok(value) => value,
        Err(error) => return Err(YamlError::Syntax(error.to_string())),
    };
    Document(value).read(unknown)
}

/// The text of a value, ending in a newline. [`read`] reads it back.
///
/// # Errors
/// A value that YAML has no form for.
pub fn write<T: Serialize>(value: &T) -> Result<String, YamlError> {
    serde_yaml::to_string(value).map_err(|error| YamlError::Write(error.to_string()))
}

fn path_text(path: &Path<'_>) -> String {
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", path_text(parent)),
        Path::Map { parent, key } => {
            let parent = path_text(parent);
            if parent.is_empty() { key.clone() } else { format!("{parent}.{key}") }
        }
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            path_text(parent)
        }
    }
}

/// The keys of a section, as its type has them.
#[must_use]
pub fn keys_of<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    // The lister records the fields and then refuses to go on.
    drop(T::deserialize(FieldLister(&mut fields)));
    fields
}

/// A deserializer that only notes which fields a struct asks for.
struct FieldLister<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldLister<'_> {
    type Error = ListError;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, ListError> {
        Err(ListError::custom("fields are listed and no value is read"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ListError> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    struct Outer {
        #[serde(default)]
        inner: Option<Vec<Inner>>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Inner {
        port: u16,
    }

    fn unknown(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        let _: Result<Outer, _> = read(text, |key| found.push(key.path()));
        found
    }

    #[test]
    fn unknown_keys_are_reported_with_their_path() {
        assert_eq!(unknown("inner: [{port: 1}]"), [""; 0]);
        assert_eq!(unknown("outer: 1\ninner: [{port: 1}, {port: 1, prt: 2}]"), ["outer", "inner[1].prt"]);
        assert_eq!(unknown("inner: [{prt: 2}]"), ["inner[0].prt"], "even where another key is missing");
    }

    #[test]
    fn wrong_values_have_their_path() {
        let error = read::<Outer>("inner: [{port: 70000}]", |_| ()).unwrap_err().to_string();
        assert!(error.starts_with("inner[0].port: ") && error.contains("70000"), "{error}");
        let error = read::<Outer>("inner: [", |_| ()).unwrap_err().to_string();
        assert!(error.starts_with("it is not valid YAML"), "{error}");
        assert_eq!(read::<Outer>("", |_| ()).unwrap(), Outer { inner: None });
    }

    #[test]
    fn the_keys_of_a_section_are_those_of_its_type() {
        assert_eq!(keys_of::<Outer>(), ["inner"]);
        assert_eq!(keys_of::<Inner>(), ["port"]);
    }

    #[test]
    fn documents_are_read_one_by_one_and_empty_ones_are_left_out() {
        let text = "---\n# nothing\n---\nkind: A\n---\nport: 7\nmore: 1\n---\n";
        let mut all = documents(text).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].text("kind"), all[1].text("port")), (Some("A"), None), "7 is no text");
        assert!(all[1].has("port") && !all[0].has("port"));
        let mut found = Vec::new();
        let inner: Inner = all.remove(1).read(|key| found.push(key.path())).unwrap();
        assert_eq!((inner, found), (Inner { port: 7 }, vec!["more".to_owned()]));
        assert!(documents("a: 1\n---\nb: [").unwrap_err().to_string().starts_with("it is not valid YAML"));
        assert_eq!(documents("").unwrap(), []);
    }
}
