//! A configuration as text: one `config.yaml`, `InferenceModel` documents, or both in one file.

use trustformers_proto::yaml::{self, Document};

use crate::config::{Config, ConfigError, wrong};
use crate::config_file::ConfigFile;
use crate::config_source::SourceOverrides;
use crate::inference_model::{self, KIND, ServedModel};

/// Reads the documents of a text. At most one of them is a `config.yaml`: it says where to listen, and may
/// have further models. The others are `InferenceModel`s.
///
/// # Errors
/// What cannot be honoured, with its path.
pub(crate) fn read(text: &str, sources: &SourceOverrides) -> Result<Config, ConfigError> {
    let mut settings = None;
    let mut models: Vec<ServedModel> = Vec::new();
    for document in yaml::documents(text)? {
        if is_manifest(&document) {
            models.push(inference_model::read(document, sources)?);
        } else if settings.is_none() {
            settings = Some(ConfigFile::read(document)?);
        } else {
            let message = format!(
                "the file has two documents that are no {KIND}; put the settings of the server into one of them"
            );
            return Err(wrong(".", message));
        }
    }
    let names: Vec<&str> = models.iter().map(|model| model.config.name.as_str()).collect();
    sources.check_used(&names)?;
    let mut config = settings.unwrap_or_default().check(!models.is_empty())?;
    if let Some(longest) = models.iter().map(|model| model.drain_timeout_ms).max() {
        // The server waits for the model whose answers may take longest.
        config.server.drain_timeout_ms = config.server.drain_timeout_ms.max(longest);
    }
    config.models.extend(models.into_iter().map(|model| model.config));
    config.check_names()?;
    config.check_remote()?;
    Ok(config)
}

fn is_manifest(document: &Document) -> bool {
    document.has("kind") || document.has("apiVersion")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::str::FromStr;

    const CHAT: &str = "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
         metadata: {name: chat}\nspec: {source: {uri: /models/chat.gguf}}\n";
    const SEARCH: &str = "kind: InferenceModel\napiVersion: serving.trustformers.dev/v1alpha1\n\
         metadata: {name: search, namespace: team}\nspec: {source: {uri: 'file:///models/minilm'}, traffic: {drainTimeout: 2m}}\n";

    #[test]
    fn a_file_holds_models_settings_or_both() {
        let config = Config::from_str(&format!("{CHAT}---\n{SEARCH}---\n")).unwrap();
        let names: Vec<_> = config.models.iter().map(|model| model.name.as_str()).collect();
        assert_eq!((names, config.server.port), (vec!["chat", "search"], 8080));
        assert_eq!(config.server.drain_timeout_ms, 120_000, "the longest of the models");
        let both = format!("{CHAT}---\nserver: {{port: 1}}\nmodels: [{{name: a, path: /a}}]\n---\n{SEARCH}");
        let config = Config::from_str(&both).unwrap();
        let names: Vec<_> = config.models.iter().map(|model| model.name.as_str()).collect();
        assert_eq!((names, config.server.port), (vec!["a", "chat", "search"], 1));
        let printed = config.effective().to_yaml().unwrap();
        assert_eq!(Config::from_str(&printed).unwrap(), config.effective(), "{printed}");
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        for (text, says) in [
            ("server: {port: 1}\n---\nserver: {port: 2}".to_owned(), "two documents"),
            (format!("{CHAT}---\n{CHAT}"), "\"chat\" is given twice"),
            ("kind: Pod\nmetadata: {name: a}".to_owned(), "kind: Pod cannot be served"),
            ("kind: InferenceModel\nmetadata: {name: a}".to_owned(), "apiVersion: is missing"),
            ("server: {port: 1}".to_owned(), "models: is missing"),
            (format!("{CHAT}---\nservr: {{}}"), "servr: there is no such key"),
        ] {
            let error = Config::from_str(&text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
