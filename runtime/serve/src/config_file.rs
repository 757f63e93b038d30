//! The sections of a `config.yaml` as they are written, their checks, and the way back to text.
//!
//! The fields of these types are the one list of keys: errors take the known keys of a section from its type.

use std::net::Ipv4Addr;
use std::path::Path;

use serde::{Deserialize, Serialize};
use trustformers_api::browser::AllowedOrigins;
use trustformers_api::nearest;
use trustformers_engine::{KvType, Numerics};
use trustformers_proto::Task;
use trustformers_proto::yaml::{Document, UnknownKey, keys_of};
use trustformers_runtime::spec::{TextBatching, kv_cache_of, numerics_of};

use crate::adapter_config::{self, AdapterSection};
use crate::config::{
    AdminConfig, BatchingConfig, Config, ConfigError, ModelConfig, NOT_YET, ServerConfig, check_batch_size,
    wrong,
};
use crate::remote::{self, EndpointSection, HighAvailabilitySection, LoadBalancingSection};
use crate::speculation_config::{DraftSection, SpeculationSection};
use crate::tracing_config::{self, ExporterSection};

/// The whole file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
pub(crate) struct ConfigFile {
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<ServerSection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    batching: Option<BatchingSection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    models: Option<Vec<ModelSection>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load_balancing: Option<LoadBalancingSection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    high_availability: Option<HighAvailabilitySection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    monitoring: Option<MonitoringSection>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
struct ServerSection {
    host: Option<String>,
    port: Option<u16>,
    grpc_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allowed_origins: Option<Vec<String>>,
    model_control: Option<bool>,
    drain_timeout_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    admin: Option<AdminSection>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
struct AdminSection {
    port: Option<u16>,
    keys: Option<String>,
    audience: Option<String>,
    subject: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    issuer: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
struct BatchingSection {
    max_batch_size: Option<usize>,
    strategy: Option<String>,
    max_wait_time_ms: Option<u32>,
    enable_priority: Option<bool>,
}

/// The batching of one model, whose `max_batch_size` stands beside it.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
struct ModelBatchingSection {
    strategy: Option<String>,
    max_wait_time_ms: Option<u32>,
    enable_priority: Option<bool>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
struct ModelSection {
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    aliases: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoints: Option<Vec<EndpointSection>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    task: Option<Task>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    numerics: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_cache: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    context_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_batch_size: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_queue: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    batching: Option<ModelBatchingSection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    speculation: Option<SpeculationSection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapters: Option<Vec<AdapterSection>>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
struct MonitoringSection {
    #[serde(skip_serializing_if = "Option::is_none")]
    prometheus: Option<PrometheusSection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    otlp: Option<ExporterSection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    jaeger: Option<ExporterSection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    zipkin: Option<ExporterSection>,
}

#[derive(Debug, Serialize, Deserialize)]
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
        (false, "load_balancing") => keys_of::<LoadBalancingSection>(),
        (false, "high_availability") => keys_of::<HighAvailabilitySection>(),
        (false, "monitoring") => keys_of::<MonitoringSection>(),
        (false, "monitoring.prometheus") => keys_of::<PrometheusSection>(),
        (false, "monitoring.otlp" | "monitoring.jaeger" | "monitoring.zipkin") => {
            keys_of::<ExporterSection>()
        }
        (true, "") => keys_of::<ModelSection>(),
        (true, "batching") => keys_of::<ModelBatchingSection>(),
        (true, kind) if kind.starts_with("endpoints[") => keys_of::<EndpointSection>(),
        (true, "speculation") => keys_of::<SpeculationSection>(),
        (true, "speculation.draft") => keys_of::<DraftSection>(),
        (true, kind) if kind.starts_with("adapters") => keys_of::<AdapterSection>(),
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
    pub(crate) fn read(document: Document) -> Result<Self, ConfigError> {
        let mut first = None;
        let file = document.read(|key| {
            first.get_or_insert(key);
        });
        match first {
            Some(key) => Err(unknown(&key)),
            None => Ok(file?),
        }
    }

