//! Step three of a reconcile: the objects that should exist for a model, from the validated model alone.
//!
//! Pure, so its tests are YAML in and golden objects out. Each object carries a hash of itself in an
//! annotation. The apply step compares it with the stored object and sends nothing if nothing changed.

mod autoscaler;
mod budget;
mod config;
mod deployment;
mod http_route;
mod network;
mod network_policy;
mod pod;
mod pod_monitor;
mod service_monitor;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::Serialize;
use serde_json::{Value, json};
use trustformers_proto::pod_config::PodConfigError;

pub use config::{PoolFiles, pod_config};

use crate::kinds::{self, ChildKind};
use crate::rollout::PoolSize;
use crate::validate::ValidatedModel;
use crate::{hash, names};

/// What the operator's own settings add to every model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Image of a pod's container if the model names none.
    pub runtime_image: String,
    /// Namespace of the operator and of the gateways.
    pub namespace: String,
    /// The Service of the gateways, in that namespace.
    pub gateway: GatewayService,
    /// Kinds that are no part of Kubernetes and whose definitions the cluster has.
    pub optional_kinds: BTreeSet<&'static str>,
    /// `IfNotPresent`, `Always` or `Never`, for the container and for image volumes.
    pub pull_policy: String,
    /// How pods recognise the operator on their admin port; none: they have none.
    pub admin: Option<PodAccess>,
}

/// The Service of the gateways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayService {
    /// Its name.
    pub name: String,
    /// Its port for HTTP.
    pub http_port: u16,
    /// Its port for gRPC.
    pub grpc_port: u16,
}

/// How pods recognise the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodAccess {
    /// The operator's account: `system:serviceaccount:NAMESPACE:NAME`.
    pub subject: String,
    /// The issuer of the cluster's tokens; none until known.
    pub issuer: Option<String>,
    /// The public keys that they are signed with, a JSON Web Key Set; none until known.
    pub keys: Option<String>,
}

/// The pools of a model as they should be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pools {
    /// The pool whose pods hold the spec's revision, or are to; none: that revision was rolled back.
    pub of_spec: Option<PoolSize>,
    /// The files of pools, by the pool's name.
    pub files: BTreeMap<String, PoolFiles>,
}

/// Everything that should exist for one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Desired {
    /// Hash of what is loaded.
    pub revision: String,
    /// The pool whose pods hold it, if it should have any.
    pub pool: Option<String>,
    /// The objects, in the order in which they are applied.
    pub objects: Vec<DesiredObject>,
}

/// One object that should exist.
#[derive(Debug, Clone, PartialEq)]
pub struct DesiredObject {
    /// Its kind.
    pub kind: &'static ChildKind,
    /// Its name. Its namespace is the model's.
    pub name: String,
    /// The object as it is applied.
    pub object: Value,
    /// Hash of the object, which its annotation contains.
    pub hash: String,
}

