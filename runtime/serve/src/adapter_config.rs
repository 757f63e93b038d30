//! The adapters of a model: the list `models[].adapters` of a `config.yaml`.

use serde::{Deserialize, Serialize};
use trustformers_runtime::adapters::AdapterSpec;
use trustformers_store::Source;

use crate::config::{ConfigError, wrong};
use crate::config_file::source_text;

/// An adapter as it is written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
pub(crate) struct AdapterSection {
    name: Option<String>,
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

impl AdapterSection {
    /// The section of a configuration.
    pub(crate) fn of(adapter: &AdapterSpec) -> Self {
        let AdapterSpec { name, source, sha256 } = adapter;
        let path = source.path().map_or_else(|| source.to_string(), source_text);
        Self { name: Some(name.clone()), path: Some(path), sha256: sha256.clone() }
    }
}

/// What a list means, at its path in the file.
///
/// # Errors
/// An adapter without a name or a source, a source that can't be read, or a name that can't be used.
pub(crate) fn read(path: &str, sections: Vec<AdapterSection>) -> Result<Vec<AdapterSpec>, ConfigError> {
    let read = |(index, section): (usize, AdapterSection)| {
        let at = |key: &str| format!("{path}[{index}].{key}");
        let missing = |key: &str, what: &str| wrong(&at(key), format!("is missing: give {what}"));
        let name =
            section.name.ok_or_else(|| missing("name", "the name that callers write after the model's"))?;
        let text =
            section.path.ok_or_else(|| missing("path", "a folder with an adapter as PEFT writes it"))?;
        let source = text.parse::<Source>().map_err(|error| wrong(&at("path"), error))?;
        Ok(AdapterSpec { name, source, sha256: section.sha256 })
    };
    let read: Result<Vec<AdapterSpec>, ConfigError> = sections.into_iter().enumerate().map(read).collect();
    let adapters = read?;
    AdapterSpec::check_names(adapters.iter().map(|adapter| adapter.name.as_str()))
        .map_err(|(index, why)| wrong(&format!("{path}[{index}].name"), why))?;
    Ok(adapters)
}