    /// Checks the values and fills in defaults. The models may be left out where others are added to them.
    pub(crate) fn check(self, others: bool) -> Result<Config, ConfigError> {
        let server = server(self.server.unwrap_or_default())?;
        let batching = batching(self.batching.unwrap_or_default())?;
        let models = match self.models {
            Some(models) => models,
            None if others => Vec::new(),
            None => return Err(wrong("models", "is missing: give a list of {name, path}")),
        };
        let models =
            (0..).zip(models).map(|(index, each)| model(index, each)).collect::<Result<Vec<_>, _>>()?;
        if models.is_empty() && !others {
            return Err(wrong("models", "is empty: give at least one {name, path}"));
        }
        let MonitoringSection { prometheus, otlp, jaeger, zipkin } = self.monitoring.unwrap_or_default();
        let tracing = tracing_config::options([otlp, jaeger, zipkin])?;
        let prometheus_port =
            prometheus.and_then(|section| section.port.filter(|_| section.enabled.unwrap_or(true)));
        if server.port == server.grpc_port && server.port != 0 {
            return Err(wrong(
                "server.grpc_port",
                "is the same as server.port; gRPC needs a port of its own",
            ));
        }
        let load_balancing = self.load_balancing.map(LoadBalancingSection::read).transpose()?;
        let high_availability = self.high_availability.map(HighAvailabilitySection::read);
        Ok(Config { server, batching, models, prometheus_port, tracing, load_balancing, high_availability })
    }

    /// The sections of a configuration.
    pub(crate) fn of(config: &Config) -> Self {
        let Config { server, batching, models, prometheus_port, tracing, load_balancing, high_availability } =
            config;
        let ServerConfig { host, port, grpc_port, ref allowed_origins, model_control, .. } = *server;
        let prometheus =
            prometheus_port.map(|port| PrometheusSection { enabled: Some(true), port: Some(port) });
        let [otlp, jaeger, zipkin] = ExporterSection::of(tracing.as_ref());
        let monitored = prometheus.is_some() || tracing.is_some();
        Self {
            server: Some(ServerSection {
                host: Some(host.to_string()),
                port: Some(port),
                grpc_port: Some(grpc_port),
                allowed_origins: origins(allowed_origins),
                model_control: Some(model_control),
                drain_timeout_ms: Some(server.drain_timeout_ms),
                admin: server.admin.as_ref().map(AdminSection::of),
            }),
            batching: Some(BatchingSection::of(batching)),
            models: Some(models.iter().map(ModelSection::of).collect()),
            load_balancing: load_balancing.as_ref().map(LoadBalancingSection::of),
            high_availability: high_availability.as_ref().map(HighAvailabilitySection::of),
            monitoring: monitored.then_some(MonitoringSection { prometheus, otlp, jaeger, zipkin }),
        }
    }
}

impl AdminSection {
    fn of(admin: &AdminConfig) -> Self {
        let AdminConfig { port, keys, audience, subject, issuer } = admin.clone();
        Self { port: Some(port), keys: Some(keys), audience: Some(audience), subject: Some(subject), issuer }
    }