/// Why objects could not be built. Metrics use the variant's name.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
pub enum BuildError {
    /// `pod.yaml` could not be written.
    #[error("the pod's configuration: {0}")]
    PodConfig(#[from] PodConfigError),
    /// An object could not be written as JSON.
    #[error("an object of this model could not be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// The objects that should exist for `model`, with these pools.
///
/// # Errors
/// Only if an object cannot be serialised, which no validated model causes.
pub fn build(model: &ValidatedModel, platform: &Platform, pools: &Pools) -> Result<Desired, BuildError> {
    let revision = hash::revision(model);
    // What pods need comes before the pods, and the budget before there is anything to evict.
    let mut objects = Vec::new();
    if model.pod.service_account_name.is_none() {
        objects.push(child(&kinds::SERVICE_ACCOUNT, network::service_account(model))?);
    }
    for (pool, files) in &pools.files {
        objects.push(child(&kinds::CONFIG_MAP, config::config_map(model, pool, files))?);
    }
    if let Some(settings) = &model.network_policy {
        let policy = network_policy::network_policy(model, settings, platform);
        objects.push(child(&kinds::NETWORK_POLICY, policy)?);
    }
    objects.push(child(&kinds::SERVICE, network::headless_service(model))?);
    if budget::binds(model) {
        objects.push(child(&kinds::DISRUPTION_BUDGET, budget::budget(model))?);
    }
    if let Some(scaling) = &model.autoscaling {
        objects.push(child(&kinds::AUTOSCALER, autoscaler::autoscaler(model, scaling))?);
    }
    objects.extend(optional(model, platform)?);
    if let Some(PoolSize { pool, replicas }) = &pools.of_spec {
        let mut deployment = deployment::deployment(model, platform, pool);
        let replicas = i32::try_from(*replicas).unwrap_or(i32::MAX);
        deployment.spec.get_or_insert_default().replicas = Some(replicas);
        objects.push(child(&kinds::DEPLOYMENT, deployment)?);
    }
    let pool = pools.of_spec.as_ref().map(|one| one.pool.clone());
    Ok(Desired { revision, pool, objects })
}

/// The kinds of which the spec asks for an object and the cluster has no definition: they are not among
/// `defined`.
#[must_use]
pub fn undefined(model: &ValidatedModel, defined: &BTreeSet<&'static str>) -> Vec<&'static ChildKind> {
    wanted(model).into_iter().filter(|kind| !defined.contains(kind.kind)).collect()
}

/// The kinds that are no part of Kubernetes and of which the spec asks for an object, in the order of
/// [`kinds::CHILDREN`].
fn wanted(model: &ValidatedModel) -> Vec<&'static ChildKind> {
    let monitoring = model.monitoring.as_ref();
    let asked = [
        (&kinds::SERVICE_MONITOR, monitoring.is_some_and(|one| one.service_monitor)),
        (&kinds::POD_MONITOR, monitoring.is_some_and(|one| one.pod_monitor)),
        (&kinds::HTTP_ROUTE, model.route.is_some()),
    ];
    asked.into_iter().filter(|(_, is_asked)| *is_asked).map(|(kind, _)| kind).collect()
}

/// The objects of kinds that are no part of Kubernetes, as far as the cluster has their definitions.
fn optional(model: &ValidatedModel, platform: &Platform) -> Result<Vec<DesiredObject>, serde_json::Error> {
    let wanted = wanted(model);
    let is_made =
        |kind: &'static ChildKind| wanted.contains(&kind) && platform.optional_kinds.contains(kind.kind);
    let mut objects = Vec::new();
    if let Some(settings) = &model.monitoring {
        if is_made(&kinds::SERVICE_MONITOR) {
            objects.push(child(&kinds::SERVICE_MONITOR, service_monitor::service_monitor(model, settings))?);
        }
        if is_made(&kinds::POD_MONITOR) {
            objects.push(child(&kinds::POD_MONITOR, pod_monitor::pod_monitor(model, settings))?);
        }
    }
    if let Some(settings) = model.route.as_ref().filter(|_| is_made(&kinds::HTTP_ROUTE)) {
        objects.push(child(&kinds::HTTP_ROUTE, http_route::http_route(model, settings, platform))?);
    }
    Ok(objects)
}

/// The part of a pool's Deployment that makes its pods, as the spec asks for it: pods of a Deployment that
/// has it differ in what they load alone.
///
/// # Errors
/// Only if it cannot be serialised, which no validated model causes.
pub fn pod_template(model: &ValidatedModel, platform: &Platform, pool: &str) -> Result<Value, BuildError> {
    let deployment = deployment::deployment(model, platform, pool);
    let template = serde_json::to_value(deployment.spec.map(|spec| spec.template))?;
    Ok(json!({"spec": {"template": template}}))
}

/// Metadata of a child: it is watched by its labels and deleted with its owner.
fn meta(model: &ValidatedModel, name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(model.namespace.clone()),
        labels: Some(names::model_labels(&model.name)),
        owner_references: Some(vec![model.owner.clone()]),
        ..ObjectMeta::default()
    }
}

/// The object with an annotation that contains its own hash.
fn child<K: Resource + Serialize>(
    kind: &'static ChildKind,
    mut object: K,
) -> Result<DesiredObject, serde_json::Error> {
    let hash = hash::short(&serde_json::to_string(&object)?);
    let meta = object.meta_mut();
    meta.annotations.get_or_insert_default().insert(names::APPLIED_ANNOTATION.to_owned(), hash.clone());
    let name = meta.name.clone().unwrap_or_default();
    Ok(DesiredObject { kind, name, object: serde_json::to_value(&object)?, hash })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate::tests::valid;

    fn platform() -> Platform {
        Platform {
            runtime_image: "localhost/trustformers-runtime:v0.1.0".to_owned(),
            namespace: "sys".to_owned(),
            gateway: GatewayService { name: "gateways".to_owned(), http_port: 80, grpc_port: 81 },
            optional_kinds: kinds::CHILDREN
                .iter()
                .filter(|kind| kind.needs_definition)
                .map(|kind| kind.kind)
                .collect(),
            pull_policy: "IfNotPresent".to_owned(),
            admin: Some(PodAccess {
                subject: "system:serviceaccount:sys:operator".to_owned(),
                issuer: Some("https://cluster".to_owned()),
                keys: Some(r#"{"keys":[]}"#.to_owned()),
            }),
        }
    }

    /// A model with children of every kind. The schema refuses both monitors in one model.
    const EVERY_KIND: &str = "{source: {uri: 'oci://x'}, runtime: {resources: {requests: {cpu: 1}}}, \
        scaling: {replicas: 2, maxReplicas: 4, metrics: [{cpu: 70}]}, networkPolicy: {enabled: true}, \
        monitoring: {serviceMonitor: true, podMonitor: true}, \
        route: {hostnames: [chat.example.com], parentRefs: [{name: public}]}}";

    /// One pool, which the spec's revision has made.
    fn own_pool(model: &ValidatedModel) -> Pools {
        let pool = hash::revision(model);
        let access = platform().admin;
        let config = pod_config(model, &pool, access.as_ref());
        let files = PoolFiles::next(&pool, &config, None, access.as_ref()).unwrap().unwrap();
        let replicas = u32::try_from(model.replicas).unwrap();
        Pools { files: BTreeMap::from([(pool.clone(), files)]), of_spec: Some(PoolSize { pool, replicas }) }
    }

    fn desired(spec: &str) -> Desired {
        let model = valid("chat", spec);
        build(&model, &platform(), &own_pool(&model)).unwrap()
    }

    /// All objects as one YAML text, in the order in which they are applied.
    fn yaml(spec: &str) -> String {
        let texts: Vec<String> =
            desired(spec).objects.iter().map(|one| serde_yaml::to_string(&one.object).unwrap()).collect();
        texts.join("---\n")
    }

    /// Names of the desired objects of a kind.
    fn names_of(spec: &str, kind: &ChildKind) -> Vec<String> {
        let objects = desired(spec).objects.into_iter();
        objects.filter(|one| one.kind == kind).map(|one| one.name).collect()
    }

    #[test]
    fn every_object_is_of_a_listed_kind_and_in_their_order() {
        let objects = desired(EVERY_KIND).objects;
        let built: Vec<_> = objects.iter().map(|one| one.kind).collect();
        assert_eq!(built, kinds::CHILDREN, "a kind that is built must be in kinds::CHILDREN");
        for one in &objects {
            assert_eq!(one.object["kind"], one.kind.kind);
            assert_eq!(one.object["apiVersion"], one.kind.api_version());
        }
    }

    #[test]
    fn a_named_service_account_is_not_created() {
        let spec = "{source: {uri: 'oci://x'}, pod: {serviceAccountName: puller}}";
        assert_eq!(names_of(spec, &kinds::SERVICE_ACCOUNT), Vec::<String>::new());
        assert_eq!(names_of("{source: {uri: 'oci://x'}}", &kinds::SERVICE_ACCOUNT), ["chat-pod"]);
    }

    #[test]
    fn a_model_from_an_image() {
        insta::assert_snapshot!(yaml("{source: {uri: 'oci://localhost/smollm2-135m-instruct:q4_1'}}"));
    }

    #[test]
    fn a_model_from_a_claim_with_every_setting() {
        insta::assert_snapshot!(yaml(
            "{task: embed, source: {uri: 'pvc://weights/smol/v2', files: ['*.gguf'], sha256: ab}, \
             runtime: {device: cpu, numerics: exact, kvCache: bf16, contextTokens: 64, \
             batching: {strategy: size, maxBatchSize: 2, maxWaitMs: 7, maxQueue: 3, priority: true}, image: 'my/runtime:1', \
             env: [{name: RUST_LOG, value: debug}], resources: {requests: {cpu: 1, memory: 1Gi}, limits: {nvidia.com/gpu: 1}}}, \
             scaling: {replicas: 3, minReplicas: 2, maxReplicas: 5, metrics: [{cpu: 70}, {memory: 80}], \
             behavior: {scaleUp: {stabilization: 15s, podsPerMinute: 2}}}, \
             networkPolicy: {enabled: true, namespaces: [monitoring]}, \
             monitoring: {serviceMonitor: true, interval: 15s, labels: {release: prometheus}}, \
             route: {hostnames: [chat.example.com], parentRefs: [{name: public, namespace: edge, sectionName: https}]}, \
             traffic: {drainTimeout: 90s}, disruption: {maxUnavailable: 2}, \
             pod: {nodeSelector: {zone: a}, tolerations: [{key: gpu, operator: Exists, effect: NoSchedule}], \
             affinity: {podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{topologyKey: zone}]}}, \
             topologySpread: [{topologyKey: kubernetes.io/hostname}], priorityClassName: high, runtimeClassName: nvidia, \
             serviceAccountName: puller, labels: {team: a}, annotations: {note: b}}}"
        ));
    }

    #[test]
    fn a_model_that_pods_fetch_has_a_cache_and_its_credentials() {
        let spec = "{source: {uri: 'hf://org/name', revision: v1, secretRef: {name: hub}, cache: {pvc: {claimName: models}}}}";
        let all = desired(spec).objects;
        let of_kind = |kind: &ChildKind| &all.iter().find(|one| one.kind == kind).unwrap().object;
        let pod = &of_kind(&kinds::DEPLOYMENT)["spec"]["template"]["spec"];
        let text = |value: &Value| value.to_string();
        let volumes = text(&pod["volumes"]);
        assert!(
            volumes.contains(r#""name":"cache","persistentVolumeClaim":{"claimName":"models"}"#),
            "{volumes}"
        );
        assert!(volumes.contains(r#""secret":{"secretName":"hub"}"#), "{volumes}");
        assert!(!volumes.contains(r#""name":"model""#), "{volumes}");
        let mounts = text(&pod["containers"][0]["volumeMounts"]);
        assert!(mounts.contains(r#"{"mountPath":"/var/cache/trustformers","name":"cache"}"#), "{mounts}");
        let config = of_kind(&kinds::CONFIG_MAP)["data"]["pod.yaml"].as_str().unwrap();
        let config = trustformers_proto::pod_config::PodConfig::parse(config).unwrap();
        let fetch = config.model.fetch.unwrap();
        assert_eq!((config.model.path.as_str(), fetch.revision.as_deref()), ("hf://org/name", Some("v1")));
        assert_eq!(fetch.secret_dir.as_deref(), Some("/etc/trustformers-source"));
        assert_eq!(fetch.max_cache_bytes, None, "a claim is limited by its own size");
        let own = desired("{source: {uri: 's3://b/k', cache: {emptyDir: {sizeLimit: 9Gi}}}}").objects;
        let own: Vec<String> = own.iter().map(|one| text(&one.object)).collect();
        assert!(own.iter().any(|object| object.contains(r#""emptyDir":{"sizeLimit":"9Gi"}"#)), "{own:?}");
        // The pod refuses what does not fit before kubelet evicts it.
        let limit = format!("maxCacheBytes: {}", (9_u64 << 30) - (1 << 20));
        assert!(own.iter().any(|object| object.contains(&limit)), "{limit}: {own:?}");
    }

    #[test]
    fn golden_prompts_are_in_the_configuration_of_the_pods() {
        let spec = "{source: {uri: 'oci://x'}, rollout: {analysis: {goldenPrompts: [{prompt: '2 + 2 =', expect: ' 4'}]}}}";
        let all = desired(spec).objects;
        let map = &all.iter().find(|one| one.kind == &kinds::CONFIG_MAP).unwrap().object;
        let config =
            trustformers_proto::pod_config::PodConfig::parse(map["data"]["pod.yaml"].as_str().unwrap())
                .unwrap();
        assert_eq!(config.model.golden_prompts[0].expect, " 4");
        let limits = "{source: {uri: 'oci://x'}, rollout: {analysis: {minRequests: 5}}}";
        assert_eq!(
            names_of(limits, &kinds::CONFIG_MAP),
            names_of("{source: {uri: 'oci://x'}}", &kinds::CONFIG_MAP),
            "limits are no matter of pods"
        );
    }

    #[test]
    fn adapters_are_mounted_or_fetched_and_named_in_the_configuration_of_the_pods() {
        let spec = "{source: {uri: 'oci://x'}, runtime: {adapters: [{name: SQL.v1, source: {uri: 'oci://sql:v1'}}, \
                    {name: tone, source: {uri: 'hf://o/n'}}]}}";
        let all = desired(spec).objects;
        let of_kind = |kind: &ChildKind| &all.iter().find(|one| one.kind == kind).unwrap().object;
        let pod = &of_kind(&kinds::DEPLOYMENT)["spec"]["template"]["spec"];
        let volumes = pod["volumes"].to_string();
        assert!(
            volumes.contains(
                r#"{"image":{"pullPolicy":"IfNotPresent","reference":"sql:v1"},"name":"adapter-0"}"#
            ),
            "{volumes}"
        );
        assert!(volumes.contains(r#""name":"cache""#), "{volumes}");
        let mounts = pod["containers"][0]["volumeMounts"].to_string();
        assert!(
            mounts.contains(r#"{"mountPath":"/adapters/SQL.v1","name":"adapter-0","readOnly":true}"#),
            "{mounts}"
        );
        assert!(mounts.contains(r#"{"mountPath":"/var/cache/trustformers","name":"cache"}"#), "{mounts}");
        let config = of_kind(&kinds::CONFIG_MAP)["data"]["pod.yaml"].as_str().unwrap();
        let model = trustformers_proto::pod_config::PodConfig::parse(config).unwrap().model;
        let paths: Vec<_> = model.adapters.iter().map(|one| (one.name.as_str(), one.path.as_str())).collect();
        assert_eq!(paths, [("SQL.v1", "/adapters/SQL.v1"), ("tone", "hf://o/n")]);
        assert_eq!((model.path.as_str(), model.fetch.unwrap().revision), ("/models", None));
        let fetched =
            "{source: {uri: 'hf://a/b'}, runtime: {adapters: [{name: tone, source: {uri: 'hf://o/n'}}]}}";
        let objects = desired(fetched).objects;
        let pod = &objects.iter().find(|one| one.kind == &kinds::DEPLOYMENT).unwrap().object;
        assert_eq!(pod.to_string().matches("/var/cache/trustformers").count(), 1, "one cache for both");
    }

    #[test]
    fn a_pool_has_one_config_map_whatever_it_says() {
        let name = |spec: &str| names_of(spec, &kinds::CONFIG_MAP);
        let base = name("{source: {uri: 'oci://x'}}");
        assert_eq!(name("{source: {uri: 'oci://x'}, traffic: {drainTimeout: 1s}}"), base);
        assert_ne!(name("{source: {uri: 'oci://x'}, runtime: {numerics: exact}}"), base);
    }

    #[test]
    fn a_pool_whose_pods_hold_another_revision_keeps_its_name_and_its_template() {
        let template = |spec: &str| pod_template(&valid("chat", spec), &platform(), "r1").unwrap();
        let base = template("{source: {uri: 'pvc://weights/a'}}");
        assert_eq!(template("{source: {uri: 'pvc://weights/b'}, runtime: {contextTokens: 64}}"), base);
        for other in [
            "{source: {uri: 'pvc://others/a'}}",
            "{source: {uri: 'pvc://weights/a'}, runtime: {image: other}}",
            "{source: {uri: 'pvc://weights/a'}, traffic: {drainTimeout: 1s}}",
        ] {
            assert_ne!(template(other), base, "{other}");
        }
        let model = valid("chat", "{source: {uri: 'pvc://weights/b'}}");
        let pool = Some(PoolSize { pool: "r1".to_owned(), replicas: 2 });
        let desired = build(&model, &platform(), &Pools { of_spec: pool, ..Pools::default() }).unwrap();
        let names: Vec<_> = desired.objects.iter().map(|one| one.name.as_str()).collect();
        assert_eq!((names.last(), desired.pool.as_deref()), (Some(&"chat-r1"), Some("r1")));
    }

    #[test]
    fn a_revision_that_was_rolled_back_has_no_pods() {
        let model = valid("chat", "{source: {uri: 'oci://x'}}");
        let objects = build(&model, &platform(), &Pools::default()).unwrap().objects;
        let kinds: Vec<_> = objects.iter().map(|one| one.kind.kind).collect();
        assert_eq!(kinds, ["ServiceAccount", "Service"]);
    }

    #[test]
    fn a_budget_that_cannot_refuse_an_eviction_is_not_made() {
        let budgets = |spec: &str| names_of(spec, &kinds::DISRUPTION_BUDGET).len();
        assert_eq!(budgets("{source: {uri: 'oci://x'}}"), 0);
        assert_eq!(budgets("{source: {uri: 'oci://x'}, scaling: {replicas: 2}}"), 1);
        assert_eq!(
            budgets("{source: {uri: 'oci://x'}, scaling: {replicas: 2}, disruption: {maxUnavailable: 2}}"),
            0
        );
        assert_eq!(budgets("{source: {uri: 'oci://x'}, disruption: {maxUnavailable: 0}}"), 1);
    }

    #[test]
    fn an_autoscaler_and_a_policy_exist_only_where_they_are_asked_for() {
        let made =
            |spec: &str| [&kinds::AUTOSCALER, &kinds::NETWORK_POLICY].map(|kind| names_of(spec, kind).len());
        assert_eq!(made("{source: {uri: 'oci://x'}}"), [0, 0]);
        assert_eq!(made(EVERY_KIND), [1, 1]);
        assert_eq!(made("{source: {uri: 'oci://x'}, networkPolicy: {callers: Anywhere}}"), [0, 0]);
    }

    #[test]
    fn an_object_whose_kind_the_cluster_does_not_define_is_left_out_and_named() {
        let model = valid("chat", EVERY_KIND);
        let without = Platform { optional_kinds: BTreeSet::new(), ..platform() };
        assert_eq!(undefined(&model, &platform().optional_kinds), [] as [&ChildKind; 0]);
        let optional = [&kinds::SERVICE_MONITOR, &kinds::POD_MONITOR, &kinds::HTTP_ROUTE];
        assert_eq!(undefined(&model, &without.optional_kinds), optional);
        let all = build(&model, &without, &own_pool(&model)).unwrap().objects;
        assert!(all.iter().all(|one| !one.kind.needs_definition));
        assert_eq!(all.len(), kinds::CHILDREN.len() - optional.len());
        // One of them does not wait for the others.
        let some = Platform { optional_kinds: BTreeSet::from([kinds::HTTP_ROUTE.kind]), ..platform() };
        assert_eq!(undefined(&model, &some.optional_kinds), optional[..2]);
        let all = build(&model, &some, &own_pool(&model)).unwrap().objects;
        assert!(all.iter().any(|one| one.kind == &kinds::HTTP_ROUTE));
    }

    #[test]
    fn a_route_leads_host_names_to_the_gateways_and_names_the_model() {
        assert_eq!(names_of("{source: {uri: 'oci://x'}}", &kinds::HTTP_ROUTE), Vec::<String>::new());
        let all = desired(EVERY_KIND).objects;
        let spec = &all.iter().find(|one| one.kind == &kinds::HTTP_ROUTE).unwrap().object["spec"];
        assert_eq!(spec["hostnames"], json!(["chat.example.com"]));
        assert_eq!(spec["parentRefs"], json!([{"name": "public"}]));
        for (rule, path, port) in [(0_usize, "/trustformers.v1.InferenceService", 81), (1, "/", 80)] {
            let rule = &spec["rules"][rule];
            assert_eq!(rule["matches"][0]["path"], json!({"type": "PathPrefix", "value": path}));
            assert_eq!(rule["backendRefs"], json!([{"name": "gateways", "namespace": "sys", "port": port}]));
            let set = &rule["filters"][0]["requestHeaderModifier"]["set"];
            assert_eq!(*set, json!([{"name": "x-trustformers-model", "value": "team/chat"}]));
        }
    }

    #[test]
    fn gpus_are_requested_and_tolerated_and_the_old_pod_ends_first() {
        let deployment = |runtime: &str| {
            let spec = format!("{{source: {{uri: 'oci://x'}}, runtime: {{{runtime}}}}}");
            let all = desired(&spec).objects;
            all.into_iter().find(|one| one.kind == &kinds::DEPLOYMENT).unwrap().object["spec"].take()
        };
        let usual = deployment("gpus: 0, gpuResource: amd.com/gpu");
        assert_eq!(usual, deployment(""), "without GPUs their name means nothing");
        assert_eq!(usual["strategy"]["rollingUpdate"], json!({"maxSurge": 1, "maxUnavailable": 0}));
        let with = deployment("gpus: 2, gpuResource: amd.com/gpu, resources: {requests: {cpu: 1}}");
        assert_eq!(with["strategy"]["rollingUpdate"], json!({"maxSurge": 0, "maxUnavailable": 1}));
        let pod = &with["template"]["spec"];
        assert_eq!(
            pod["containers"][0]["resources"],
            json!({"limits": {"amd.com/gpu": "2"}, "requests": {"amd.com/gpu": "2", "cpu": "1"}})
        );
        let tolerated = json!([{"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]);
        assert_eq!(pod["tolerations"], tolerated);
    }

    #[test]
    fn a_toleration_of_the_spec_is_not_repeated() {
        let spec = "{source: {uri: 'oci://x'}, runtime: {gpus: 1}, \
            pod: {tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]}}";
        let all = desired(spec).objects;
        let pod = &all.iter().find(|one| one.kind == &kinds::DEPLOYMENT).unwrap().object["spec"]["template"]
            ["spec"];
        assert_eq!(pod["tolerations"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn a_pod_monitor_selects_the_pods_of_the_model() {
        let spec =
            "{source: {uri: 'oci://x'}, monitoring: {podMonitor: true, interval: 10s, labels: {release: a}}}";
        assert_eq!(names_of(spec, &kinds::SERVICE_MONITOR), Vec::<String>::new());
        let all = desired(spec).objects;
        let monitor = &all.iter().find(|one| one.kind == &kinds::POD_MONITOR).unwrap().object;
        assert_eq!(monitor["metadata"]["labels"]["release"], "a");
        assert_eq!(monitor["spec"]["selector"]["matchLabels"], json!(names::model_labels("chat")));
        let endpoint = json!({"port": "http", "path": "/metrics", "interval": "10s"});
        assert_eq!(monitor["spec"]["podMetricsEndpoints"], json!([endpoint]));
    }

    #[test]
    fn the_autoscaler_scales_the_model_and_no_deployment() {
        let all = desired(EVERY_KIND).objects;
        let spec = &all.iter().find(|one| one.kind == &kinds::AUTOSCALER).unwrap().object["spec"];
        let target = json!({"apiVersion": "serving.trustformers.dev/v1alpha1", "kind": "InferenceModel", "name": "chat"});
        assert_eq!(spec["scaleTargetRef"], target);
        assert_eq!((&spec["minReplicas"], &spec["maxReplicas"]), (&json!(1), &json!(4)));
        assert_eq!(spec.get("behavior"), None, "the pace is Kubernetes' own");
    }

    #[test]
    fn the_admin_port_admits_the_operator_alone_whoever_else_calls() {
        for settings in
            ["enabled: true", "enabled: true, callers: Anywhere", "enabled: true, namespaces: [a]"]
        {
            let all =
                desired(&format!("{{source: {{uri: 'oci://x'}}, networkPolicy: {{{settings}}}}}")).objects;
            let policy = &all.iter().find(|one| one.kind == &kinds::NETWORK_POLICY).unwrap().object;
            let rules = policy["spec"]["ingress"].as_array().unwrap();
            let admits = |rule: &&Value| rule["ports"].to_string().contains("9092");
            let admin: Vec<&Value> = rules.iter().filter(admits).collect();
            assert_eq!((admin.len(), rules.len()), (1, 2), "{settings}: {rules:?}");
            let from = admin[0]["from"].to_string();
            assert!(
                from.contains("operator") && from.contains("\"sys\"") && !from.contains("gateway"),
                "{from}"
            );
            assert_eq!(rules[1].get("from").is_none(), settings.contains("Anywhere"), "{rules:?}");
        }
    }

    #[test]
    fn names_made_from_the_longest_name_fit_a_service() {
        let long = "a".repeat(45);
        let model = valid(&long, "{source: {uri: 'oci://x'}}");
        for one in build(&model, &platform(), &own_pool(&model)).unwrap().objects {
            assert!(one.name.len() <= 63, "{}", one.name);
        }
    }
}
