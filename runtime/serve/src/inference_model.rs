//! An `InferenceModel`, the document that the operator reads in a cluster, as a model of one process.
//!
//! A field of its spec is honoured or refused by name. Those that are about pods, replicas and gateways have
//! nothing to act on here; they are accepted where they say what is the default, as in an object that a
//! cluster has stored, and refused where somebody chose them. `metadata` beyond name and namespace, and
//! `status`, describe the object and not the model, and are not read.

use std::time::Duration;

use jiff::SignedDuration;
use serde::Deserialize;
use serde_json::Value;
use trustformers_api::nearest;
use trustformers_crds::{
    Adapter, AdapterSource, Analysis, BatchStrategy, Batching, CircuitBreaker, Disruption, GROUP, HashOn,
    HealthCheck, Hedge, Hold, InferenceModelSpec, ModelRef, Monitoring, NetworkPolicySettings, PodSettings,
    Resources, RetryBudget, Rollout, RouteSettings, Runtime, Scaling, Source, Traffic, TrafficShadow,
    VERSION,
};
use trustformers_engine::Numerics;
use trustformers_proto::Task;
use trustformers_proto::yaml::{Document, UnknownKey, keys_of};
use trustformers_runtime::adapters::AdapterSpec;
use trustformers_runtime::device::DeviceChoice;
use trustformers_runtime::spec::{TextBatching, kv_cache_of};

use crate::config::{ConfigError, ModelConfig, check_batch_size, wrong};
use crate::config_source::SourceOverrides;

/// The only kind that can be served.
pub(crate) const KIND: &str = "InferenceModel";
/// Least `contextTokens`, and most, as in the custom resource.
const CONTEXT_TOKENS: std::ops::RangeInclusive<u32> = 16..=1_048_576;
/// Least `maxQueue`, and most, as in the custom resource.
const MAX_QUEUE: std::ops::RangeInclusive<u32> = 1..=65_536;
/// Longest `drainTimeout`, a week, as in the custom resource.
const MAX_DRAIN: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a document asks of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServedModel {
    /// The model.
    pub(crate) config: ModelConfig,
    /// How long its answers in flight may take when the server ends.
    pub(crate) drain_timeout_ms: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "keys and values")]
struct Manifest {
    api_version: Option<String>,
    kind: Option<String>,
    metadata: Option<Metadata>,
    spec: Option<InferenceModelSpec>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "keys and values")]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
}

/// Reads one document.
///
/// # Errors
/// What cannot be honoured in one process, with the model and the field.
pub(crate) fn read(document: Document, sources: &SourceOverrides) -> Result<ServedModel, ConfigError> {
    let kind = document.text("kind").unwrap_or_default();
    if kind != KIND && document.has("kind") {
        return Err(wrong("kind", format!("{kind} cannot be served; the only kind is {KIND}")));
    }
    let mut first = None;
    let read: Result<Manifest, _> = document.read(|key| {
        if !describes_the_object(&key) {
            first.get_or_insert(key);
        }
    });
    if let Some(key) = first {
        return Err(unknown(&key));
    }
    let Manifest { api_version, kind, metadata, spec } = read?;
    if kind.is_none() {
        return Err(wrong("kind", format!("is missing: write kind: {KIND}")));
    }
    let wanted = format!("{GROUP}/{VERSION}");
    match api_version {
        Some(version) if version == wanted => {}
        Some(other) => return Err(wrong("apiVersion", format!("{other} is not known; write {wanted}"))),
        None => return Err(wrong("apiVersion", format!("is missing: write {wanted}"))),
    }
    let Metadata { name, namespace } = metadata.unwrap_or_default();
    let name = name.filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| wrong("metadata.name", "is missing: give the name that callers use"))?;
    let place = format!("{KIND} {name}: spec");
    let spec = spec.ok_or_else(|| wrong(&place, "is missing: give at least {source: {uri: PATH}}"))?;
    let mut served = served(&place, &name, spec, sources)?;
    served.config.aliases.extend(namespace.map(|namespace| format!("{namespace}/{name}")));
    Ok(served)
}

/// Keys beside the spec, which say nothing about how the model is served.
fn describes_the_object(key: &UnknownKey) -> bool {
    key.section == "metadata" || key.path() == "status"
}