    fn check(self) -> Result<AdminConfig, ConfigError> {
        let Self { port, keys, audience, subject, issuer } = self;
        let given = |key: &str, value: Option<String>, what: &str| {
            let missing = || wrong(&format!("server.admin.{key}"), format!("is missing: give {what}"));
            value.filter(|value| !value.is_empty()).ok_or_else(missing)
        };
        Ok(AdminConfig {
            port: port.ok_or_else(|| {
                wrong("server.admin.port", "is missing: give the port of the models' changes")
            })?,
            keys: given("keys", keys, "a file with the public keys of tokens, a JSON Web Key Set")?,
            audience: given("audience", audience, "the audience that a token must be made for")?,
            subject: given("subject", subject, "the subject that a token must have")?,
            issuer,
        })
    }
}

impl BatchingSection {
    fn of(batching: &BatchingConfig) -> Self {
        let BatchingConfig { max_batch_size, max_wait_time_ms, strategy, enable_priority } = *batching;
        Self {
            max_batch_size: Some(max_batch_size),
            strategy: Some(strategy.to_string()),
            max_wait_time_ms: Some(max_wait_time_ms),
            enable_priority: Some(enable_priority),
        }
    }
}

impl ModelSection {
    fn of(model: &ModelConfig) -> Self {
        let ModelConfig {
            name,
            aliases,
            path,
            endpoints,
            files,
            sha256,
            task,
            device,
            numerics,
            kv_cache,
            context_tokens,
            max_batch_size,
            max_queue,
            batching,
            speculation,
            adapters,
        } = model;
        let adapters: Vec<AdapterSection> = adapters.iter().map(AdapterSection::of).collect();
        let given = |list: &Vec<String>| Some(list.clone()).filter(|list| !list.is_empty());
        if model.is_remote() {
            return Self {
                name: Some(name.clone()),
                aliases: given(aliases),
                task: *task,
                endpoints: Some(endpoints.iter().map(EndpointSection::of).collect()),
                ..Self::default()
            };
        }
        Self {
            name: Some(name.clone()),
            aliases: given(aliases),
            path: Some(path.clone()),
            endpoints: None,
            files: given(files),
            sha256: sha256.clone(),
            task: *task,
            device: Some(device.to_string()),
            numerics: Some(numerics_word(*numerics).to_owned()),
            kv_cache: Some(kv_cache.map_or("auto", KvType::name).to_owned()),
            context_tokens: *context_tokens,
            max_batch_size: *max_batch_size,
            max_queue: *max_queue,
            batching: batching.map(|texts| ModelBatchingSection {
                strategy: Some(texts.strategy.to_string()),
                max_wait_time_ms: Some(texts.max_wait_ms),
                enable_priority: Some(texts.priority),
            }),
            speculation: speculation.as_ref().map(SpeculationSection::of),
            adapters: Some(adapters).filter(|adapters| !adapters.is_empty()),
        }
    }
}

/// A path as the text that [`trustformers_store::Source`] reads it from: one that looks like a URI is written
/// as one.
pub(crate) fn source_text(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.contains("://") { format!("file://{}", text.replace('%', "%25")) } else { text.into_owned() }
}

/// The origins as a list; none where every one is allowed. An origin is ASCII, so none is lost.
fn origins(allowed: &AllowedOrigins) -> Option<Vec<String>> {
    match allowed {
        AllowedOrigins::Any => None,
        AllowedOrigins::Only(origins) => {
            Some(origins.iter().filter_map(|origin| origin.to_str().ok()).map(str::to_owned).collect())
        }
    }
}

/// The word that [`numerics_of`] reads.
fn numerics_word(numerics: Numerics) -> &'static str {
    match numerics {
        Numerics::Fast => "fast",
        Numerics::Exact => "exact",
    }
}

fn server(section: ServerSection) -> Result<ServerConfig, ConfigError> {
    let default = ServerConfig::default();
    let ServerSection { host, port, grpc_port, allowed_origins, model_control, drain_timeout_ms, admin } =
        section;
    if allowed_origins.as_ref().is_some_and(Vec::is_empty) {
        return Err(wrong(
            "server.allowed_origins",
            "is empty: list origins, or leave it out to allow every one",
        ));
    }
    let allowed_origins = AllowedOrigins::listed(&allowed_origins.unwrap_or_default())
        .map_err(|error| wrong("server.allowed_origins", error))?;
    let host = match host {
        None => default.host,
        Some(text) if text == "localhost" => Ipv4Addr::LOCALHOST.into(),
        Some(text) => text.parse().map_err(|_| {
            let message =
                format!("{text:?} is not an address; use \"0.0.0.0\", \"127.0.0.1\" or this machine's own");
            wrong("server.host", message)
        })?,
    };
    if drain_timeout_ms == Some(0) {
        return Err(wrong(
            "server.drain_timeout_ms",
            "0 leaves no time for answers in flight; give 1 or more",
        ));
    }
    Ok(ServerConfig {
        host,
        port: port.unwrap_or(default.port),
        grpc_port: grpc_port.unwrap_or(default.grpc_port),
        allowed_origins,
        model_control: model_control.unwrap_or(default.model_control),
        drain_timeout_ms: drain_timeout_ms.unwrap_or(default.drain_timeout_ms),
        admin: admin.map(AdminSection::check).transpose()?,
    })
}

fn batching(section: BatchingSection) -> Result<BatchingConfig, ConfigError> {
    let BatchingSection { max_batch_size, strategy, max_wait_time_ms, enable_priority } = section;
    let texts = ModelBatchingSection { strategy, max_wait_time_ms, enable_priority };
    let TextBatching { strategy, max_wait_ms, priority } = text_batching("batching", texts)?;
    let max_batch_size = max_batch_size.unwrap_or(BatchingConfig::default().max_batch_size);
    check_batch_size("batching", max_batch_size)?;
    Ok(BatchingConfig { max_batch_size, max_wait_time_ms: max_wait_ms, strategy, enable_priority: priority })
}

fn text_batching(path: &str, section: ModelBatchingSection) -> Result<TextBatching, ConfigError> {
    let ModelBatchingSection { strategy, max_wait_time_ms, enable_priority } = section;
    let mut texts = TextBatching::default();
    if let Some(strategy) = strategy {
        texts.strategy = strategy.parse().map_err(|error| wrong(&format!("{path}.strategy"), error))?;
    }
    if let Some(max_wait_ms) = max_wait_time_ms {
        let set = texts.set_max_wait_ms(max_wait_ms);
        set.map_err(|error| wrong(&format!("{path}.max_wait_time_ms"), error))?;
    }
    texts.priority = enable_priority.unwrap_or(texts.priority);
    Ok(texts)
}

fn model(index: usize, section: ModelSection) -> Result<ModelConfig, ConfigError> {
    let place = format!("models[{index}]");
    let at = |key: &str| format!("{place}.{key}");
    let missing = |key: &str, what: &str| wrong(&at(key), format!("is missing: give {what}"));
    let name = section.name.clone().ok_or_else(|| missing("name", "the name that callers use"))?;
    if name.is_empty() {
        return Err(wrong(&at("name"), "is empty: give the name that callers use"));
    }
    if section.endpoints.is_some() {
        return remote_model(&place, name, section);
    }
    let what =
        "a .gguf file, or a folder with one or with a checkpoint, or endpoints of servers that have it";
    let mut model = ModelConfig::new(name, section.path.ok_or_else(|| missing("path", what))?);
    model.aliases = section.aliases.unwrap_or_default();
    model.files = section.files.unwrap_or_default();
    model.sha256 = section.sha256;
    model.task = section.task;
    if let Some(text) = section.device {
        model.device = text.parse().map_err(|error| wrong(&at("device"), error))?;
    }
    if let Some(text) = section.numerics {
        model.numerics = numerics_of(&text).map_err(|error| wrong(&at("numerics"), error))?;
    }
    if let Some(text) = section.kv_cache {
        model.kv_cache = kv_cache_of(&text).map_err(|error| wrong(&at("kv_cache"), error))?;
    }
    if section.context_tokens == Some(0) || section.max_queue == Some(0) {
        let key = if section.max_queue == Some(0) { "max_queue" } else { "context_tokens" };
        return Err(wrong(&at(key), "0 leaves no room for a request; give 1 or more"));
    }
    model.context_tokens = section.context_tokens;
    model.max_queue = section.max_queue;
    if let Some(size) = section.max_batch_size {
        check_batch_size(&place, size)?;
    }
    model.max_batch_size = section.max_batch_size;
    model.batching = section.batching.map(|own| text_batching(&at("batching"), own)).transpose()?;
    model.speculation = section.speculation.map(|own| own.read(&at("speculation"))).transpose()?;
    model.adapters = adapter_config::read(&at("adapters"), section.adapters.unwrap_or_default())?;
    Ok(model)
}

/// A model that other servers have. What it is computed with is theirs.
fn remote_model(place: &str, name: String, section: ModelSection) -> Result<ModelConfig, ConfigError> {
    let ModelSection {
        name: _,
        aliases,
        path,
        endpoints,
        files,
        sha256,
        task,
        device,
        numerics,
        kv_cache,
        context_tokens,
        max_batch_size,
        max_queue,
        batching,
        speculation,
        adapters,
    } = section;
    let given = [
        ("path", path.is_some()),
        ("files", files.is_some()),
        ("sha256", sha256.is_some()),
        ("device", device.is_some()),
        ("numerics", numerics.is_some()),
        ("kv_cache", kv_cache.is_some()),
        ("context_tokens", context_tokens.is_some()),
        ("max_batch_size", max_batch_size.is_some()),
        ("max_queue", max_queue.is_some()),
        ("batching", batching.is_some()),
        ("speculation", speculation.is_some()),
        ("adapters", adapters.is_some()),
    ];
    if let Some((key, _)) = given.into_iter().find(|(_, given)| *given) {
        let message = "belongs to the servers that have the model; remove it, or remove endpoints";
        return Err(wrong(&format!("{place}.{key}"), message));
    }
    let mut model = ModelConfig::new(name, "");
    model.endpoints = remote::endpoints(place, endpoints.unwrap_or_default())?;
    model.aliases = aliases.unwrap_or_default();
    model.task = task;
    Ok(model)
}
