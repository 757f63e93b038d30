//! Hashes that decide whether something changed: the revision (what is loaded) and the pool (what loads it).
//!
//! They are computed over text that is written here field by field, never over a serialised struct. A new
//! field with its default, or a new version of a serialiser, must not change the hash of an unchanged model:
//! that would restart its pods when the operator is upgraded. Golden tests contain the values. A field that
//! is added later adds a line only if it differs from its default.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};
use trustformers_crds::{BatchStrategy, DEFAULT_MAX_WAIT_MS, KvCache, OciAccess};
use trustformers_proto::Task;

use crate::validate::{CacheVolume, Mount, ValidatedModel};

/// Hex digits of a hash in names and labels: 40 bits are enough to distinguish the few revisions of one
/// model.
const SHORT_DIGITS: usize = 10;

/// Lower-case hex digits of the sha256 of `text`.
#[must_use]
pub fn sha256_hex(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().fold(String::new(), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// The first digits of the sha256 of `text`, short enough for names.
#[must_use]
pub fn short(text: &str) -> String {
    sha256_hex(text)[..SHORT_DIGITS].to_owned()
}

/// Hash of what is loaded: source and engine settings. Replicas, routing and the pod template are not part of
/// it.
#[must_use]
pub fn revision(model: &ValidatedModel) -> String {
    let mut lines = Lines::default();
    lines.add("source.uri", &model.source.uri);
    for glob in &model.source.files {
        lines.add("source.files", glob);
    }
    lines.add_if("source.sha256", model.source.sha256.as_deref());
    lines.add("runtime.device", model.runtime.device.as_str());
    lines.add("runtime.numerics", model.runtime.numerics.as_str());
    lines.add_if("runtime.contextTokens", model.runtime.context_tokens.map(|n| n.to_string()).as_deref());
    lines.add("runtime.batching.maxBatchSize", &model.runtime.batching.max_batch_size.to_string());
    lines.add("runtime.batching.maxQueue", &model.runtime.batching.max_queue.to_string());
    // These fields were added later: each adds a line only if it differs from its default.
    lines.add_if("task", model.task.map(Task::as_str));
    let batching = &model.runtime.batching;
    let strategy = Some(batching.strategy).filter(|strategy| *strategy != BatchStrategy::default());
    lines.add_if("runtime.batching.strategy", strategy.map(BatchStrategy::as_str));
    let max_wait_ms = Some(batching.max_wait_ms).filter(|ms| *ms != DEFAULT_MAX_WAIT_MS);
    lines.add_if("runtime.batching.maxWaitMs", max_wait_ms.map(|ms| ms.to_string()).as_deref());
    let kv_cache = Some(model.runtime.kv_cache).filter(|kv_cache| *kv_cache != KvCache::default());
    lines.add_if("runtime.kvCache", kv_cache.map(KvCache::as_str));
    lines.add_if("runtime.batching.priority", batching.priority.then_some("true"));
    lines.add_if("source.revision", model.source.revision.as_deref());
    lines.add_if("source.oci", is_pulled(model).then_some("Pull"));
    for adapter in &model.adapters {
        lines.add("runtime.adapters.name", &adapter.name);
        lines.add("runtime.adapters.source.uri", &adapter.source.uri);
        lines.add_if("runtime.adapters.source.revision", adapter.source.revision.as_deref());
        lines.add_if("runtime.adapters.source.sha256", adapter.source.sha256.as_deref());
    }
    // A pod asks them when it loads: pods that were asked others are another revision.
    for one in &model.rollout.golden_prompts {
        lines.add("rollout.analysis.goldenPrompts.prompt", &one.prompt);
        lines.add("rollout.analysis.goldenPrompts.expect", &one.expect);
    }
    short(&lines.0)
}

/// Hash of the settings that make the pod around the model: image, environment, resources, scheduling.
#[must_use]
pub fn pool(model: &ValidatedModel) -> String {
    let mut lines = Lines::default();
    lines.add_if("runtime.image", model.runtime.image.as_deref());
    for variable in &model.runtime.env {
        lines.add(&format!("runtime.env.{}", variable.name), &variable.value);
    }
    for (kind, amounts) in
        [("limits", &model.runtime.resources.limits), ("requests", &model.runtime.resources.requests)]
    {
        for (resource, amount) in amounts {
            lines.add(&format!("runtime.resources.{kind}.{resource}"), &amount.0);
        }
    }
    if model.runtime.gpus > 0 {
        lines.add("runtime.gpus", &model.runtime.gpus.to_string());
        lines.add("runtime.gpuResource", &model.runtime.gpu_resource);
    }
    let pod = &model.pod;
    for (kind, map) in
        [("nodeSelector", &pod.node_selector), ("labels", &pod.labels), ("annotations", &pod.annotations)]
    {
        for (key, value) in map {
            lines.add(&format!("pod.{kind}.{key}"), value);
        }
    }
    for one in &pod.tolerations {
        let parts =
            [one.key.as_deref(), Some(operator(one.operator)), one.value.as_deref(), one.effect.map(effect)];
        let seconds = one.toleration_seconds.map(|n| n.to_string()).unwrap_or_default();
        lines.add("pod.tolerations", &format!("{parts:?} {seconds}"));
    }
    // The API server stores fields in the order of their names.
    lines.add_if("pod.affinity", pod.affinity.as_ref().map(ToString::to_string).as_deref());
    for one in &pod.topology_spread {
        lines.add("pod.topologySpread", &format!("{} {} {}", one.topology_key, one.max_skew, one.required));
    }
    lines.add_if("pod.priorityClassName", pod.priority_class_name.as_deref());
    lines.add_if("pod.runtimeClassName", pod.runtime_class_name.as_deref());
    lines.add_if("pod.serviceAccountName", pod.service_account_name.as_deref());
    lines.add_if("source.secretRef", model.source.secret_ref.as_ref().map(|secret| secret.name.as_str()));
    if let Mount::Fetched(cache) = &model.mount {
        match cache {
            CacheVolume::EmptyDir { size_limit } => {
                lines.add("source.cache.emptyDir", size_limit.as_deref().unwrap_or_default());
            }
            CacheVolume::Claim(name) => lines.add("source.cache.pvc", name),
        }
    }
    short(&lines.0)
}

fn is_pulled(model: &ValidatedModel) -> bool {
    model.source.oci == Some(OciAccess::Pull)
}

fn operator(operator: trustformers_crds::TolerationOperator) -> &'static str {
    match operator {
        trustformers_crds::TolerationOperator::Equal => "Equal",
        trustformers_crds::TolerationOperator::Exists => "Exists",
    }
}

fn effect(effect: trustformers_crds::TolerationEffect) -> &'static str {
    match effect {
        trustformers_crds::TolerationEffect::NoSchedule => "NoSchedule",
        trustformers_crds::TolerationEffect::PreferNoSchedule => "PreferNoSchedule",
        trustformers_crds::TolerationEffect::NoExecute => "NoExecute",
    }
}