fn known_keys(section: &str) -> &'static [&'static str] {
    match section {
        "" => keys_of::<Manifest>(),
        "spec" => keys_of::<InferenceModelSpec>(),
        "spec.source" => keys_of::<Source>(),
        "spec.runtime" => keys_of::<Runtime>(),
        "spec.runtime.batching" => keys_of::<Batching>(),
        section if section.starts_with("spec.runtime.adapters") && section.ends_with("source") => {
            keys_of::<AdapterSource>()
        }
        section if section.starts_with("spec.runtime.adapters") => keys_of::<Adapter>(),
        "spec.runtime.resources" => keys_of::<Resources>(),
        "spec.scaling" => keys_of::<Scaling>(),
        "spec.rollout" => keys_of::<Rollout>(),
        "spec.rollout.analysis" => keys_of::<Analysis>(),
        "spec.traffic" => keys_of::<Traffic>(),
        "spec.traffic.retryBudget" => keys_of::<RetryBudget>(),
        "spec.traffic.hashOn" => keys_of::<HashOn>(),
        "spec.traffic.hold" => keys_of::<Hold>(),
        "spec.traffic.healthCheck" => keys_of::<HealthCheck>(),
        "spec.traffic.hedge" => keys_of::<Hedge>(),
        "spec.traffic.shadow" => keys_of::<TrafficShadow>(),
        "spec.traffic.shadow.modelRef" => keys_of::<ModelRef>(),
        "spec.traffic.circuitBreaker" => keys_of::<CircuitBreaker>(),
        "spec.disruption" => keys_of::<Disruption>(),
        "spec.monitoring" => keys_of::<Monitoring>(),
        "spec.networkPolicy" => keys_of::<NetworkPolicySettings>(),
        "spec.pod" => keys_of::<PodSettings>(),
        "spec.route" => keys_of::<RouteSettings>(),
        _ => &[],
    }
}

fn unknown(key: &UnknownKey) -> ConfigError {
    let hint = nearest::hint(&key.key, known_keys(&key.section));
    ConfigError::UnknownKey { path: key.path(), hint }
}

/// All but the time to drain is for gateways.
fn refuse_traffic(place: &str, traffic: Traffic) -> Result<(), ConfigError> {
    let written = serde_json::to_value(Traffic { drain_timeout: String::new(), ..traffic });
    let usual = serde_json::to_value(Traffic { drain_timeout: String::new(), ..Traffic::default() });
    let fields = |value: serde_json::Result<Value>| match value {
        Ok(Value::Object(fields)) => fields,
        // A struct of plain fields is always an object.
        _ => serde_json::Map::new(),
    };
    let usual = fields(usual);
    let chosen = fields(written).into_iter().find(|(name, value)| usual.get(name) != Some(value));
    chosen.map_or(Ok(()), |(name, _)| {
        refuse_if(true, &format!("{place}.traffic.{name}"), "it is the gateway's")
    })
}

