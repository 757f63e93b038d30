//! The sections of a `config.yaml` as they are written, and their checks.
//!
//! The fields of these types are the one list of keys: errors take the known keys of a section from its type.

use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::Deserialize;
use trustformers_api::nearest;
use trustformers_proto::yaml::{self, UnknownKey, keys_of};
use trustformers_runtime::device::DeviceChoice;
use trustformers_runtime::spec::{SpeculationSpec, TextBatching};
use trustformers_store::Source;

use crate::config::{Config, ConfigError, ModelConfig, NOT_YET, ServerConfig, wrong};

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(expecting = "keys and values")]
pub(crate) struct ConfigFile {
    server: Option<ServerSection>,
    batching: Option<BatchingSection>,
    models: Option<Vec<ModelSection>>,
    monitoring: Option<MonitoringSection>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "keys and values")]
struct ServerSection {
    host: Option<String>,
    port: Option<u16>,
    grpc_port: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "keys and values")]
struct BatchingSection {
    max_batch_size: Option<usize>,
    strategy: Option<String>,
    max_wait_time_ms: Option<u32>,
    enable_priority: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "keys and values")]
struct ModelSection {
    name: Option<String>,
    path: Option<String>,
    device: Option<String>,
    max_batch_size: Option<usize>,
    speculation: Option<SpeculationSection>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "keys and values")]
struct SpeculationSection {
    ngram: Option<NgramSection>,
    draft: Option<DraftSection>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "keys and values")]
struct NgramSection {}

#[derive(Debug, Deserialize)]
#[serde(expecting = "keys and values")]
struct DraftSection {
    path: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "keys and values")]
struct MonitoringSection {
    prometheus: Option<PrometheusSection>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "keys and values")]
struct PrometheusSection {
    enabled: Option<bool>,
    port: Option<u16>,
}

/// The known keys of the section at a path.
fn known_keys(section: &str) -> &'static [&'static str] {
    let kind = section.split_once(']').map_or(section, |(_, rest)| rest.trim_start_matches('.'));
    match (section.starts_with("models["), kind) {
        (false, "") => keys_of::<ConfigFile>(),
        (false, "server") => keys_of::<ServerSection>(),
        (false, "batching") => keys_of::<BatchingSection>(),
        (false, "monitoring") => keys_of::<MonitoringSection>(),
        (false, "monitoring.prometheus") => keys_of::<PrometheusSection>(),
        (true, "") => keys_of::<ModelSection>(),
        (true, "speculation") => keys_of::<SpeculationSection>(),
        (true, "speculation.draft") => keys_of::<DraftSection>(),
        _ => &[],
    }
}

fn unknown(key: &UnknownKey) -> ConfigError {
    let path = key.path();
    if let Some((_, advice)) = NOT_YET.iter().find(|(name, _)| *name == path) {
        return ConfigError::NotAvailable { path, advice: (*advice).to_owned() };
    }
    let later = NOT_YET.iter().filter_map(|(name, _)| match name.rsplit_once('.') {
        Some((section, key_name)) => (section == key.section).then_some(key_name),
        None => key.section.is_empty().then_some(*name),
    });
    let all: Vec<&str> = known_keys(&key.section).iter().copied().chain(later).collect();
    ConfigError::UnknownKey { path, hint: nearest::hint(&key.key, &all) }
}

impl ConfigFile {
    /// Reads the sections. The first unknown key is an error before any other.
    pub(crate) fn read(text: &str) -> Result<Self, ConfigError> {
        let mut first = None;
        let file = yaml::read(text, |key| {
            first.get_or_insert(key);
        });
        match first {
            Some(key) => Err(unknown(&key)),
            None => Ok(file?),
        }
    }

    /// Checks the values and fills in defaults.
    pub(crate) fn check(self) -> Result<Config, ConfigError> {
        let server = server(self.server.unwrap_or_default())?;
        let batching = self.batching.unwrap_or_default();
        let max_batch_size = batch_size("batching", batching.max_batch_size)?;
        let batching = text_batching(batching)?;
        let models = self.models.ok_or_else(|| wrong("models", "is missing: give a list of {name, path}"))?;
        let models =
            (0..).zip(models).map(|(index, each)| model(index, each)).collect::<Result<Vec<_>, _>>()?;
        if models.is_empty() {
            return Err(wrong("models", "is empty: give at least one {name, path}"));
        }
        let prometheus = self.monitoring.and_then(|monitoring| monitoring.prometheus);
        let prometheus_port =
            prometheus.and_then(|section| section.port.filter(|_| section.enabled.unwrap_or(true)));
        if server.port == server.grpc_port && server.port != 0 {
            return Err(wrong(
                "server.grpc_port",
                "is the same as server.port; gRPC needs a port of its own",
            ));
        }
        Ok(Config { server, max_batch_size, batching, models, prometheus_port })
    }
}

fn server(section: ServerSection) -> Result<ServerConfig, ConfigError> {
    let default = ServerConfig::default();
    let host = match section.host {
        None => default.host,
        Some(text) if text == "localhost" => Ipv4Addr::LOCALHOST.into(),
        Some(text) => text.parse().map_err(|_| {
            let message =
                format!("{text:?} is not an address; use \"0.0.0.0\", \"127.0.0.1\" or this machine's own");
            wrong("server.host", message)
        })?,
    };
    let port = section.port.unwrap_or(default.port);
    Ok(ServerConfig { host, port, grpc_port: section.grpc_port.unwrap_or(default.grpc_port) })
}

fn text_batching(section: BatchingSection) -> Result<TextBatching, ConfigError> {
    let mut texts = TextBatching::default();
    if let Some(strategy) = section.strategy {
        texts.strategy = strategy.parse().map_err(|error| wrong("batching.strategy", error))?;
    }
    if let Some(max_wait_ms) = section.max_wait_time_ms {
        texts.set_max_wait_ms(max_wait_ms).map_err(|error| wrong("batching.max_wait_time_ms", error))?;
    }
    texts.priority = section.enable_priority.unwrap_or(texts.priority);
    Ok(texts)
}

fn batch_size(section: &str, size: Option<usize>) -> Result<Option<usize>, ConfigError> {
    match size {
        Some(size) if !(1..=256).contains(&size) => {
            Err(wrong(&format!("{section}.max_batch_size"), format!("{size} is not within 1 to 256")))
        }
        size => Ok(size),
    }
}

fn model(index: usize, section: ModelSection) -> Result<ModelConfig, ConfigError> {
    let place = format!("models[{index}]");
    let at = |key: &str| format!("{place}.{key}");
    let missing = |key: &str, what: &str| wrong(&at(key), format!("is missing: give {what}"));
    let name = section.name.ok_or_else(|| missing("name", "the name that callers use"))?;
    if name.is_empty() {
        return Err(wrong(&at("name"), "is empty: give the name that callers use"));
    }
    let what = "a .gguf file, or a folder with one or with a checkpoint";
    let path = section.path.ok_or_else(|| missing("path", what))?;
    let device = match section.device {
        None => DeviceChoice::Auto,
        Some(text) => text.parse().map_err(|error| wrong(&at("device"), error))?,
    };
    let max_batch_size = batch_size(&place, section.max_batch_size)?;
    let speculation = section.speculation.map(|own| speculation(&at("speculation"), own)).transpose()?;
    Ok(ModelConfig { name, path, device, max_batch_size, speculation })
}

fn speculation(path: &str, section: SpeculationSection) -> Result<SpeculationSpec, ConfigError> {
    match (section.ngram, section.draft) {
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
