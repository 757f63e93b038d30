//! Where the configuration of a server comes from: a file, or a folder of models; and what the command line
//! puts over it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use trustformers_store::Source;

use crate::config::{Config, ConfigError, FILE_NAME, ModelConfig, wrong};
use crate::documents;
use crate::model_folder::{FoundModel, find_models};

/// A file or a folder, which can be read again while the server runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSource {
    origin: Origin,
    overrides: Overrides,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    /// A `config.yaml`, or a file of `InferenceModel` documents.
    File(PathBuf),
    /// Every model in a folder.
    Folder(PathBuf),
    /// One model, where a source such as `hf://org/name` says.
    Model {
        /// The source as written; it is a path for messages only.
        text: PathBuf,
        name: String,
    },
}

/// What is said outside of the configuration and overrides it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// The address to listen on.
    pub host: Option<IpAddr>,
    /// HTTP's port.
    pub port: Option<u16>,
    /// gRPC's port.
    pub grpc_port: Option<u16>,
    /// The files of `InferenceModel`s, instead of their `spec.source.uri`.
    pub sources: SourceOverrides,
}

/// Paths by the names of models.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceOverrides(BTreeMap<String, String>);

impl FromIterator<(String, String)> for SourceOverrides {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(pairs: I) -> Self {
        Self(pairs.into_iter().collect())
    }
}

impl SourceOverrides {
    /// The path of a model.
    pub(crate) fn get(&self, name: &str) -> Option<&String> {
        self.0.get(name)
    }

    /// # Errors
    /// A name that none of the InferenceModels has.
    pub(crate) fn check_used(&self, names: &[&str]) -> Result<(), ConfigError> {
        match self.0.keys().find(|name| !names.contains(&name.as_str())) {
            Some(name) => {
                let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
                let message = format!("no InferenceModel is called {name:?}; the file has {there}");
                Err(wrong("--source", message))
            }
            None => Ok(()),
        }
    }
}

/// What was found at one time. Two that are equal give the same configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SourceContent {
    File(String),
    Folder(Vec<FoundModel>),
    Model { text: String, name: String },
}

impl ConfigSource {
    /// A `config.yaml`, or a file of `InferenceModel` documents.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { origin: Origin::File(path.into()), overrides: Overrides::default() }
    }

    /// A file as [`Self::file`], or one model of another machine: `hf://org/name`.
    pub fn file_or_model(file: impl Into<PathBuf>) -> Self {
        let file = file.into();
        let remote = file.to_str().and_then(|text| text.parse::<Source>().ok());
        match remote.filter(|source| source.remote().is_some()) {
            Some(source) => {
                let name = source.suggested_name().unwrap_or_else(|| "model".to_owned());
                let origin = Origin::Model { text: file, name };
                Self { origin, overrides: Overrides::default() }
            }
            None => Self::file(file),
        }
    }

    /// Every model in a folder, with the defaults of a configuration.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self { origin: Origin::Folder(path.into()), overrides: Overrides::default() }
    }

    /// The file `config.yaml` of the working directory where it exists, else the models of `folder`.
    pub fn file_or_folder(folder: impl Into<PathBuf>) -> Self {
        if Path::new(FILE_NAME).exists() { Self::file(FILE_NAME) } else { Self::folder(folder) }
    }

    /// Puts settings over what the configuration says.
    #[must_use]
    pub fn with_overrides(mut self, overrides: Overrides) -> Self {
        self.overrides = overrides;
        self
    }

    /// The file or the folder.
    pub fn path(&self) -> &Path {
        match &self.origin {
            Origin::File(path) | Origin::Folder(path) | Origin::Model { text: path, .. } => path,
        }
    }

    /// Reads the configuration.
    ///
    /// # Errors
    /// What cannot be read or honoured.
    pub fn config(&self) -> Result<Config, ConfigError> {
        self.config_of(&self.read()?)
    }

    /// What is there now.
    pub(crate) fn read(&self) -> Result<SourceContent, ConfigError> {
        match &self.origin {
            Origin::File(path) => match std::fs::read_to_string(path) {
                Ok(text) => Ok(SourceContent::File(text)),
                Err(cause) => Err(ConfigError::Unreadable { path: path.clone(), cause }),
            },
            Origin::Folder(path) => Ok(SourceContent::Folder(find_models(path)?)),
            Origin::Model { text, name } => {
                Ok(SourceContent::Model { text: text.to_string_lossy().into_owned(), name: name.clone() })
            }
        }
    }

    /// The configuration that this means.
    pub(crate) fn config_of(&self, reading: &SourceContent) -> Result<Config, ConfigError> {
        let Overrides { host, port, grpc_port, sources } = &self.overrides;
        let mut config = match reading {
            SourceContent::File(text) => documents::read(text, sources)?,
            SourceContent::Folder(models) => of_models(models.iter().map(FoundModel::config).collect()),
            SourceContent::Model { text, name } => {
                of_models(vec![ModelConfig::new(name.clone(), text.clone())])
            }
        };
        let server = &mut config.server;
        server.host = host.unwrap_or(server.host);
        server.port = port.unwrap_or(server.port);
        server.grpc_port = grpc_port.unwrap_or(server.grpc_port);
        Ok(config)
    }
}

/// Models with the defaults of a configuration.
fn of_models(models: Vec<ModelConfig>) -> Config {
    Config { models, ..Config::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ServerConfig;

    #[test]
    fn a_model_of_another_machine_is_served_under_its_own_name() {
        let config = ConfigSource::file_or_model("hf://org/tiny@v1").config().unwrap();
        assert_eq!(
            (config.models[0].name.as_str(), config.models[0].path.as_str()),
            ("tiny", "hf://org/tiny@v1")
        );
        for file in ["model.yaml", "file:///m.yaml"] {
            assert_eq!(ConfigSource::file_or_model(file), ConfigSource::file(file));
        }
    }

    #[test]
    fn the_command_line_overrides_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.yaml");
        let manifest = "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
             metadata: {name: a}\nspec: {source: {uri: 'pvc://x/y'}}\n";
        std::fs::write(&path, format!("server: {{port: 1, grpc_port: 2}}\n---\n{manifest}")).unwrap();
        let source = |name: &str| SourceOverrides::from_iter([(name.to_owned(), "/a".to_owned())]);
        let overrides = Overrides {
            host: Some("127.0.0.1".parse().unwrap()),
            port: Some(3),
            grpc_port: None,
            sources: source("a"),
        };
        let config = ConfigSource::file(&path).with_overrides(overrides).config().unwrap();
        let ServerConfig { host, port, grpc_port, .. } = config.server;
        assert_eq!((host.to_string().as_str(), port, grpc_port), ("127.0.0.1", 3, 2));
        assert_eq!(config.models[0].path, "/a");
        let wrong = Overrides { sources: source("b"), ..Overrides::default() };
        let error = ConfigSource::file(&path).with_overrides(wrong).config().unwrap_err().to_string();
        assert!(error.contains("spec.source.uri: pvc://"), "{error}");
        std::fs::write(&path, "models: [{name: b, path: /b}]").unwrap();
        let wrong = Overrides { sources: source("b"), ..Overrides::default() };
        let error = ConfigSource::file(&path).with_overrides(wrong).config().unwrap_err().to_string();
        assert_eq!(error, "--source: no InferenceModel is called \"b\"; the file has none");
        let error = ConfigSource::file(folder.path().join("none")).config().unwrap_err().to_string();
        assert!(error.contains("none cannot be read"), "{error}");
    }
}