fn served(
    place: &str,
    name: &str,
    spec: InferenceModelSpec,
    sources: &SourceOverrides,
) -> Result<ServedModel, ConfigError> {
    let InferenceModelSpec {
        task,
        source,
        runtime,
        scaling,
        rollout,
        traffic,
        route,
        disruption,
        network_policy,
        monitoring,
        pod,
    } = spec;
    let Disruption { max_unavailable } = disruption;
    let drain_timeout = traffic.drain_timeout.clone();
    // Here oci:// is always pulled: there is no kubelet that mounts an image.
    let Source { uri, files, sha256, revision, oci: _, secret_ref, cache } = source;
    let uri = match revision {
        Some(revision) => format!("{uri}@{revision}"),
        None => uri,
    };
    let refuse = |field: &str, chosen, why| refuse_if(chosen, &format!("{place}.{field}"), why);
    refuse_scaling(place, scaling)?;
    let policy = network_policy != NetworkPolicySettings::default();
    refuse("networkPolicy", policy, "there are no pods to reach; choose the addresses where it listens")?;
    let monitored = monitoring != Monitoring::default();
    refuse("monitoring", monitored, "there is no Service to monitor; read /metrics of this process")?;
    let exposed = route != RouteSettings::default();
    refuse("route", exposed, "there is no Gateway to ask; choose the addresses where it listens")?;
    refuse("rollout", rollout != Rollout::default(), "a changed model is loaded beside the old one")?;
    refuse_traffic(place, traffic)?;
    let variables = "there is no pod to mount it; set the variables of this process";
    refuse("source.secretRef", secret_ref.is_some(), variables)?;
    refuse("source.cache", cache.is_some(), "there is no pod to mount it; set TRUSTFORMERS_CACHE_DIR")?;
    let evictions = max_unavailable != Disruption::default().max_unavailable;
    refuse("disruption.maxUnavailable", evictions, "there are no pods to evict")?;
    refuse_pod(place, pod)?;
    let own = sources.get(name);
    let mut config = ModelConfig::new(name, own.cloned().unwrap_or(uri));
    config.files = files;
    config.sha256 = sha256;
    config.task = task;
    honour_runtime(place, runtime, &mut config)?;
    if own.is_none() {
        let readable: Result<trustformers_store::Source, _> = config.path.parse();
        readable.map_err(|error| {
            let message = format!("{error}; or give its files with --source {name}=PATH");
            wrong(&format!("{place}.source.uri"), message)
        })?;
    }
    let drain = drain_timeout_ms(&drain_timeout)
        .map_err(|message| wrong(&format!("{place}.traffic.drainTimeout"), message))?;
    Ok(ServedModel { config, drain_timeout_ms: drain })
}

/// # Errors
/// The field, where it was chosen.
fn refuse_if(chosen: bool, field: &str, why: &str) -> Result<(), ConfigError> {
    if chosen {
        return Err(wrong(field, format!("cannot be honoured by one process: {why}; remove it")));
    }
    Ok(())
}

fn refuse_scaling(place: &str, scaling: Scaling) -> Result<(), ConfigError> {
    let usual = Scaling::default();
    let Scaling { replicas, min_replicas, max_replicas, metrics, behavior } = scaling;
    let refuse = |field: &str, chosen| {
        refuse_if(chosen, &format!("{place}.scaling.{field}"), "one process serves one replica")
    };
    refuse("replicas", replicas != usual.replicas)?;
    refuse("minReplicas", min_replicas != usual.min_replicas)?;
    refuse("maxReplicas", max_replicas.is_some())?;
    refuse("metrics", !metrics.is_empty())?;
    refuse("behavior", behavior.is_some())
}

fn refuse_pod(place: &str, pod: PodSettings) -> Result<(), ConfigError> {
    let PodSettings {
        node_selector,
        tolerations,
        affinity,
        topology_spread,
        priority_class_name,
        runtime_class_name,
        service_account_name,
        labels,
        annotations,
    } = pod;
    let refuse = |field: &str, chosen| refuse_if(chosen, &format!("{place}.pod.{field}"), "there is no pod");
    refuse("nodeSelector", !node_selector.is_empty())?;
    refuse("tolerations", !tolerations.is_empty())?;
    refuse("affinity", affinity.is_some())?;
    refuse("topologySpread", !topology_spread.is_empty())?;
    refuse("priorityClassName", priority_class_name.is_some())?;
    refuse("runtimeClassName", runtime_class_name.is_some())?;
    refuse("serviceAccountName", service_account_name.is_some())?;
    refuse("labels", !labels.is_empty())?;
    refuse("annotations", !annotations.is_empty())
}

