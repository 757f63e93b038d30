//! How tokens are guessed: the section `models[].speculation` of a `config.yaml`.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use trustformers_runtime::spec::SpeculationSpec;
use trustformers_store::Source;

use crate::config::{ConfigError, wrong};
use crate::config_file::source_text;

/// `speculation` as it is written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
pub(crate) struct SpeculationSection {
    #[serde(skip_serializing_if = "Option::is_none")]
    ngram: Option<NgramSection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    draft: Option<DraftSection>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
struct NgramSection {}

/// The model that guesses.
#[derive(Debug, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
pub(crate) struct DraftSection {
    path: Option<String>,
}

impl SpeculationSection {
    /// The section of a configuration.
    pub(crate) fn of(speculation: &SpeculationSpec) -> Self {
        match speculation {
            SpeculationSpec::Ngram => Self { ngram: Some(NgramSection {}), draft: None },
            SpeculationSpec::Draft(source) => {
                let path = source.path().map_or_else(|| source.to_string(), source_text);
                Self { ngram: None, draft: Some(DraftSection { path: Some(path) }) }
            }
        }
    }

    /// What it means, at its path in the file.
    ///
    /// # Errors
    /// None or both of the ways, or a source that can't be read.
    pub(crate) fn read(self, path: &str) -> Result<SpeculationSpec, ConfigError> {
        match (self.ngram, self.draft) {
            (Some(NgramSection {}), None) => Ok(SpeculationSpec::Ngram),
            (None, Some(DraftSection { path: draft })) => {
                let at = format!("{path}.draft.path");
                let text =
                    draft.ok_or_else(|| wrong(&at, "is missing: give a .gguf file, or a folder with one"))?;
                Ok(SpeculationSpec::Draft(Source::from_str(&text).map_err(|error| wrong(&at, error))?))
            }
            _ => Err(wrong(path, "give one of {ngram: {}} and {draft: {path: ...}}")),
        }
    }
}