/// Lines `key=length:value`. With the length, a value that contains a line break cannot imitate another key.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, key: &str, value: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{key}={}:{value}", value.len());
    }

    fn add_if(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.add(key, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate::tests::valid;

    const FULL: &str = "{source: {uri: 'pvc://w/a', files: ['*.gguf'], sha256: aa}, runtime: {device: cpu, numerics: exact, contextTokens: 64, image: i, env: [{name: A, value: b}], resources: {limits: {cpu: 2}}}, pod: {nodeSelector: {a: b}, tolerations: [{key: k, effect: NoSchedule}], topologySpread: [{topologyKey: t}]}}";

    #[test]
    fn the_hashes_of_a_stored_model_never_change() {
        // A new value here means that an upgrade of the operator restarts the pods of every model.
        let plain = valid("chat", "{source: {uri: 'oci://localhost/smollm2-135m-instruct:q4_1'}}");
        let full = valid("chat", FULL);
        let all = [revision(&plain), pool(&plain), revision(&full), pool(&full)];
        insta::assert_yaml_snapshot!(all);
    }

    #[test]
    fn the_revision_hash_depends_on_what_is_loaded_only() {
        let base = revision(&valid("chat", "{source: {uri: 'oci://x'}}"));
        for same in [
            "{source: {uri: 'oci://x'}, scaling: {replicas: 5}}",
            "{source: {uri: 'oci://x'}, traffic: {timeout: 1s, retries: 0}}",
            "{source: {uri: 'oci://x'}, pod: {labels: {a: b}}}",
            "{source: {uri: 'oci://x'}, runtime: {image: other}}",
            "{source: {uri: 'oci://x'}, runtime: {kvCache: auto}}",
            "{source: {uri: 'oci://x'}, rollout: {analysis: {maxErrorRate: 0.5, minRequests: 9}}}",
            "{source: {uri: 'oci://x'}, runtime: {batching: {strategy: dynamic, maxWaitMs: 10, priority: false}}}",
        ] {
            assert_eq!(revision(&valid("chat", same)), base, "{same}");
        }
        for other in [
            "{source: {uri: 'oci://y'}}",
            "{source: {uri: 'oci://x', sha256: aa}}",
            "{source: {uri: 'oci://x', files: [a]}}",
            "{source: {uri: 'oci://x', oci: Pull}}",
            "{source: {uri: 'oci://x'}, runtime: {numerics: exact}}",
            "{source: {uri: 'oci://x'}, runtime: {contextTokens: 64}}",
            "{source: {uri: 'oci://x'}, runtime: {kvCache: f16}}",
            "{source: {uri: 'oci://x'}, runtime: {batching: {maxQueue: 1}}}",
            "{source: {uri: 'oci://x'}, task: embed}",
            "{source: {uri: 'oci://x'}, runtime: {batching: {strategy: size}}}",
            "{source: {uri: 'oci://x'}, runtime: {batching: {maxWaitMs: 11}}}",
            "{source: {uri: 'oci://x'}, runtime: {batching: {priority: true}}}",
            "{source: {uri: 'oci://x'}, rollout: {analysis: {goldenPrompts: [{prompt: a, expect: b}]}}}",
            "{source: {uri: 'oci://x'}, runtime: {adapters: [{name: a, source: {uri: 'oci://y'}}]}}",
        ] {
            assert_ne!(revision(&valid("chat", other)), base, "{other}");
        }
    }

    #[test]
    fn the_pool_hash_depends_on_pod_settings_only() {
        let base = pool(&valid("chat", "{source: {uri: 'oci://x'}}"));
        assert_eq!(pool(&valid("chat", "{source: {uri: 'oci://y'}, scaling: {replicas: 3}}")), base);
        assert_ne!(pool(&valid("chat", "{source: {uri: 'oci://x'}, runtime: {image: other}}")), base);
        assert_ne!(pool(&valid("chat", "{source: {uri: 'oci://x'}, pod: {nodeSelector: {a: b}}}")), base);
        let gpus = |fields: &str| {
            pool(&valid("chat", &format!("{{source: {{uri: 'oci://x'}}, runtime: {{{fields}}}}}")))
        };
        assert_eq!(gpus("gpus: 0, gpuResource: amd.com/gpu"), base);
        assert_ne!(gpus("gpus: 1"), base);
        assert_ne!(gpus("gpus: 1, gpuResource: amd.com/gpu"), gpus("gpus: 1"));
        let fetched = [
            "uri: 'hf://a/b'",
            "uri: 'hf://a/b', secretRef: {name: s}",
            "uri: 'hf://a/b', cache: {emptyDir: {sizeLimit: 9Gi}}",
            "uri: 'hf://a/b', cache: {pvc: {claimName: c}}",
        ];
        let mut pools: Vec<String> =
            fetched.iter().map(|source| pool(&valid("chat", &format!("{{source: {{{source}}}}}")))).collect();
        pools.push(base);
        let count = pools.len();
        pools.sort_unstable();
        pools.dedup();
        assert_eq!(pools.len(), count, "what is mounted makes the pod");
    }
}