fn honour_runtime(place: &str, runtime: Runtime, config: &mut ModelConfig) -> Result<(), ConfigError> {
    let Runtime {
        device,
        gpus,
        gpu_resource,
        numerics,
        kv_cache,
        context_tokens,
        adapters,
        batching,
        image,
        env,
        resources,
    } = runtime;
    let at = |field: &str| format!("{place}.runtime.{field}");
    refuse_if(gpus > 0, &at("gpus"), "there is no pod to give them to; it uses what runtime.device names")?;
    let of_plugin = gpu_resource != Runtime::default().gpu_resource;
    refuse_if(of_plugin, &at("gpuResource"), "there is no device plugin")?;
    refuse_if(image.is_some(), &at("image"), "there is no container")?;
    refuse_if(!env.is_empty(), &at("env"), "there is no container; set the variables of this process")?;
    let limited = resources != Resources::default();
    refuse_if(limited, &at("resources"), "there is no container; limit this process from outside")?;
    let Batching { strategy, max_batch_size, max_wait_ms, max_queue, priority } = batching;
    if config.task == Some(Task::Generate) && matches!(strategy, BatchStrategy::Time | BatchStrategy::Size) {
        let message = format!(
            "{} is for models that read texts and generate none; generation is batched continuously, so use dynamic or priority",
            strategy.as_str()
        );
        return Err(wrong(&at("batching.strategy"), message));
    }
    let mut texts = TextBatching { priority, ..TextBatching::default() };
    texts.strategy = strategy.as_str().parse().map_err(|error| wrong(&at("batching.strategy"), error))?;
    texts.set_max_wait_ms(max_wait_ms).map_err(|error| wrong(&at("batching.maxWaitMs"), error))?;
    let size = max_batch_size as usize;
    check_batch_size(&at("batching"), size)
        .map_err(|_| wrong(&at("batching.maxBatchSize"), format!("{size} is not within 1 to 256")))?;
    within(&at("batching.maxQueue"), Some(max_queue), &MAX_QUEUE)?;
    within(&at("contextTokens"), context_tokens, &CONTEXT_TOKENS)?;
    config.device = device.as_str().parse::<DeviceChoice>().map_err(|error| wrong(&at("device"), error))?;
    config.numerics = match numerics {
        trustformers_crds::Numerics::Fast => Numerics::Fast,
        trustformers_crds::Numerics::Exact => Numerics::Exact,
    };
    config.kv_cache = kv_cache_of(kv_cache.as_str()).map_err(|error| wrong(&at("kvCache"), error))?;
    config.context_tokens = context_tokens;
    config.adapters = adapters_of(&at("adapters"), adapters)?;
    config.max_batch_size = Some(size);
    config.max_queue = Some(max_queue as usize);
    config.batching = Some(texts);
    Ok(())
}

fn adapters_of(place: &str, adapters: Vec<Adapter>) -> Result<Vec<AdapterSpec>, ConfigError> {
    let read = |Adapter { name, source }| {
        let AdapterSource { uri, revision, sha256 } = source;
        let uri = revision.map_or_else(|| uri.clone(), |revision| format!("{uri}@{revision}"));
        let source: Result<trustformers_store::Source, _> = uri.parse();
        let source = source.map_err(|error| wrong(&format!("{place}: {name}: source.uri"), error))?;
        Ok(AdapterSpec { name, source, sha256 })
    };
    let read: Result<Vec<AdapterSpec>, ConfigError> = adapters.into_iter().map(read).collect();
    let adapters = read?;
    AdapterSpec::check_names(adapters.iter().map(|adapter| adapter.name.as_str()))
        .map_err(|(index, why)| wrong(&format!("{place}[{index}].name"), why))?;
    Ok(adapters)
}

fn within(
    path: &str,
    figure: Option<u32>,
    allowed: &std::ops::RangeInclusive<u32>,
) -> Result<(), ConfigError> {
    match figure.filter(|figure| !allowed.contains(figure)) {
        Some(figure) => {
            let message = format!("{figure} is not within {} to {}", allowed.start(), allowed.end());
            Err(wrong(path, message))
        }
        None => Ok(()),
    }
}

/// Milliseconds of a duration such as `60s` or `1m30s`.
fn drain_timeout_ms(text: &str) -> Result<u64, String> {
    let syntax = || format!("{text:?} is not a duration of at most a week: write 500ms, 60s, 1m30s or 2h");
    // The custom resource allows this alphabet; the library also reads other forms.
    if text.is_empty() || !text.chars().all(|c| c.is_ascii_digit() || matches!(c, 'h' | 'm' | 's')) {
        return Err(syntax());
    }
    let signed: SignedDuration = text.parse().map_err(|_| syntax())?;
    let duration = Duration::try_from(signed).ok().filter(|duration| *duration <= MAX_DRAIN);
    let duration = duration.ok_or_else(syntax)?;
    // A week has 604,800,000 ms.
    Ok(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_engine::KvType;
    use trustformers_proto::yaml;

    fn manifest(spec: &str) -> String {
        format!(
            "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
             metadata: {{name: chat, namespace: team, uid: u-1, labels: {{a: b}}}}\nspec: {spec}\n\
             status: {{phase: Ready, replicas: 2}}\n"
        )
    }

    fn served(spec: &str) -> Result<ServedModel, ConfigError> {
        let document = yaml::documents(&manifest(spec)).unwrap().remove(0);
        read(document, &SourceOverrides::default())
    }

    #[test]
    fn every_field_that_one_process_honours_reaches_the_model() {
        let spec = "{task: embed, source: {uri: 'file:///m', files: ['*.gguf'], sha256: ab}, \
             runtime: {device: cpu, numerics: exact, kvCache: f16, contextTokens: 64, \
             batching: {strategy: size, maxBatchSize: 2, maxWaitMs: 7, maxQueue: 3, priority: true}}, \
             traffic: {drainTimeout: 1m30s}}";
        let ServedModel { config, drain_timeout_ms } = served(spec).unwrap();
        let wanted = ModelConfig {
            aliases: vec!["team/chat".into()],
            files: vec!["*.gguf".into()],
            sha256: Some("ab".into()),
            task: Some(Task::Embed),
            device: DeviceChoice::Cpu,
            numerics: Numerics::Exact,
            kv_cache: Some(KvType::F16),
            context_tokens: Some(64),
            max_batch_size: Some(2),
            max_queue: Some(3),
            batching: Some(TextBatching {
                strategy: "size".parse().unwrap(),
                max_wait_ms: 7,
                priority: true,
            }),
            ..ModelConfig::new("chat", "file:///m")
        };
        assert_eq!((config, drain_timeout_ms), (wanted, 90_000));
    }

    #[test]
    fn adapters_are_served_from_where_they_lie() {
        let read = |list: &str| {
            let spec = format!("{{source: {{uri: /m}}, runtime: {{adapters: {list}}}}}");
            served(&spec).map(|served| served.config.adapters).map_err(|error| error.to_string())
        };
        let two = read(
            "[{name: sql, source: {uri: 'file:///s', sha256: ab}}, {name: far, source: {uri: 'hf://o/n', revision: v1}}]",
        );
        let two = two.unwrap();
        assert_eq!((two[0].name.as_str(), two[0].sha256.as_deref()), ("sql", Some("ab")));
        assert_eq!(two[1].source.to_string(), "hf://o/n@v1");
        let twice = read("[{name: a, source: {uri: /s}}, {name: a, source: {uri: /t}}]").unwrap_err();
        assert!(twice.starts_with("InferenceModel chat: spec.runtime.adapters[1].name: "), "{twice}");
        let mounted = read("[{name: a, source: {uri: 'pvc://c'}}]").unwrap_err();
        assert!(
            mounted.starts_with("InferenceModel chat: spec.runtime.adapters: a: source.uri: "),
            "{mounted}"
        );
    }

    #[test]
    fn an_object_as_a_cluster_stores_it_is_served_with_its_defaults() {
        let spec: InferenceModelSpec = serde_json::from_str(r#"{"source": {"uri": "/m"}}"#).unwrap();
        let stored = serde_json::to_string(&spec).unwrap();
        assert!(stored.contains("\"replicas\":1") && stored.contains("\"retries\":2"), "{stored}");
        let ServedModel { config, drain_timeout_ms } = served(&stored).unwrap();
        assert_eq!(
            (config.max_batch_size, config.max_queue, drain_timeout_ms),
            (Some(32), Some(512), 60_000)
        );
    }

    #[test]
    fn what_one_process_cannot_honour_is_refused_by_name() {
        let source = "source: {uri: /m}";
        for (fields, path, says) in [
            ("scaling: {replicas: 2}", "scaling.replicas", "one replica"),
            ("scaling: {minReplicas: 2}", "scaling.minReplicas", "one replica"),
            ("scaling: {maxReplicas: 2}", "scaling.maxReplicas", "one replica"),
            ("scaling: {metrics: [{cpu: 70}]}", "scaling.metrics", "one replica"),
            ("scaling: {behavior: {}}", "scaling.behavior", "one replica"),
            ("monitoring: {serviceMonitor: true}", "monitoring", "no Service"),
            ("monitoring: {podMonitor: true}", "monitoring", "no Service"),
            ("route: {hostnames: [a]}", "route", "no Gateway"),
            ("networkPolicy: {enabled: true}", "networkPolicy", "no pods"),
            ("traffic: {timeout: 5s}", "traffic.timeout", "gateway"),
            ("traffic: {retries: 5}", "traffic.retries", "gateway"),
            ("traffic: {circuitBreaker: {}}", "traffic.circuitBreaker", "gateway"),
            ("traffic: {retryBudget: {percent: 5}}", "traffic.retryBudget", "gateway"),
            ("traffic: {drainTimeout: 900h}", "traffic.drainTimeout", "at most a week"),
            ("disruption: {maxUnavailable: 2}", "disruption.maxUnavailable", "evict"),
            ("pod: {nodeSelector: {a: b}}", "pod.nodeSelector", "no pod"),
            ("pod: {tolerations: [{operator: Exists}]}", "pod.tolerations", "no pod"),
            ("pod: {affinity: {nodeAffinity: {}}}", "pod.affinity", "no pod"),
            ("pod: {topologySpread: [{topologyKey: a}]}", "pod.topologySpread", "no pod"),
            ("pod: {priorityClassName: a}", "pod.priorityClassName", "no pod"),
            ("pod: {runtimeClassName: a}", "pod.runtimeClassName", "no pod"),
            ("pod: {serviceAccountName: a}", "pod.serviceAccountName", "no pod"),
            ("pod: {labels: {a: b}}", "pod.labels", "no pod"),
            ("pod: {annotations: {a: b}}", "pod.annotations", "no pod"),
            ("runtime: {image: a}", "runtime.image", "no container"),
            ("runtime: {gpus: 1}", "runtime.gpus", "no pod"),
            ("runtime: {gpuResource: amd.com/gpu}", "runtime.gpuResource", "no device plugin"),
            ("runtime: {env: [{name: A}]}", "runtime.env", "no container"),
            ("runtime: {resources: {limits: {memory: 1Gi}}}", "runtime.resources", "no container"),
            ("runtime: {contextTokens: 1}", "runtime.contextTokens", "16 to"),
            ("runtime: {batching: {maxBatchSize: 257}}", "runtime.batching.maxBatchSize", "1 to 256"),
            ("runtime: {batching: {maxWaitMs: 0}}", "runtime.batching.maxWaitMs", "1 to 1000"),
            ("runtime: {batching: {maxQueue: 0}}", "runtime.batching.maxQueue", "1 to 65536"),
            (
                "task: generate, runtime: {batching: {strategy: size}}",
                "runtime.batching.strategy",
                "continuously",
            ),
        ] {
            let error = served(&format!("{{{source}, {fields}}}")).unwrap_err().to_string();
            let begins = format!("InferenceModel chat: spec.{path}: ");
            assert!(error.starts_with(&begins) && error.contains(says), "{error}");
        }
        let error = served("{source: {uri: 'pvc://x/y'}}").unwrap_err().to_string();
        assert!(error.starts_with("InferenceModel chat: spec.source.uri: pvc://"), "{error}");
        assert!(error.contains("--source chat=PATH"), "{error}");
    }

    #[test]
    fn unknown_fields_and_wrong_kinds_of_values_are_refused_with_their_path() {
        for (spec, says) in [
            (
                "{source: {uri: /m}, scalling: {}}",
                "spec.scalling: there is no such key; did you mean \"scaling\"?",
            ),
            ("{source: {url: /m}}", "spec.source.url: there is no such key; did you mean \"uri\"?"),
            ("{source: {uri: /m}, runtime: {batching: {maxBatch: 1}}}", "spec.runtime.batching.maxBatch: "),
            ("{source: {uri: /m}, runtime: {device: tpu}}", "spec.runtime.device: "),
            ("{source: {}}", "spec.source: "),
            ("null", "InferenceModel chat: spec: is missing"),
        ] {
            let error = served(spec).unwrap_err().to_string();
            assert!(error.starts_with(says), "{error}");
        }
    }

    #[test]
    fn another_source_replaces_the_uri() {
        let sources = SourceOverrides::from_iter([("chat".to_owned(), "/here.gguf".to_owned())]);
        let document = yaml::documents(&manifest("{source: {uri: 'oci://x/y:z'}}")).unwrap().remove(0);
        assert_eq!(read(document, &sources).unwrap().config.path, "/here.gguf");
    }
}
